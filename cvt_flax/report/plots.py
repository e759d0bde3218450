"""Figures of a page, as HTML and as files, and the curves of a run."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from cvt_flax.report import figures, markup
from cvt_flax.report.figures import Line
from cvt_flax.report.records import Run

SPLITS = {'val': 'validation', 'test': 'test'}
# What the numbers of a run are called; those that are shares of images.
SHARES = {'top1': 'top-1', 'top5': 'top-5'}


class Plots:
  """Draws figures for a page, and writes each as NAME.png and NAME-dark.png beside it."""

  def __init__(self, folder: pathlib.Path):
    self.folder = folder

  def __call__(self, name: str, title: str, draw, *args, **kwargs) -> str:
    """Returns the figure draw(theme, *args, **kwargs) in both themes, as HTML."""
    return markup.plot(title, *self.write(name, title, draw, *args, **kwargs))

  def write(self, name: str, title: str, draw, *args, **kwargs) -> list[bytes]:
    """Writes the figure beside the page alone; returns it as PNG for both themes."""
    written = []
    for theme, ending in zip(figures.THEMES, ('', '-dark'), strict=True):
      figure = draw(theme, *args, **kwargs)
      figures.entitle(figure, theme, title)
      written.append(figures.png(figure))
      (self.folder / f'{name}{ending}.png').write_bytes(written[-1])
    return written


def is_seen(drawn: Sequence[Line]) -> bool:
  """Whether there is anything to see; of a thin line a point alone is nothing."""
  return any(len(line.x) > 1 or line.style != 'thin' for line in drawn)


def curves(run: Run, metric: str) -> list[Line]:
  """Returns 'loss' or 'top1' over epochs: in training, on validation, at last on test."""
  drawn = []
  for split, color, style in (('train', 0, 'thin'), ('val', 1, 'line')):
    x, y = run.curve(f'{split}/{metric}')
    if x:
      drawn.append(Line(SPLITS.get(split, split), x, y, color, style))
  test = run.final.get(f'test/{metric}')
  if test is not None:
    epoch = run.final.get('epoch', run.lines[-1]['epoch'])
    drawn.append(Line('test', [epoch], [test], 2, 'star'))
  return drawn
