"""Figures of a report, each drawn for a light and for a dark page."""

from __future__ import annotations

import dataclasses
import io
import textwrap
import warnings
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

_WIDTH, _HEIGHT = 4.6, 2.9  # inches; small, so that letters stay readable on a telephone
_DPI = 170
_TITLE, _TEXT, _CAPTION = 10, 9, 8  # points
_MOST_MARKED = 30  # points of a line of which each is seen
_LONGEST_NAME = 20  # letters
_MOST_ANNOTATED = 12  # classes of a confusion matrix that has its numbers in it
MOST_IN_MATRIX = 40  # classes of which a matrix can still be read
MOST_BARS = 40
_GALLERY_COLUMNS = 4
LARGEST_EXACT = 64  # pixels of a picture whose pixels are to be seen: squares, and kept exact
_LETTER, _BOLD = 0.6, 0.7  # width of a letter in a line, of its height


@dataclasses.dataclass(frozen=True)
class Theme:
  """Colours on a transparent background. Those of lines are Okabe and Ito's, for the colour-blind.

  On dark they begin with those that are bright.
  """

  name: str
  text: str
  faint: str
  lines: tuple[str, ...]


LIGHT = Theme(
  'light', '#24292f', '#d0d7de', ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9')
)
DARK = Theme(
  'dark', '#e6edf3', '#3d444d', ('#56b4e9', '#e69f00', '#2fc79a', '#cc79a7', '#f0e442', '#d55e00')
)
THEMES = (LIGHT, DARK)


@dataclasses.dataclass(frozen=True)
class Line:
  """One line of a plot.

  Attributes:
    label: in the legend; '' for none.
    x, y: its points.
    color: the number of its colour.
    style: 'line', 'thin', or 'star' for points alone.
  """

  label: str
  x: Sequence[float]
  y: Sequence[float]
  color: int
  style: str = 'line'


_STYLES = {
  'line': dict(linewidth=2.0, marker='o', markersize=3.5),
  'thin': dict(linewidth=1.1, alpha=0.75),
  'star': dict(linestyle='none', marker='*', markersize=13, zorder=1.9),  # under a line's point
}
_DASHES = '-', '--', ':'  # when all colours have been used, they come again with the next


def lines(theme: Theme, drawn: Sequence[Line], percent: bool = False) -> Figure:
  """Returns lines over epochs.

  Args:
    theme: its colours.
    drawn: at least one, each with a point.
    percent: whether values are shares.
  """
  figure, axes = _figure(theme, _WIDTH, _HEIGHT)
  draw_lines(axes, theme, drawn, percent)
  return figure


def draw_lines(axes: Axes, theme: Theme, drawn: Sequence[Line], percent: bool = False) -> None:
  """Draws what `lines` returns into axes."""
  shown = {}
  for line in drawn:
    style = dict(_STYLES[line.style])
    if len(line.x) == 1:  # of one point a line shows nothing
      style.setdefault('marker', 'o')
    elif len(line.x) > _MOST_MARKED and line.style == 'line':
      del style['marker']
    again, color = divmod(line.color, len(theme.lines))
    if line.style != 'star':
      style['linestyle'] = _DASHES[again % len(_DASHES)]
    label = line.label or '_'
    (plotted,) = axes.plot(line.x, line.y, color=theme.lines[color], label=label, **style)
    if line.label:
      shown[line.label] = plotted
  if percent:
    axes.yaxis.set_major_formatter(PercentFormatter(1))
  else:
    axes.ticklabel_format(axis='y', scilimits=(-2, 4), useMathText=True)
    axes.yaxis.get_offset_text().set(color=theme.text, fontsize=_TEXT)
  axes.set_xlim(left=0)
  axes.set_xlabel('epoch', color=theme.text, fontsize=_TEXT)
  axes.xaxis.set_major_locator(MaxNLocator(6, integer=max(x for d in drawn for x in d.x) >= 2))
  axes.grid(True, color=theme.faint, linewidth=0.6)
  if shown:
    legend = axes.legend(
      shown.values(), shown, frameon=False, fontsize=_TEXT, labelcolor=theme.text
    )
    for text in legend.get_texts():
      text.set_parse_math(False)


def bars(theme: Theme, names: Sequence[str], shares: Sequence[float]) -> Figure:
  """Returns horizontal bars of shares from 0 to 1, the first on top."""
  figure, axes = _figure(theme, _WIDTH, 0.8 + 0.24 * len(names))
  draw_bars(axes, theme, names, shares)
  return figure


def draw_bars(axes: Axes, theme: Theme, names: Sequence[str], shares: Sequence[float]) -> None:
  """Draws what `bars` returns into axes."""
  places = np.arange(len(names))
  axes.barh(places, shares, color=theme.lines[0], height=0.7)
  for place, share in zip(places, shares, strict=True):
    beside = dict(xytext=(3, 0), textcoords='offset points', va='center')
    axes.annotate(f'{share:.0%}', (share, place), color=theme.text, fontsize=8, **beside)
  axes.set_yticks(places)
  _name_ticks(axes.set_yticklabels(_shortened(names)))
  axes.set_xlim(0, 1.1)
  axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10)))
  axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
  axes.set_ylim(len(names) - 0.4, -0.6)
  axes.tick_params(axis='y', length=0)


def calibration(
  theme: Theme,
  probability: np.ndarray,
  accuracy: np.ndarray,
  low: np.ndarray,
  high: np.ndarray,
  share: np.ndarray,
) -> Figure:
  """Returns accuracy over probability, with a diagonal, and the shares of images as faint bars.

  Args:
    theme: its colours.
    probability, accuracy, share: of the images of each bin, [n].
    low, high: the interval of the accuracy, [n].
  """
  figure, axes = _figure(theme, _WIDTH, _HEIGHT)
  axes.bar(probability, share, width=0.03, color=theme.faint)
  axes.plot([0, 1], [0, 1], color=theme.text, linewidth=0.8, linestyle=':')
  axes.vlines(probability, low, high, color=theme.lines[0], linewidth=1.0, alpha=0.6)
  axes.plot(probability, accuracy, color=theme.lines[0], **_STYLES['line'])
  for axis, name in (
    (axes.xaxis, 'probability of the prediction'),
    (axes.yaxis, 'share that is right'),
  ):
    axis.set_major_formatter(PercentFormatter(1))
    axis.set_label_text(name, color=theme.text, fontsize=_TEXT)
  axes.set(xlim=(0, 1.03), ylim=(0, 1.03))
  axes.grid(True, color=theme.faint, linewidth=0.6)
  return figure


def confusion(theme: Theme, names: Sequence[str], matrix: np.ndarray) -> Figure:
  """Returns a confusion matrix: of each true class (rows), the percentages by prediction.

  With many classes these are colours alone. A class without images has neither.
  """
  k = len(names)
  size = np.clip(1.2 + 0.42 * k, 3.4, 6.2)
  figure, axes = _figure(theme, size, size)
  shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
  without = np.repeat(matrix.sum(1, keepdims=True) == 0, k, axis=1)
  image = axes.imshow(np.ma.array(shares, mask=without), cmap='cividis', vmin=0, vmax=1)
  axes.set_xticks(range(k))
  axes.set_yticks(range(k))
  _name_ticks(axes.set_xticklabels(_shortened(names), rotation=90 if k > 3 else 0))
  _name_ticks(axes.set_yticklabels(_shortened(names)))
  axes.tick_params(length=0, labelsize=_TEXT if k <= _MOST_ANNOTATED else 6.5)
  axes.set_xlabel('predicted', color=theme.text, fontsize=_TEXT)
  axes.set_ylabel('true', color=theme.text, fontsize=_TEXT)
  if k > _MOST_ANNOTATED:
    bar = figure.colorbar(image, ax=axes, fraction=0.04, format=PercentFormatter(1))
    bar.ax.tick_params(colors=theme.text, labelsize=8)
    bar.outline.set_visible(False)
    return figure
  for (i, j), share in np.ndenumerate(shares):
    if matrix[i].any():
      color = '#1b1b1b' if share > 0.55 else '#f4f4f4'
      written = axes.text(j, i, f'{100 * share:.0f}', ha='center', va='center', fontsize=8)
      written.set(color=color, alpha=1 if matrix[i, j] else 0.5)
  return figure


def gallery(
  theme: Theme,
  pictures: Sequence[np.ndarray],
  captions: Sequence[str],
  columns: int = _GALLERY_COLUMNS,
  side: float = 1.6,
) -> Figure:
  """Returns pictures, uint8 [h w 3], in rows, each above its caption; 'none' without any.

  Args:
    theme: its colours.
    pictures: all of one size.
    captions: lines that are too long for a picture are broken.
    columns: at most.
    side: of a picture, in inches.
  """
  columns = max(1, min(len(pictures), columns))
  rows = max(1, -(-len(pictures) // columns))
  captions = [_broken(caption, side, _LETTER * _CAPTION) for caption in captions]
  lines = max((caption.count('\n') + 1 for caption in captions), default=0)
  height = side + (1.4 * lines + 1) * _CAPTION / 72
  # 'compressed' is 'constrained' for axes that keep their shape.
  figure = Figure(figsize=(side * columns, height * rows), layout='compressed')
  FigureCanvasAgg(figure)
  for i, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.patch.set_visible(False)
    if i < len(pictures):
      exact = pictures[i].shape[1] <= LARGEST_EXACT
      axes.imshow(pictures[i], interpolation='nearest' if exact else 'antialiased')
      caption = axes.set_xlabel(captions[i], fontsize=_CAPTION, color=theme.text)
      caption.set_parse_math(False)
  if not pictures:
    figure.text(0.5, 0.5, 'none', ha='center', color=theme.text)
  return figure


def entitle(figure: Figure, theme: Theme, title: str) -> None:
  """Writes a title over a figure, which grows, in as many lines as its width asks for."""
  text = _broken(title, figure.get_figwidth(), _BOLD * _TITLE)
  height = 1.4 * (text.count('\n') + 1) * _TITLE / 72
  figure.set_figheight(figure.get_figheight() + height)
  written = figure.suptitle(text, x=0.01, ha='left', fontsize=_TITLE, color=theme.text)
  written.set(weight='bold', parse_math=False)


def png(figure: Figure) -> bytes:
  """Returns a figure as PNG with a transparent background."""
  file = io.BytesIO()
  with warnings.catch_warnings():
    # Class names may have letters that the font lacks; the tables of the page show them.
    warnings.filterwarnings('ignore', message='Glyph .* missing from')
    figure.savefig(file, format='png', dpi=_DPI, transparent=True, metadata={'Software': None})
  return file.getvalue()


def _figure(theme, width, height):
  figure = Figure(figsize=(width, height), layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  clear_axes(axes, theme)
  return figure, axes


def clear_axes(axes: Axes, theme: Theme) -> None:
  """Gives axes the look of all figures: two spines, faint."""
  for side, spine in axes.spines.items():
    spine.set_visible(side in ('left', 'bottom'))
    spine.set_color(theme.faint)
  axes.tick_params(colors=theme.text, labelsize=_TEXT, color=theme.faint)
  axes.set_axisbelow(True)


def _broken(text, width, letter):
  letters = int(width * 72 / letter)
  return '\n'.join(textwrap.fill(line, letters) for line in text.splitlines())


def _shortened(names):
  return [n if len(n) <= _LONGEST_NAME else f'{n[: _LONGEST_NAME - 1]}…' for n in names]


def _name_ticks(texts):
  for text in texts:
    text.set_parse_math(False)  # a class may be called $5
