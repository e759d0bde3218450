"""Every operation of TrivialAugment against Pillow itself."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from sklearn import datasets

from cvt_flax.data import trivial_augment

SIZES = [(32, 32), (24, 40), (33, 17), (2, 5)]  # height, width
CASES = [
  (operation, magnitude_bin, negative)
  for operation in range(14)
  for magnitude_bin in range(31)
  for negative in range(2)
]
apply = jax.jit(trivial_augment.apply)


def pillow(image: np.ndarray, name: str, magnitude_bin: int, negative: int) -> np.ndarray:
  """What torchvision's TrivialAugmentWide makes of a Pillow image, in calls to Pillow.

  The conventions were read from torchvision 0.28 (transforms/autoaugment.py: the ranges, and
  `_apply_op`; transforms/functional.py: `affine`, `_get_inverse_affine_matrix`, `rotate`). A
  shear by level is `affine` with the shear angle atan(level) about (0, 0), a translation one by
  whole pixels, both given to Pillow as the inverse map; a rotation is Pillow's own. The levels
  are rounded correctly here; torchvision's (torch.linspace, float32) are off by one unit in the
  last place for some bins, and by processor.
  """
  source = Image.fromarray(image)
  level = magnitude_bin / 30
  sign = -1 if negative else 1

  def affine(a, b, c, d, e, f):
    return source.transform(
      source.size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.NEAREST,
      fillcolor=(0, 0, 0),
    )  # fmt: skip

  if name == 'identity':
    result = source
  elif name == 'shear_x':
    result = affine(1, math.tan(math.atan(sign * 0.99 * level)), 0, 0, 1, 0)
  elif name == 'shear_y':
    result = affine(1, 0, 0, math.tan(math.atan(sign * 0.99 * level)), 1, 0)
  elif name == 'translate_x':
    result = affine(1, 0, -int(sign * 32 * level), 0, 1, 0)
  elif name == 'translate_y':
    result = affine(1, 0, 0, 0, 1, -int(sign * 32 * level))
  elif name == 'rotate':
    result = source.rotate(sign * 135 * level, Image.Resampling.NEAREST, fillcolor=(0, 0, 0))
  elif name in ('brightness', 'color', 'contrast', 'sharpness'):
    enhancer = getattr(ImageEnhance, name.capitalize())(source)
    result = enhancer.enhance(1 + sign * float(np.float32(0.99 * level)))
  elif name == 'posterize':
    result = ImageOps.posterize(source, 8 - round(6 * level))
  elif name == 'solarize':
    result = ImageOps.solarize(source, 255 - 255 * level)
  else:
    result = getattr(ImageOps, name)(source)
  return np.asarray(result)


def pictures(h: int, w: int) -> np.ndarray:
  """Returns uint8 [5, h, w, 3]: noise, a photograph, a faint one, few levels, a single colour."""
  random = np.random.default_rng(h * 100 + w)
  noise = random.integers(0, 256, (h, w, 3))
  photograph = datasets.load_sample_image('china.jpg')[150:][:h, 300:][:, :w]
  faint = photograph // 3 + np.array([20, 90, 150])
  few = random.choice([7, 8, 200], (h, w, 3))
  plain = np.full((h, w, 3), [0, 77, 255])
  return np.stack([noise, photograph, faint, few, plain]).astype(np.uint8)


@pytest.mark.parametrize('size', SIZES, ids=lambda size: '{}x{}'.format(*size))
def test_every_operation_bin_and_sign_equals_pillow(size):
  images = pictures(*size)
  over_cases = jax.vmap(trivial_augment.apply, (None, 0, 0, 0))
  everything = jax.jit(jax.vmap(over_cases, (0, None, None, None)))
  results = np.asarray(everything(images, *jnp.array(CASES).T)).astype(int)
  wrong = collections.Counter()
  for image, of_image in zip(images, results, strict=True):
    for (operation, magnitude_bin, negative), result in zip(CASES, of_image, strict=True):
      name = trivial_augment.OPERATIONS[operation]
      expected = pillow(image, name, magnitude_bin, negative)
      # Pillow's autocontrast rounds in double precision; the next test has its exact values.
      allowed = 1 if name == 'autocontrast' else 0
      wrong[name] += int((abs(result - expected) > allowed).sum())
  assert not +wrong


def test_autocontrast_is_the_exact_quotient():
  image = pictures(32, 32)[2]
  result = apply(image, trivial_augment.OPERATIONS.index('autocontrast'), 0, 0)
  low, high = image.min((0, 1)).astype(int), image.max((0, 1)).astype(int)
  np.testing.assert_array_equal(result, (image - low) * 255 // (high - low))


def test_every_operation_moves_some_pixel():
  """The comparison above would pass on tables of identities if Pillow's calls were wrong too."""
  image = pictures(32, 32)[2]
  for operation, name in enumerate(trivial_augment.OPERATIONS):
    changed = np.any(apply(image, operation, 30, 0) != image)
    assert changed == (name != 'identity'), name


def test_draws_are_uniform_over_operations_bins_and_signs():
  image = pictures(32, 32)[1]
  outcomes = jax.jit(jax.vmap(trivial_augment.apply, (None, 0, 0, 0)))(image, *jnp.array(CASES).T)
  share = collections.Counter(outcome.tobytes() for outcome in np.asarray(outcomes))
  draws = 6000
  keys = jax.random.split(jax.random.key(5), draws)
  results = jax.jit(jax.vmap(trivial_augment.trivial_augment, (0, None)))(keys, image)
  counts = collections.Counter(result.tobytes() for result in np.asarray(results))
  assert set(counts) <= set(share)
  expected = np.array([share[outcome] for outcome in share]) * draws / len(CASES)
  observed = np.array([counts[outcome] for outcome in share])
  chi_squared = ((observed - expected) ** 2 / expected).sum()
  freedom = len(share) - 1
  assert abs(chi_squared - freedom) < 4 * math.sqrt(2 * freedom)


def test_one_image_does_not_depend_on_its_batch():
  images = jnp.asarray(pictures(24, 40))
  keys = jax.random.split(jax.random.key(1), len(images))
  together = jax.jit(jax.vmap(trivial_augment.trivial_augment))(keys, images)
  alone = jax.jit(trivial_augment.trivial_augment)
  for key, image, expected in zip(keys, images, together, strict=True):
    np.testing.assert_array_equal(alone(key, image), expected)


@pytest.mark.parametrize('image', [np.zeros((8, 8, 3), np.float32), np.zeros((8, 8, 1), np.uint8)])
def test_other_images_are_refused(image):
  with pytest.raises(ValueError, match='uint8'):
    trivial_augment.apply(image, 0, 0, 0)
