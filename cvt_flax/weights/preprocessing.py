"""From a picture to what a model was trained on, as numbers that travel with its weights."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping

from cvt_flax.errors import UserError

# torchvision's numbers for ImageNet, which the authors use.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Above this size the authors, and transformers' ConvNextImageProcessor, squash.
_SQUASHED_FROM = 384
_LARGEST = 8192  # pixels
# The image processors of transformers that do what is done here: ConvNeXt's, whatever its name.
_PROCESSORS = ('ConvNextImageProcessor', 'ConvNextImageProcessorFast', 'ConvNextFeatureExtractor')


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """How an image is made what the network takes.

  Attributes:
    image_size: height and width, in pixels.
    crop_ratio: the shorter side is resized to int(image_size / crop_ratio), then the centre is cut
      out; 0: the image is squashed to image_size x image_size, whatever its sides.
    mean, std: of the pixels, 0 to 1, a channel.

  Raises:
    UserError: one of them is out of range.
  """

  image_size: int = 224
  crop_ratio: float = 0.875
  mean: tuple[float, float, float] = IMAGENET_MEAN
  std: tuple[float, float, float] = IMAGENET_STD

  def __post_init__(self):
    if type(self.image_size) is not int or not 1 <= self.image_size <= _LARGEST:
      raise UserError(f'image_size={self.image_size!r}: 1 to {_LARGEST} pixels are needed')
    if not _is_number(self.crop_ratio) or not (self.crop_ratio == 0 or 0.1 <= self.crop_ratio <= 1):
      raise UserError(f'crop_ratio={self.crop_ratio!r}: from 0.1 to 1, or 0 to squash, is needed')
    for name, values in (('mean', self.mean), ('std', self.std)):
      if len(values) != 3 or not all(_is_number(x) and abs(x) <= 1000 for x in values):
        raise UserError(f'{name}={values!r}: three numbers are needed')
    if min(self.std) <= 0:
      raise UserError(f'std={self.std!r}: numbers above 0 are needed')


def _is_number(x):
  return type(x) in (int, float) and math.isfinite(x)


def official(image_size: int) -> Preprocessing:
  """Returns the authors' evaluation at a size: centre crop, or squashed from 384 pixels on."""
  return Preprocessing(image_size, 0.0 if image_size >= _SQUASHED_FROM else 0.875)


def from_file_name(path: pathlib.Path) -> Preprocessing | None:
  """Returns the authors' evaluation at the size in a name like CvT-13-384x384-IN-1k.pth."""
  found = re.search(r'(?<!\d)([1-9]\d{1,3})x\1(?!\d)', path.name)
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
  """Returns what a preprocessor_config.json says; what it leaves out is the authors'.

  Raises:
    UserError: it is damaged, or asks for what is not done here.
  """
  if not isinstance(config, Mapping):
    raise UserError(f'{where}: an object is needed')
  kind = config.get('image_processor_type') or config.get('feature_extractor_type')
  for key, value, allowed in (
    ('image_processor_type', kind, (None, *_PROCESSORS)),
    ('do_resize', config.get('do_resize', True), (True,)),
    ('do_rescale', config.get('do_rescale', True), (True,)),
    ('do_normalize', config.get('do_normalize', True), (True,)),
    ('resample', config.get('resample', 3), (3,)),
    ('rescale_factor', config.get('rescale_factor', 1 / 255), (1 / 255,)),
  ):
    if value not in allowed:
      raise UserError(f'{where}: {key}={value!r}: only {allowed[-1]!r} is done here')
  size = config.get('size', 224)
  if isinstance(size, Mapping) and len(size) == 1:
    size = size.get('shortest_edge')
  if type(size) is not int:
    raise UserError(f'{where}: size={config.get("size")!r}: one number of pixels is needed')
  squash = config.get('squash', size >= _SQUASHED_FROM)
  crop = config.get('crop_pct')
  crop = 224 / 256 if crop is None else crop  # as transformers has it
  mean, std = config.get('image_mean', IMAGENET_MEAN), config.get('image_std', IMAGENET_STD)
  if not crop:
    raise UserError(f'{where}: crop_pct={crop!r}: from 0.1 to 1 is needed')
  if type(squash) is not bool or not all(isinstance(v, list | tuple) for v in (mean, std)):
    raise UserError(f'{where}: squash is true or false, image_mean and image_std are lists')
  try:
    known = Preprocessing(size, crop, tuple(mean), tuple(std))
  except UserError as e:
    raise UserError(f'{where}: {e}') from e
  return dataclasses.replace(known, crop_ratio=0.0) if squash else known


def check_huggingface(p: Preprocessing) -> None:
  """Raises a UserError when transformers' image processor would cut out something else."""
  squash = p.image_size >= _SQUASHED_FROM
  if squash != (not p.crop_ratio):
    raise UserError(
      f"the layout 'huggingface' cannot hold this preprocessing: transformers "
      f'{"squashes" if squash else "crops"} images of {p.image_size} pixels, this model wants '
      f'them {"cropped" if squash else "squashed"}'
    )
