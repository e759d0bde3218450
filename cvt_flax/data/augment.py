"""Augmentation for training on Pillow images, as timm and the official CvT training do it.

The same operations of Pillow in the same order as timm 0.3.2, which the official training pins
(timm/data/transforms.py, timm/data/auto_augment.py), so that the pixels are the same to the byte.
Every image has its own `numpy.random.Generator`, drawn from in timm's order as well.
"""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from cvt_flax.data import images, shift
from cvt_flax.errors import UserError

# timm's increasing set in its order (auto_augment.py, _RAND_INCREASING_TRANSFORMS): more magnitude
# is more change, whatever the operation.
OPERATIONS = (
  'autocontrast',
  'equalize',
  'invert',
  'rotate',
  'posterize',
  'solarize',
  'solarize_add',
  'color',
  'contrast',
  'brightness',
  'sharpness',
  'shear_x',
  'shear_y',
  'translate_x',
  'translate_y',
)
# Those that go in two directions, and so have a magnitude with a sign.
SIGNED = frozenset(OPERATIONS) - {
  'autocontrast',
  'equalize',
  'invert',
  'posterize',
  'solarize',
  'solarize_add',
}
MAX_MAGNITUDE = 10  # auto_augment.py, _MAX_LEVEL

_TRIES = 10  # rectangles that a random crop tries; transforms.py, RandomResizedCropAndInterpolation
_SHIFT_PIXELS = 1 << 13  # of images for which `shift` takes less time than Pillow
_IMAGENET_COLOR = (124, 116, 104)  # round(255 * mean) of ImageNet's (0.485, 0.456, 0.406)

# A section of timm's text: the field, its type, the least and the greatest value.
_SECTIONS = {
  'm': ('magnitude', int, 0, MAX_MAGNITUDE),
  'mstd': ('magnitude_std', float, 0, 10),
  'inc': ('', int, 1, 1),
  'n': ('operations', int, 1, len(OPERATIONS)),
  'p': ('probability', float, 0, 1),
}
_FORM = (
  "allowed is 'rand-m9-mstd0.5-inc1', m a whole number from 0 to 10, mstd from 0 to 10, and "
  "beside them '-n2' (operations an image, 1 to 15) and '-p0.5' (probability of each, 0 to 1)"
)


@dataclasses.dataclass(frozen=True)
class RandAugment:
  """Which operations an image gets: RandAugment (https://arxiv.org/abs/1909.13719), timm's way.

  The defaults are those of the official ImageNet training, 'rand-m9-mstd0.5-inc1'.

  Attributes:
    magnitude: mean of the strength, 0 to 10.
    magnitude_std: standard deviation of the strength, drawn for each operation anew.
    operations: how many are drawn for an image, with replacement.
    probability: of each that was drawn to be applied.
  """

  magnitude: float = 9
  magnitude_std: float = 0.5
  operations: int = 2
  probability: float = 0.5

  @classmethod
  def parse(cls, text: str) -> RandAugment:
    """Reads timm's notation, such as 'rand-m9-mstd0.5-inc1'.

    'inc1' is timm's name of the increasing set of operations, the only one here.

    Args:
      text: 'rand', then sections in any order: m, mstd and inc1 are needed; n and p are 2 and 0.5
        where they are left out.

    Raises:
      UserError: it is something else. The message is one line.
    """
    head, *sections = text.split('-')
    if head != 'rand':
      raise UserError(f"RandAugment {text!r} does not start with 'rand': {_FORM}")
    values = {}
    for section in sections:
      name, number = re.fullmatch(r'([a-z]*)(.*)', section, re.DOTALL).groups()
      value = _section_value(name, number)
      if value is None or name in values:
        raise UserError(f'RandAugment {text!r}: {section!r} is wrong here: {_FORM}')
      values[name] = value
    missing = [name for name in ('m', 'mstd', 'inc') if name not in values]
    if missing:
      raise UserError(f'RandAugment {text!r} lacks {", ".join(missing)}: {_FORM}')
    del values['inc']
    return cls(**{_SECTIONS[name][0]: value for name, value in values.items()})

  def draw(self, rng: np.random.Generator) -> list[tuple[str, float]]:
    """Draws what one image gets.

    Args:
      rng: what is drawn from, in timm's order: all operations; then for each whether it is applied,
        and if so its magnitude and, where it has one, the sign.

    Returns:
      Name and signed magnitude of each operation to apply, in order, as `apply` takes them.
    """
    drawn = []
    for position in rng.integers(len(OPERATIONS), size=self.operations):
      if rng.random() > self.probability:
        continue
      magnitude = self.magnitude + self.magnitude_std * rng.standard_normal()
      magnitude = min(max(magnitude, 0), MAX_MAGNITUDE)
      operation = OPERATIONS[position]
      if operation in SIGNED and rng.random() > 0.5:
        magnitude = -magnitude
      drawn.append((operation, magnitude))
    return drawn


def _section_value(name: str, number: str) -> float | None:
  """Returns the value of a section of timm's notation, None where it is not an allowed one."""
  if name not in _SECTIONS or not re.fullmatch(r'[0-9]{1,9}(\.[0-9]{1,9})?', number):
    return None
  _, of_type, least, greatest = _SECTIONS[name]
  if of_type is int and '.' in number:
    return None
  value = of_type(number)
  return value if least <= value <= greatest else None


def apply(
  image: Image.Image,
  operation: str,
  magnitude: float,
  resample: Image.Resampling = Image.Resampling.BICUBIC,
  fill: tuple[int, int, int] = _IMAGENET_COLOR,
) -> Image.Image:
  """Applies one operation of RandAugment.

  The greatest changes are timm's (auto_augment.py, LEVEL_TO_ARG).

  Args:
    image: an RGB image of any size.
    operation: one of `OPERATIONS`.
    magnitude: strength from 0 to 10, from -10 for those in `SIGNED`; autocontrast, equalize and
      invert have none.
    resample: the filter of the geometric operations. Pillow's bicubic filter is another one here
      (a = -1) than in `resize` (a = -0.5).
    fill: the colour of what these uncover.

  Returns:
    An RGB image of the same size.

  Raises:
    ValueError: there is no such operation.
  """
  level = magnitude / MAX_MAGNITUDE
  match operation:
    case 'autocontrast':
      return ImageOps.autocontrast(image)
    case 'equalize':
      return ImageOps.equalize(image)
    case 'invert':
      return ImageOps.invert(image)
    case 'rotate':  # degrees, counterclockwise
      return image.rotate(level * 30, resample, fillcolor=fill)
    case 'posterize':
      bits = 4 - int(level * 4)
      if not bits:  # Pillow refuses to keep none
        return Image.new(image.mode, image.size)
      return ImageOps.posterize(image, bits)
    case 'solarize':
      return ImageOps.solarize(image, 256 - int(level * 256))
    case 'solarize_add':  # to grey levels below 128; no sum exceeds 255
      add = int(level * 110)
      return image.point([*range(add, add + 128), *range(128, 256)] * 3)
    case 'color':
      return ImageEnhance.Color(image).enhance(1 + level * 0.9)
    case 'contrast':
      return ImageEnhance.Contrast(image).enhance(1 + level * 0.9)
    case 'brightness':
      return ImageEnhance.Brightness(image).enhance(1 + level * 0.9)
    case 'sharpness':
      return ImageEnhance.Sharpness(image).enhance(1 + level * 0.9)
    case 'shear_x':
      matrix = 1, level * 0.3, 0, 0, 1, 0
    case 'shear_y':
      matrix = 1, 0, 0, level * 0.3, 1, 0
    case 'translate_x':
      matrix = 1, 0, level * 0.45 * image.width, 0, 1, 0
    case 'translate_y':
      matrix = 1, 0, 0, 0, 1, level * 0.45 * image.height
    case _:
      raise ValueError(f'operation {operation!r}: not one of {", ".join(OPERATIONS)}')
  if resample == Image.Resampling.BICUBIC and image.width * image.height >= _SHIFT_PIXELS:
    return shift.transform(image, matrix, fill)
  return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=fill)


def color_jitter(
  image: Image.Image, limits: tuple[float, ...], rng: np.random.Generator
) -> Image.Image:
  """Changes brightness, contrast, saturation and hue at random, in random order.

  The semantics are those of torchvision's `ColorJitter` on Pillow images.

  Args:
    image: an RGB image of any size.
    limits: how much brightness, contrast, saturation and, if there are four, hue change at most.
      The first three are multiplied by a factor from max(0, 1 - limit) to 1 + limit; hue is
      shifted by -limit to limit of the whole circle, at most 0.5. 0 changes nothing.
    rng: what is drawn from: the order, then an amount for each.

  Returns:
    An RGB image of the same size.
  """
  order = rng.permutation(len(limits))
  amounts = [_uniform(rng, -min(limit, 1), limit) for limit in limits]
  enhancers = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
  for position in order:
    if not limits[position]:
      continue  # to HSV and back would change pixels even where hue is not shifted
    if position == len(enhancers):
      image = _shift_hue(image, amounts[position])
    else:
      image = enhancers[position](image).enhance(1 + amounts[position])
  return image


def _shift_hue(image: Image.Image, share: float) -> Image.Image:
  """Shifts the hue by a share of the circle, cut to whole steps of its 8 bits towards 0."""
  hue, saturation, value = image.convert('HSV').split()
  shift = int(share * 255)  # the circle has 256 steps; 255 is torchvision's
  hue = hue.point([(level + shift) % 256 for level in range(256)])
  return Image.merge('HSV', (hue, saturation, value)).convert('RGB')


@dataclasses.dataclass(frozen=True)
class Transform:
  """From a decoded training image to what the network is shown, still in 8 bits.

  A crop, resized; a flip; then RandAugment or else colour jitter. The crop is one of four:
  `crop_scale` takes a random part of the image, of random area and aspect; without it `crop_margin`
  squashes the image to a square that is larger by so much and cuts the result out of it anywhere,
  as the official fine-tuning does; with neither, the image is fitted as for evaluation
  (`images.resize_and_crop` by `crop_ratio`, or `images.squash` where that is 0), always bicubic.

  Attributes:
    size: height and width of the result, in pixels.
    crop_scale: least and greatest area of the crop, as shares of the image; () for none. The
      official ImageNet training has (0.08, 1).
    crop_aspect: least and greatest width / height of this crop, uniform in its logarithm.
    crop_margin: pixels.
    crop_ratio: in (0, 1], or 0.
    interpolation: 'bicubic' or 'bilinear', of the random crops and of RandAugment's geometric
      operations, as in timm.
    flip: whether one image in two is mirrored.
    rand_augment: None for none.
    color_jitter: as for `color_jitter`; () for none. Without effect beside `rand_augment`.
    fill: colour of what geometric operations uncover; ImageNet's mean.
  """

  size: int
  crop_scale: tuple[float, ...] = ()
  crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
  crop_margin: int = 0
  crop_ratio: float = 1.0
  interpolation: str = 'bicubic'
  flip: bool = False
  rand_augment: RandAugment | None = None
  color_jitter: tuple[float, ...] = ()
  fill: tuple[int, int, int] = _IMAGENET_COLOR

  def __call__(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Transforms one image.

    Args:
      image: an RGB image of any size.
      rng: what everything is drawn from; all that it has drawn before is part of the result.

    Returns:
      uint8 [size, size, 3], read-only.
    """
    resample = Image.Resampling[self.interpolation.upper()]
    image = self._fit(image, resample, rng)
    if self.flip and rng.random() < 0.5:
      image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if self.rand_augment:
      for operation, magnitude in self.rand_augment.draw(rng):
        image = apply(image, operation, magnitude, resample, self.fill)
    elif self.color_jitter:
      image = color_jitter(image, self.color_jitter, rng)
    return np.asarray(image)

  def _fit(self, image, resample, rng):
    """Returns an image of size x size."""
    if self.crop_scale:
      box = random_box(*image.size, self.crop_scale, self.crop_aspect, rng)
      # Pillow's `resize` would take the box too, but lets its filter look outside.
      return image.crop(box).resize((self.size, self.size), resample)
    if self.crop_margin:
      side = self.size + self.crop_margin
      top, left = rng.integers(self.crop_margin + 1, size=2)
      squashed = image.resize((side, side), resample)
      return squashed.crop((left, top, left + self.size, top + self.size))
    if self.crop_ratio:
      return Image.fromarray(images.resize_and_crop(image, self.size, self.crop_ratio))
    return Image.fromarray(images.squash(image, self.size))


def random_box(
  width: int,
  height: int,
  scale: tuple[float, float],
  aspect: tuple[float, float],
  rng: np.random.Generator,
) -> tuple[int, int, int, int]:
  """Draws the rectangle of a random resized crop.

  A try draws an area and an aspect; the first of ten that fits into the image gets a random place.
  Where none fits, it is the largest rectangle in the middle whose aspect is allowed.

  Args:
    width, height: of the image, in pixels.
    scale: least and greatest area, as shares of the image.
    aspect: least and greatest width / height, uniform in its logarithm.
    rng: what is drawn from: area and aspect of each try, then top, then left.

  Returns:
    left, top, right, bottom, in pixels.
  """
  least, greatest = aspect
  for _ in range(_TRIES):
    area = _uniform(rng, *scale) * (width * height)
    ratio = math.exp(_uniform(rng, math.log(least), math.log(greatest)))
    w = round(math.sqrt(area * ratio))
    h = round(math.sqrt(area / ratio))
    # timm takes a rectangle without pixels too, which is resized to black; torchvision does not.
    if 0 < w <= width and 0 < h <= height:
      top = int(rng.integers(height - h + 1))
      left = int(rng.integers(width - w + 1))
      return left, top, left + w, top + h
  w = min(width, round(height * greatest))
  h = min(height, round(width / least))
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def _uniform(rng: np.random.Generator, least: float, greatest: float) -> float:
  # `rng.uniform` gives the same, but takes several times as long for a single number.
  return least + (greatest - least) * rng.random()
