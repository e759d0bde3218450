"""What a notebook shows of models and runs: colab/cvt_flax.ipynb is made of these and the rest.

What is drawn is returned as a Matplotlib Figure on white, or as a Pillow image, which a notebook
shows by itself (`%matplotlib inline`). IPython is imported by `LiveCurves` alone.
"""

from __future__ import annotations

import contextlib
import pathlib
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import jax
import ml_collections
import numpy as np
import sklearn.datasets
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Polygon
from PIL import Image

from cvt_flax.data import images, machine
from cvt_flax.errors import UserError, nearest
from cvt_flax.models.cvt import CvT
from cvt_flax.models.geometry import StageGeometry, multiply_adds, stage_geometry
from cvt_flax.predict import Prediction
from cvt_flax.report import figures, pictures
from cvt_flax.report.figures import LIGHT
from cvt_flax.report.plots import curves
from cvt_flax.report.records import Run
from cvt_flax.training.hardware import unused_accelerator
from cvt_flax.training.look import training_images
from cvt_flax.weights import pretrained
from cvt_flax.weights.pretrained import Weights

__all__ = [
  'LiveCurves',
  'compute_dtype',
  'describe_devices',
  'draw_attention',
  'draw_model',
  'draw_predictions',
  'draw_training_images',
  'sample_images',
  'show_report',
  'trace_steps',
  'write_sample_archive',
]

_DPI = 110
_TEXT = 9  # points
_WIDEST, _GAP = 1200, 40  # pixels of figures side by side, and between two
_LEAST_SHARE = 0.05  # of a target that is written below its image
_SMALLEST_CELL = 0.05  # inches of a cell of a grid that can be seen
# Compute capability; CUDA C++ Programming Guide, throughput of native arithmetic instructions.
_BFLOAT16_FROM = 8


def describe_devices() -> str:
  """Returns what jax computes on, and what to expect of it."""
  devices = jax.devices()
  kinds = ', '.join(f'{n} x {kind}' for kind, n in Counter(d.device_kind for d in devices).items())
  if devices[0].platform != 'cpu':
    return (
      f'jax {jax.__version__} computes on {kinds}, in {compute_dtype()}. What is trained below has '
      'a size for it.'
    )
  lines = [
    f'jax {jax.__version__} computes on the CPU, {machine.cores()} cores. All below works, with a '
    'smaller network to train.'
  ]
  lines.append(unused_accelerator() or 'On Colab: Runtime > Change runtime type > a TPU or a GPU.')
  return '\n'.join(lines)


def compute_dtype() -> str:
  """Returns the `model.dtype` that suits the devices.

  'bfloat16' for TPUs and for NVIDIA GPUs that have its arithmetic, from compute capability 8.0 on
  (Colab's T4 has 7.5); 'float32' for others and for CPUs.
  """
  device = jax.devices()[0]
  match device.platform:
    case 'tpu':
      return 'bfloat16'
    case 'gpu':
      major = str(getattr(device, 'compute_capability', '')).partition('.')[0]
      return 'bfloat16' if major.isdigit() and int(major) >= _BFLOAT16_FROM else 'float32'
    case _:
      return 'float32'


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
  figure = _figure(2.3 * len(stages) + 2.3, 3.1)
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
  axes.text(-0.9, 1.05, total, ha='left', va='top', fontsize=_TEXT, color=LIGHT.text)
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
  axes.text(x, -1.0, name, ha='center', va='top', fontsize=_TEXT, color=LIGHT.text)
  axes.text(x, -1.22, size, ha='center', va='top', fontsize=_TEXT, weight='bold', color=LIGHT.text)
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


def draw_attention(
  weights: str | pathlib.Path | Weights, paths: Sequence[str | pathlib.Path]
) -> Figure:
  """Returns pictures, and over each where the last block of every stage looks.

  It is the mean over the heads of `cvt_flax.attention_maps`: of the class token where the stage has
  one, otherwise the mean over all queries. Colour is how far it is above the uniform share 1 / keys
  (`report.pictures.tiles`); the largest, as a multiple of that, stands below. A stage that has a
  single key is left out: that gets all attention there is.

  Args:
    weights: what `load_pretrained` takes, or what `load_weights` returned.
    paths: of pictures.

  Raises:
    UserError: weights or a picture cannot be read, or no picture is given.
  """
  paths = [paths] if isinstance(paths, str | pathlib.Path) else list(paths)
  if not paths:
    raise UserError('no picture is given')
  if not isinstance(weights, Weights):
    weights = pretrained.load(weights)
  steps = weights.description.preprocessing
  pixels = np.stack(
    [images.read(path, steps.image_size, steps.crop_ratio) for path in map(pathlib.Path, paths)]
  )
  found = [a for a in pictures.attended(weights, pixels) if not a.single]
  shown, captions = [], []
  for i, image in enumerate(pixels):
    maps = [attention.maps[i] for attention in found]
    shown += pictures.tiles(image, maps, side=224)
    captions.append(f'as the network\ngets it, {steps.image_size}×{steps.image_size}')
    captions += [
      f'{a.stage}: {a.size}\n{a.of}\n{pictures.largest(m)}'
      for a, m in zip(found, maps, strict=True)
    ]
  figure = figures.gallery(LIGHT, shown, captions, columns=1 + len(found), side=2.0)
  figure.set(dpi=_DPI, facecolor='white')
  return figure


def draw_predictions(predictions: Sequence[Prediction]) -> Figure:
  """Returns pictures, each beside bars of its most probable classes, as `predict_images` has them.

  Raises:
    UserError: a picture cannot be read, or there is none.
  """
  predictions = list(predictions)
  if not predictions:
    raise UserError('no prediction is given')
  for found in predictions:
    if found.error:
      raise UserError(found.error)
  figure = _figure(7, 1.75 * len(predictions) + 0.4, layout='constrained')
  grid = figure.subplots(len(predictions), 2, squeeze=False, width_ratios=(1, 1.6))
  # One scale, to compare them; what is less than a tenth is to look small.
  end = 1.15 * max(0.1, *(max(found.probabilities) for found in predictions))
  for (left, right), found in zip(grid, predictions, strict=True):
    left.imshow(
      np.asarray(images.decode(images.read_bytes(pathlib.Path(found.image)), found.image))
    )
    left.set_axis_off()
    figures.draw_bars(right, LIGHT, found.names, found.probabilities)
    figures.clear_axes(right, LIGHT)
    right.set_xlim(0, end)
    right.tick_params(labelbottom=right is grid[-1, 1])
  grid[-1, 1].set_xlabel('probability', fontsize=_TEXT, color=LIGHT.text)
  return figure


def draw_training_images(
  config: ml_collections.ConfigDict | str, step: int = 0, count: int = 24
) -> Figure:
  """Returns images as the network gets them in a step: cropped, augmented, erased and mixed.

  Below each are the two largest shares of its target, from 5 % on.

  Args:
    config: as `cvt_flax.get_config` returns it, or a name that it takes.
    step: of the run, from 0.
    count: how many, at most.

  Raises:
    UserError: the config or the data are not usable, or the run has no such step.
  """
  if count < 1:
    raise UserError(f'count={count}: at least 1 is needed')
  found = training_images(config, step)
  captions = []
  for target in found.targets[:count]:
    best = [i for i in np.argsort(-target, kind='stable')[:2] if target[i] >= _LEAST_SHARE]
    captions.append('\n'.join(f'{found.class_names[i]} {target[i]:.0%}' for i in best))
  figure = figures.gallery(LIGHT, list(found.pixels[:count]), captions, columns=6)
  figure.set(dpi=_DPI, facecolor='white')
  return figure


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
    figure = _figure(9, 2.9, layout='constrained')
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
  report = pathlib.Path(folder, 'report')
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
      jax.profiler.start_trace(str(folder), profiler_options=options, create_perfetto_trace=True)
      traced = 'now'
    elif traced == 'now':
      jax.profiler.stop_trace()
      traced = 'done'

  try:
    yield watch
  finally:
    if traced == 'now':
      jax.profiler.stop_trace()


def sample_images() -> list[pathlib.Path]:
  """Returns the paths of the two photographs that come with scikit-learn."""
  folder = pathlib.Path(sklearn.datasets.__file__).parent / 'images'
  return [folder / 'china.jpg', folder / 'flower.jpg']


def write_sample_archive(path: str | pathlib.Path, count: int = 60, side: int = 160) -> None:
  """Writes a zip of two folders of pictures, cut at random from `sample_images`.

  Args:
    path: of the zip; there may be one.
    count: of pictures for each folder.
    side: of the pictures, in pixels.
  """
  rng = np.random.default_rng(0)
  with zipfile.ZipFile(path, 'w') as archive:
    for source in sample_images():
      with Image.open(source) as photograph:
        corners = rng.integers((photograph.width - side, photograph.height - side), size=(count, 2))
        for i, (left, top) in enumerate(corners.tolist()):
          piece = photograph.crop((left, top, left + side, top + side))
          with archive.open(f'{source.stem}/{i:03}.png', 'w') as file:
            piece.save(file, 'PNG')


def _figure(width, height, **options):
  return Figure(figsize=(width, height), dpi=_DPI, facecolor='white', **options)
