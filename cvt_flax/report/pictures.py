"""Images of a run's source, and what the network attends to in them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from PIL import Image

from cvt_flax.data import images, sources
from cvt_flax.data.dataset import Dataset, Example, Split
from cvt_flax.errors import UserError
from cvt_flax.models.attention_maps import attention_maps
from cvt_flax.models.geometry import stage_geometry
from cvt_flax.ops.pixels import normalize_pixels
from cvt_flax.report.figures import LARGEST_EXACT
from cvt_flax.report.predictions import Predictions
from cvt_flax.report.records import Run
from cvt_flax.weights.pretrained import Weights

_SIDE = 160  # pixels of a picture with attention over it
_HEAT = 0.6  # share of the heat in the mixture
_QUALITY = 88  # of JPEG
# What `tiles` and `largest` show, for who looks at them.
LEGEND = (
  'Colour says how far attention is above the uniform share, which is the same for every key: dark '
  'where it is at or below it, brightest at the largest of the map, or at twice the uniform share '
  'where none gets there. Under each map is its largest, as a multiple of the uniform share.'
)


class Source:
  """The split that a run's predictions are of, by the index that they name images by."""

  def __init__(self, run: Run):
    """Opens it.

    Raises:
      UserError: the source is gone, or has no such split.
    """
    c = run.config
    self._size, self._crop_ratio = c['image_size'], c['crop_ratio']
    dataset = sources.load(
      c['source'],
      data_dir=c['data_dir'],
      holdout=c['eval.holdout'],
      test_holdout=c.get('eval.test_holdout', 0.0),  # runs of earlier versions have none
      seed=c['seed'],
      prepare=False,
    )
    if dataset.class_names != run.class_names:
      raise UserError(f'{c["source"]} has other classes than when the run was made')
    named = run.predictions and run.predictions.split
    self._split, self._held_out = _split(dataset, named)

  def example(self, index: int, label: int) -> Example:
    """Returns an image of the predictions.

    Raises:
      UserError: it is not there any more, or has another label.
    """
    place = index
    if self._held_out is not None:
      place = int(np.searchsorted(self._held_out, index))
    found = self._split[place] if place < len(self._split) else None
    if found is None or (found.index, found.label) != (index, label):
      raise UserError(f'{self._split.name} has changed since the run')
    return found

  def spread(self, p: Predictions | None, count: int) -> list[Example]:
    """Returns images at even distances of the predictions; without them, of the split.

    Raises:
      UserError: they are not those of the predictions.
    """
    n = len(self._split if p is None else p)
    places = np.linspace(0, n - 1, min(count, n)).round().astype(int).tolist()
    if p is None:
      return self._split.__getitems__(places)
    return [self.example(int(p.index[i]), int(p.label[i])) for i in places]

  def pixels(self, example: Example) -> np.ndarray:
    """Returns uint8 [size, size, 3], as the network gets it."""
    return images.prepare(example.image, example.name, self._size, self._crop_ratio)


def _split(dataset: Dataset, named: str | None) -> tuple[Split, np.ndarray | None]:
  """Returns the split and, where its images were held out of train, their indices."""
  if dataset.test is not None and named != 'val':
    return dataset.test, dataset.held_out_test if dataset.held_out_test.size else None
  if dataset.validation is None or named == 'test':
    raise UserError(f'{dataset.name} has no {named or "validation"} split')
  return dataset.validation, dataset.held_out if dataset.held_out.size else None


class Attention(NamedTuple):
  """Where the last block of a stage looks, the mean over its heads.

  Attributes:
    stage: its name.
    size: of the maps, in words.
    of: whose attention it is.
    maps: float32 [b h w], as multiples of the uniform share: 1 is what each of the keys would get.
  """

  stage: str
  size: str
  of: str
  maps: np.ndarray

  @property
  def single(self) -> bool:
    """Whether there is a single key. It gets all attention there is: nothing to see."""
    return self.maps[0].size == 1


def attended(weights: Weights, pixels: np.ndarray) -> list[Attention]:
  """Returns the attention of every stage, and that of sequence pooling where there is some.

  Args:
    weights: of the network.
    pixels: uint8 [b size size 3].
  """
  steps = weights.description.preprocessing
  # It runs once, and to compile it with all optimisations would take the CPU longer than to run it.
  quick = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None

  def compute(variables, pixels):
    batch = normalize_pixels(pixels, steps.mean, steps.std)
    return [jnp.mean(m, axis=1) for m in attention_maps(weights.model, variables, batch)]

  maps = jax.device_get(jax.jit(compute, compiler_options=quick)(weights.variables, pixels))
  stages = stage_geometry(weights.model, *pixels.shape[1:3])
  of = ['class token' if s.options.cls_token else 'mean of all queries' for s in stages]
  names = [f'stage {s}' for s in range(1, len(stages) + 1)]
  keys = [stage.keys for stage in stages]  # with the class token's own, which no map has
  if len(maps) > len(stages):
    of.append('weight of each token')
    names.append('pooling')
    keys.append(maps[-1][0].size)
  sizes = [f'{m.shape[1]}×{m.shape[2]} keys' for m in maps]
  scaled = [m * n for m, n in zip(maps, keys, strict=True)]
  return [Attention(*each) for each in zip(names, sizes, of, scaled, strict=True)]


def largest(heat: np.ndarray) -> str:
  """Returns the largest of a map of `attended`, [h w], in words."""
  return f'largest {heat.max():.1f}×'


def tiles(pixels: np.ndarray, maps: Sequence[np.ndarray], side: int = _SIDE) -> list[np.ndarray]:
  """Returns an image, then itself, grey, with each attention map over it: uint8 [side side 3].

  A map as a share of its peak would paint uniform attention all over as brightest. So colour begins
  above the uniform share, and ends at the peak, or at twice that share where the peak is lower:
  next to uniform attention looks next to even, and a peak is bright however high it is.

  Args:
    pixels: uint8 [size size 3].
    maps: float [h w], as multiples of the uniform share.
    side: of the squares, in pixels.
  """
  image = Image.fromarray(pixels)
  exact = image.width <= LARGEST_EXACT
  image = image.resize(
    (side, side), Image.Resampling.NEAREST if exact else Image.Resampling.BICUBIC
  )
  found = [np.asarray(image)]
  grey = np.asarray(image.convert('L').convert('RGB'), np.float32)
  for heat in maps:
    above = np.maximum(heat - 1, 0)
    heat = Image.fromarray(np.asarray(above / max(above.max(), 1), np.float32))
    heat = np.asarray(heat.resize((side, side), Image.Resampling.BILINEAR))
    colors = 255 * matplotlib.colormaps['inferno'](heat)[..., :3]
    found.append(np.round((1 - _HEAT) * grey + _HEAT * colors).astype(np.uint8))
  return found


def thumbnail(pixels: np.ndarray) -> tuple[bytes, str]:
  """Returns an encoded image, at most 224 pixels wide, and its MIME type."""
  image = Image.fromarray(pixels)
  if image.width <= LARGEST_EXACT:
    return _encoded(image, 'PNG'), 'image/png'
  image.thumbnail((224, 224))
  return _encoded(image, 'JPEG', quality=_QUALITY), 'image/jpeg'


def _encoded(image, kind, **options):
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()
