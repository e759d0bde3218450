"""A run: its curves while it trains, figures of its report, a trace of its steps."""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from cvt_flax import storage
from cvt_flax.errors import UserError, nearest
from cvt_flax.notebook.drawings import on_white
from cvt_flax.report import figures
from cvt_flax.report.figures import LIGHT
from cvt_flax.report.plots import curves
from cvt_flax.report.records import Run

_WIDEST, _GAP = 1200, 40  # pixels of figures side by side, and between two


class LiveCurves:
  """Loss and accuracy of a run while it trains: `train(config, watch=LiveCurves())`.

  Redraws one figure of the notebook, at most once a second; where there is none, it does nothing.
  """

  def __init__(self):
    self._lines: list[dict] = []
    self._handle = None
    self._shown = -np.inf

  def __call__(self, line: dict) -> None:
    """Takes a line of metrics.jsonl. One of an earlier step is of another run, and begins anew."""
    if self._lines and line['step'] < self._lines[-1]['step']:
      self._lines = []
    self._lines.append(line)
    last = 'checkpoint' in line
    if last or time.monotonic() - self._shown > 1:
      self._show()
      self._shown = time.monotonic()

  def draw(self) -> Figure:
    """Returns the curves so far: the training loss is of augmented images."""
    run = Run(pathlib.Path(), {}, (), {}, self._lines, None)  # curves come of lines alone
    figure = on_white(9, 2.9, layout='constrained')
    panels = (('loss', 'loss', False), ('top1', 'top-1 accuracy', True))
    for axes, (metric, title, percent) in zip(figure.subplots(1, 2), panels, strict=True):
      figures.clear_axes(axes, LIGHT)
      drawn = curves(run, metric)
      if drawn:
        figures.draw_lines(axes, LIGHT, drawn, percent=percent)
      axes.set_title(title, fontsize=10, color=LIGHT.text)
    return figure

  def _show(self):
    if 'IPython' not in sys.modules:  # which runs every notebook
      return
    from IPython import get_ipython
    from IPython.display import display

    if get_ipython() is None:
      return
    if self._handle is None:
      self._handle = display(self.draw(), display_id=True)
    else:
      self._handle.update(self.draw())


def show_report(folder: str | pathlib.Path, *names: str) -> Image.Image:
  """Returns figures of a run's report on white: side by side, or in a column if that is too wide.

  Args:
    folder: of a finished run.
    names: of its figures, report/NAME.png: 'confusion', 'classes', 'mistakes', 'attention-0', ...

  Raises:
    UserError: there is no such figure.
  """
  report = storage.local_path(folder) / 'report'
  known = sorted(p.stem for p in report.glob('*.png') if not p.stem.endswith('-dark'))
  if not known:
    raise UserError(f'{report} holds no figures: python -m cvt_flax.report {folder} draws them')
  if not names:
    raise UserError(f'show_report: a name is needed: one of {", ".join(known)}')
  for name in names:
    if name not in known:
      close = nearest(name, known)
      raise UserError(f'{report}/{name}.png: one of {", ".join(known)} is needed{close}')
  found = [Image.open(report / f'{name}.png').convert('RGBA') for name in names]
  sizes = np.array([image.size for image in found])
  along = sizes.sum(0) + _GAP * (len(found) - 1)  # of a row, of a column
  axis = 0 if along[0] <= _WIDEST else 1
  size = sizes.max(0)
  size[axis] = along[axis]
  whole, corner = Image.new('RGB', tuple(size.tolist()), 'white'), [0, 0]
  for image in found:
    whole.paste(image, tuple(corner), image)
    corner[axis] += image.size[axis] + _GAP
  return whole


@contextlib.contextmanager
def trace_steps(folder: str | pathlib.Path) -> Iterator[Callable[[dict], None]]:
  """Traces the steps between a run's first and second line of metrics, with jax.profiler.

      with trace_steps('profile') as watch:
        train(config, watch=watch)

  These are config.log_every steps of a run that begins, after what is compiled; an evaluation that
  is due among them is in the trace too. XProf (pip install xprof), TensorBoard with its plugin, and
  ui.perfetto.dev show what is written.

  Args:
    folder: for the trace.

  Yields:
    What to give to `train` as watch.
  """
  traced = 'not yet'

  def watch(line):
    nonlocal traced
    if 'train/loss' not in line:
      return
    if traced == 'not yet':
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0  # every call of Python: much, and it says little
      place = os.path.expanduser(folder)
      jax.profiler.start_trace(place, profiler_options=options, create_perfetto_trace=True)
      traced = 'now'
    elif traced == 'now':
      jax.profiler.stop_trace()
      traced = 'done'

  try:
    yield watch
  finally:
    if traced == 'now':
      jax.profiler.stop_trace()
