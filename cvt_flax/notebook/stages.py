"""A CvT's stages as blocks, by its attributes."""

from __future__ import annotations

import pathlib

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Polygon

from cvt_flax.errors import UserError
from cvt_flax.models.cvt import CvT
from cvt_flax.models.geometry import StageGeometry, multiply_adds, stage_geometry
from cvt_flax.notebook.drawings import TEXT, on_white
from cvt_flax.report.figures import LIGHT
from cvt_flax.weights import pretrained

_SMALLEST_CELL = 0.05  # inches of a cell of a grid that can be seen


def draw_model(model: CvT | str | pathlib.Path, image_size: int | None = None) -> Figure:
  """Returns a drawing of a CvT's stages for images of image_size x image_size pixels.

  Each map is a block as wide and high as its pixels, as deep as its channels (square roots of
  both), with its grid where the cells are large enough to be seen. What is written comes from the
  attributes.

  Args:
    model: it, or weights of it, as `load_pretrained` takes them.
    image_size: in pixels; of weights by default what they were made for.

  Raises:
    UserError: it is no CvT, there are no such weights, or the size of a model's images is wanting.
  """
  if isinstance(model, str | pathlib.Path):
    weights = pretrained.load(model)
    model, image_size = weights.model, image_size or weights.description.preprocessing.image_size
  if not isinstance(model, CvT):
    raise UserError(f'draw_model draws the stages of a CvT, not a {type(model).__name__}')
  if not image_size:
    raise UserError('draw_model: image_size is needed, in pixels')
  stages = stage_geometry(model, image_size, image_size)
  figure = on_white(2.3 * len(stages) + 2.3, 3.1)
  axes = figure.add_axes((0, 0, 1, 1))
  axes.set_axis_off()
  sides = [np.sqrt(size) for size in (image_size, *(s.width for s in stages))]
  depths = [np.sqrt(n) for n in (model.in_channels, *(s.options.embed_dim for s in stages))]
  unit = 1.4 / max(sides)  # of the largest map's side, in inches
  deep = 0.45 / max(depths)
  title = f'{image_size}×{image_size}×{model.in_channels}'
  _draw_block(axes, 0, sides[0] * unit, depths[0] * deep, image_size, LIGHT.faint)
  count = multiply_adds(model, image_size, image_size)
  _write(axes, 0, 'image', title, [])
  total = f'the whole network: {count / 1e6:,.0f} million multiply-adds for an image'
  axes.text(-0.9, 1.05, total, ha='left', va='top', fontsize=TEXT, color=LIGHT.text)
  for i, stage in enumerate(stages, start=1):
    x = 2.3 * i
    color = LIGHT.lines[(i - 1) % len(LIGHT.lines)]
    _draw_block(axes, x, sides[i] * unit, depths[i] * deep, stage.width, color)
    if stage.options.cls_token:
      _draw_block(axes, x + 0.9, 0.12, depths[i] * deep, 1, LIGHT.lines[4])
      axes.text(x + 0.95, -0.14, 'class\ntoken', ha='center', va='top', fontsize=7.5)
    o = stage.options
    arrow = FancyArrowPatch(
      (x - 1.5, 0), (x - 0.78, 0), arrowstyle='-|>', mutation_scale=11, color=LIGHT.text
    )
    axes.add_patch(arrow)
    words = f'conv {o.patch_size}×{o.patch_size}\nstride {o.patch_stride}'
    axes.text(x - 1.15, 0.1, words, ha='center', va='bottom', fontsize=7.5, color=LIGHT.text)
    size = f'{stage.height}×{stage.width}×{o.embed_dim}'
    _write(axes, x, f'stage {i}', size, _stage_lines(stage))
  axes.set_xlim(-0.95, 2.3 * len(stages) + 1.35)
  axes.set_ylim(-1.95, 1.15)
  axes.set_aspect('equal')
  return figure


def _stage_lines(stage: StageGeometry) -> list[str]:
  o = stage.options
  return [
    f'{stage.tokens:,} queries, {stage.keys:,} keys',
    f'{o.depth} block{"s" * (o.depth > 1)}, {o.num_heads} head{"s" * (o.num_heads > 1)}',
  ]


def _write(axes, x, name, size, lines):
  axes.text(x, -1.0, name, ha='center', va='top', fontsize=TEXT, color=LIGHT.text)
  axes.text(x, -1.22, size, ha='center', va='top', fontsize=TEXT, weight='bold', color=LIGHT.text)
  axes.text(x, -1.44, '\n'.join(lines), ha='center', va='top', fontsize=8, color=LIGHT.text)


def _draw_block(axes, x, side, depth, cells, color):
  """Draws a block around (x, 0), in oblique projection, with a grid of so many cells a side."""
  left, low = x - side / 2, -side / 2
  right, high = x + side / 2, side / 2
  shift = np.array([depth, depth]) * 0.6
  front = np.array([(left, low), (right, low), (right, high), (left, high)])
  top = np.array([front[3], front[2], front[2] + shift, front[3] + shift])
  flank = np.array([front[1], front[1] + shift, front[2] + shift, front[2]])
  for corners, alpha in ((front, 0.35), (top, 0.2), (flank, 0.55)):
    axes.add_patch(Polygon(corners, facecolor=color, alpha=alpha, linewidth=0))
    axes.add_patch(Polygon(corners, fill=False, edgecolor=LIGHT.text, linewidth=0.7, zorder=2))
  if cells > 1 and side / cells >= _SMALLEST_CELL:
    lines = np.linspace(0, side, cells + 1)[1:-1]
    inside = dict(color='white', linewidth=0.7, zorder=1)  # below the edges
    axes.vlines(left + lines, low, high, **inside)
    axes.hlines(low + lines, left, right, **inside)
