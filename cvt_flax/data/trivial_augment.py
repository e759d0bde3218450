"""TrivialAugment Wide on one uint8 image, in jax, with Pillow's arithmetic.

One operation drawn out of fourteen, one of 31 magnitudes and, where the operation has one, a sign
(Mueller and Hutter 2021, https://arxiv.org/abs/2103.10158). Ranges and conventions are those of
torchvision's `TrivialAugmentWide` on Pillow images: nearest interpolation, black outside, shears
about the upper left corner, rotations about the middle.

Under `jax.vmap` a switch over fourteen branches computes all fourteen for every image. But they are
of three kinds only, and so are written as three functions that take their numbers from tables:
a nearest-neighbour affine map, a blend with a degenerate image, and a new value for every grey
level of a channel.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

# In torchvision's order (transforms/autoaugment.py, TrivialAugmentWide._augmentation_space).
OPERATIONS = (
  'identity',
  'shear_x',
  'shear_y',
  'translate_x',
  'translate_y',
  'rotate',
  'brightness',
  'color',
  'contrast',
  'sharpness',
  'posterize',
  'solarize',
  'autocontrast',
  'equalize',
)
MAGNITUDE_BINS = 31  # torchvision's default; the paper's "Wide" space has 31 strengths as well

# The exact values of its magnitudes. torch.linspace makes them in float32 and rounds differently
# from processor to processor: bin 15 of its translations, 16 pixels, is 15 on those with AVX-512.
_SHEAR = np.linspace(0, 0.99, MAGNITUDE_BINS)
_TRANSLATE = np.linspace(0, 32, MAGNITUDE_BINS).astype(int)  # whole pixels: torchvision truncates
_ROTATE = np.linspace(0, 135, MAGNITUDE_BINS)  # degrees, counterclockwise
# In float32 here too: 1 - 0.99 in float32 is 0.00999999, which shows in what Pillow truncates.
_ENHANCE = np.linspace(0, 0.99, MAGNITUDE_BINS, dtype=np.float32).astype(np.float64)
_POSTERIZE = 8 - np.round(np.arange(MAGNITUDE_BINS) / 5).astype(int)  # bits kept: 8 to 2
_SOLARIZE = np.linspace(255, 0, MAGNITUDE_BINS)  # grey levels from here upward are inverted

_GEOMETRIC = ('shear_x', 'shear_y', 'translate_x', 'translate_y', 'rotate')
_ENHANCING = ('brightness', 'color', 'contrast', 'sharpness')


def trivial_augment(key: jax.Array, image: jax.Array) -> jax.Array:
  """Applies one random operation at a random magnitude.

  Args:
    key: a typed key of this image alone.
    image: uint8 [h, w, 3].

  Returns:
    uint8 [h, w, 3].

  Raises:
    ValueError: from `apply`.
  """
  limits = jnp.array([len(OPERATIONS), MAGNITUDE_BINS, 2])
  operation, magnitude_bin, negative = jax.random.randint(key, (3,), 0, limits)
  return apply(image, operation, magnitude_bin, negative)


def apply(
  image: jax.Array,
  operation: int | jax.Array,
  magnitude_bin: int | jax.Array,
  negative: int | jax.Array,
) -> jax.Array:
  """Applies one operation.

  Equal to Pillow on every pixel, but for autocontrast: there Pillow multiplies in double precision
  and truncates, and so falls one grey level short of some exact whole numbers.

  Args:
    image: uint8 [h, w, 3].
    operation: position in `OPERATIONS`, an integer scalar (it may be traced, as the next two).
    magnitude_bin: strength from 0 to 30; identity, autocontrast and equalize have none.
    negative: 1 for the negative magnitude, 0 for the positive; only the geometric and the
      enhancing operations have a sign.

  Returns:
    uint8 [h, w, 3].

  Raises:
    ValueError: the image is not uint8 [h, w, 3].
  """
  if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != jnp.uint8:
    raise ValueError(f'the image must be uint8 [h, w, 3], got {image.dtype} {image.shape}')
  grey = jnp.asarray(image, jnp.int32)
  moved = _affine(grey, operation, magnitude_bin, negative)
  blended = _blend(grey, operation, magnitude_bin, negative)
  mapped = _map_levels(grey, operation, magnitude_bin)
  geometric = jnp.isin(operation, _positions(_GEOMETRIC))
  enhancing = jnp.isin(operation, _positions(_ENHANCING))
  result = jnp.where(geometric, moved, jnp.where(enhancing, blended, mapped))
  return result.astype(jnp.uint8)


def _positions(names: tuple[str, ...]) -> np.ndarray:
  return np.array([OPERATIONS.index(name) for name in names], np.int32)


# ----- Geometry: shear, translate, rotate ------------------------------------------------------


@functools.cache
def _affine_table(h: int, w: int) -> np.ndarray:
  """Returns int32 [14, 31, 2, 6]: for each operation, bin and sign the map from output to input.

  Pillow (libImaging/Geometry.c, affine_fixed) rounds the six numbers of x' = a x + b y + c,
  y' = d x + e y + f, taken at pixel centres, to 16.16 fixed point and goes on in integers, so
  the integers here give its very pixels.
  """
  m = np.zeros((len(OPERATIONS), MAGNITUDE_BINS, 2, 6))
  m[..., 0] = m[..., 4] = 1
  sign = np.array([1, -1])
  shear = _SHEAR[:, None] * sign
  m[OPERATIONS.index('shear_x'), ..., 1] = shear
  m[OPERATIONS.index('shear_y'), ..., 3] = shear
  translate = _TRANSLATE[:, None] * sign
  m[OPERATIONS.index('translate_x'), ..., 2] = -translate
  m[OPERATIONS.index('translate_y'), ..., 5] = -translate
  # Image.rotate rounds to 15 places, which makes quarter turns exact.
  angle = -np.radians(_ROTATE[:, None] * sign)
  cos, sin = np.round(np.cos(angle), 15), np.round(np.sin(angle), 15)
  rotated = m[OPERATIONS.index('rotate')]
  rotated[..., 0], rotated[..., 1] = cos, sin
  rotated[..., 2] = w / 2 - cos * w / 2 - sin * h / 2
  rotated[..., 3], rotated[..., 4] = -sin, cos
  rotated[..., 5] = h / 2 + sin * w / 2 - cos * h / 2
  m[..., 2] += (m[..., 0] + m[..., 1]) / 2
  m[..., 5] += (m[..., 3] + m[..., 4]) / 2
  return np.floor(m * 65536 + 0.5).astype(np.int32)


def _affine(grey, operation, magnitude_bin, negative):
  """Moves int32 [h, w, 3] by the map of `_affine_table`: nearest neighbour, 0 outside."""
  h, w, _ = grey.shape
  a, b, c, d, e, f = jnp.asarray(_affine_table(h, w))[operation, magnitude_bin, negative]
  y, x = jnp.arange(h)[:, None], jnp.arange(w)
  source_x = (a * x + b * y + c) >> 16
  source_y = (d * x + e * y + f) >> 16
  inside = (source_x >= 0) & (source_x < w) & (source_y >= 0) & (source_y < h)
  nearest = jnp.where(inside, source_y * w + source_x, 0)
  moved = grey.reshape(h * w, 3).at[nearest].get(mode='promise_in_bounds')
  return jnp.where(inside[..., None], moved, 0)


# ----- Enhancement: brightness, color, contrast, sharpness -------------------------------------


def _factor_table() -> np.ndarray:
  """Returns float32 [31, 2, 2]: the blend factor of each bin and sign, in two halves.

  Pillow rounds factor * difference to float32 before it adds; compilers may fuse the two steps
  and round once, which changes grey levels. With the factor split into twelve bits and a rest,
  both partial products are exact and their sum is the rounded product on every platform.
  """
  factor = (1 + _ENHANCE[:, None] * np.array([1, -1])).astype(np.float32)
  bits = factor.view(np.uint32) & np.uint32(0xFFFFF000)
  high = bits.view(np.float32)
  return np.stack([high, factor - high], axis=-1)


_FACTORS = _factor_table()


def _blend(grey, operation, magnitude_bin, negative):
  """Blends int32 [h, w, 3] with what ImageEnhance calls its degenerate image (Blend.c)."""
  h, w, _ = grey.shape
  r, g, b = grey[..., 0], grey[..., 1], grey[..., 2]
  luma = (19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16  # Convert.c: ITU-R 601
  mean = (2 * luma.sum() + h * w) // (2 * h * w)  # rounded half up
  degenerate = jnp.where(operation == OPERATIONS.index('contrast'), mean, luma)[..., None]
  degenerate = jnp.where(operation == OPERATIONS.index('brightness'), 0, degenerate)
  degenerate = jnp.where(operation == OPERATIONS.index('sharpness'), _smooth(grey), degenerate)
  high, low = jnp.asarray(_FACTORS)[magnitude_bin, negative]
  difference = (grey - degenerate).astype(jnp.float32)
  result = degenerate + (high * difference + low * difference)
  return jnp.clip(result, 0, 255).astype(jnp.int32)  # truncates, as Pillow does


def _smooth(grey):
  """Applies ImageFilter.SMOOTH, (1 1 1, 1 5 1, 1 1 1) / 13 rounded; the border stays as it is."""
  rows = grey[:-2] + grey[1:-1] + grey[2:]
  total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * grey[1:-1, 1:-1]
  return grey.at[1:-1, 1:-1].set(jax.lax.div(total + 6, 13))


# ----- Grey levels: posterize, solarize, autocontrast, equalize --------------------------------


def _map_levels(grey, operation, magnitude_bin):
  """Gives each grey level of int32 [h, w, 3] a new one; every other operation changes nothing."""
  mask = jnp.asarray(256 - 2 ** (8 - _POSTERIZE), jnp.int32)[magnitude_bin]
  threshold = jnp.asarray(np.ceil(_SOLARIZE), jnp.int32)[magnitude_bin]
  result = jnp.where(operation == OPERATIONS.index('posterize'), grey & mask, grey)
  result = jnp.where(
    (operation == OPERATIONS.index('solarize')) & (grey >= threshold), 255 - grey, result
  )
  result = jnp.where(operation == OPERATIONS.index('autocontrast'), _autocontrast(grey), result)
  return jnp.where(operation == OPERATIONS.index('equalize'), _equalize(grey), result)


def _autocontrast(grey):
  """Stretches each channel of int32 [h, w, 3] to 0..255; a channel of one level stays."""
  low, high = grey.min((0, 1)), grey.max((0, 1))
  # A half more than the exact product never reaches the next whole number, and keeps the quotient
  # clear of the one below on devices whose division is not correctly rounded.
  stretched = ((grey - low) * 255 + 0.5) / jnp.maximum(high - low, 1)
  return jnp.where(high > low, stretched.astype(jnp.int32), grey)


def _equalize(grey):
  """Equalizes the histogram of each channel of int32 [h, w, 3] (ImageOps.equalize)."""
  h, w, _ = grey.shape
  # One flat table for the three channels: XLA compiles this scatter twenty times faster on CPU than
  # one per channel. Level v is counted at v + 1, so that the running sum counts what lies below v.
  start = 257 * jnp.arange(3)
  place = grey.reshape(h * w, 3) + start
  counts = jnp.zeros(3 * 257, jnp.int32).at[place + 1].add(1, mode='promise_in_bounds')
  below = counts.reshape(3, 257).cumsum(1).reshape(-1)
  step = below[grey.max((0, 1)) + start] // 255
  rank = below.at[place].get(mode='promise_in_bounds').reshape(h, w, 3) + step // 2
  # rank // step, in vector instructions; the half keeps the quotient clear of whole numbers, so
  # that it is exact for up to two million pixels even where division is not correctly rounded.
  level = ((rank + 0.5) / jnp.maximum(step, 1)).astype(jnp.int32)
  return jnp.where(step > 0, jnp.minimum(level, 255), grey)
