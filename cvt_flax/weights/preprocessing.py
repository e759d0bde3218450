"""From a picture to what a model was trained on, as numbers that travel with its weights."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping

from cvt_flax.errors import UserError

# torchvision's numbers for ImageNet, which the authors use.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Above this size the authors, and transformers' ConvNextImageProcessor, squash.
_SQUASHED_FROM = 384


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """How an image is made what the network takes.

  Attributes:
    image_size: height and width, in pixels.
    crop_ratio: the shorter side is resized to int(image_size / crop_ratio), then the centre is cut
      out; 0: the image is squashed to image_size x image_size, whatever its sides.
    mean, std: of the pixels, 0 to 1, a channel.
  """

  image_size: int = 224
  crop_ratio: float = 0.875
  mean: tuple[float, float, float] = IMAGENET_MEAN
  std: tuple[float, float, float] = IMAGENET_STD


def official(image_size: int) -> Preprocessing:
  """Returns the authors' evaluation at a size: centre crop, or squashed from 384 pixels on."""
  return Preprocessing(image_size, 0.0 if image_size >= _SQUASHED_FROM else 0.875)


def from_file_name(path: pathlib.Path) -> Preprocessing | None:
  """Returns the authors' evaluation at the size in a name like CvT-13-384x384-IN-1k.pth."""
  found = re.search(r'(?<!\d)(\d{2,4})x\1(?!\d)', path.name)
  return official(int(found[1])) if found else None


def to_json(p: Preprocessing) -> dict:
  """Returns preprocessor_config.json, in the words of transformers' ConvNextImageProcessor.

  It has no word for whether an image is squashed: it squashes from 384 pixels on. Ours is
  'squash', which it ignores.
  """
  return {
    'image_processor_type': 'ConvNextImageProcessor',
    'do_resize': True,
    'size': {'shortest_edge': p.image_size},
    'crop_pct': p.crop_ratio or 1.0,
    'squash': not p.crop_ratio,
    'resample': 3,
    'do_rescale': True,
    'rescale_factor': 1 / 255,
    'do_normalize': True,
    'image_mean': list(p.mean),
    'image_std': list(p.std),
  }


def from_json(config: Mapping, where: str) -> Preprocessing:
  """Returns what a preprocessor_config.json says.

  Raises:
    UserError: it is damaged, or asks for what is not done here.
  """
  size = config.get('size', 224)
  if isinstance(size, Mapping):
    sides = set(size.values())
    size = sides.pop() if len(sides) == 1 else size
  if type(size) is not int or not 1 <= size <= 10_000:
    raise UserError(f'{where}: size={config.get("size")!r}: one number of pixels is needed')
  for key, needed in (('do_resize', True), ('do_rescale', True), ('do_normalize', True)):
    if config.get(key, needed) != needed:
      raise UserError(f'{where}: {key}={config[key]!r}: only {needed!r} is done here')
  if config.get('resample', 3) != 3:
    raise UserError(f'{where}: resample={config["resample"]!r}: only 3, bicubic, is done here')
  crop = config.get('crop_pct', 224 / 256)
  values = [
    tuple(config.get(key, default))
    for key, default in (('image_mean', IMAGENET_MEAN), ('image_std', IMAGENET_STD))
    if isinstance(config.get(key, default), list | tuple)
  ]
  numbers = [crop, *(x for value in values for x in value)]
  if [len(v) for v in values] != [3, 3] or not all(type(x) in (int, float) for x in numbers):
    raise UserError(f'{where}: image_mean and image_std need three numbers each, crop_pct one')
  if not 0.1 <= crop <= 1 or min(values[1]) <= 0:
    raise UserError(f'{where}: crop_pct from 0.1 to 1 and image_std above 0 are needed')
  squash = bool(config.get('squash', size >= _SQUASHED_FROM))
  return Preprocessing(size, 0.0 if squash else float(crop), *values)


def check_huggingface(p: Preprocessing) -> None:
  """Raises a UserError when transformers' image processor would cut out something else."""
  squash = p.image_size >= _SQUASHED_FROM
  if squash != (not p.crop_ratio):
    raise UserError(
      f"the layout 'huggingface' cannot hold this preprocessing: transformers "
      f'{"squashes" if squash else "crops"} images of {p.image_size} pixels, this model wants '
      f'them {"cropped" if squash else "squashed"}'
    )
