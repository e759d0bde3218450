"""Images on the host, in Pillow: the same code for training, evaluation and predict.

Pillow, because the official code and timm use it: its antialiased bicubic resize is part of the
numbers that the published weights reach.
"""

import io
import pathlib

import numpy as np
from PIL import ExifTags, Image

from cvt_flax.errors import UserError

# Naming the formats keeps Pillow from trying its exotic plugins (EPS starts Ghostscript) on data
# from strangers. JPEG includes the multi-picture files of phones.
FORMATS = ('JPEG', 'PNG', 'BMP', 'WEBP', 'GIF', 'TIFF', 'PPM')

# What a data set's errors say to who has images that cannot be decoded.
SKIP = '--config.skip_unreadable=true leaves such images out'

# EXIF 2.32, tag 0x0112: what undoes each orientation (1 is upright). Pillow's own
# `ImageOps.exif_transpose` also rewrites the metadata, and fails where these are damaged.
_UPRIGHT = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes | np.ndarray | OSError, name: str) -> Image.Image:
  """Decodes one image to 8-bit RGB, upright.

  Transparency is dropped, not blended, and CMYK is converted without colour profile, as
  torchvision and timm do. 16-bit grey is scaled to 8 bits; of an animation the first frame is
  taken.

  Args:
    data: an encoded image in one of `FORMATS`, or a uint8 array [h, w, 3], taken as it is; or why
      it could not be read.
    name: where the image came from, for the error message.

  Returns:
    A Pillow image of mode 'RGB', upright by its EXIF orientation.

  Raises:
    UserError: it cannot be decoded, is truncated, or is so large (Pillow's limit of 179 million
      pixels) that it is taken for a decompression bomb. The message names the image.
  """
  check_read(data, name)
  if isinstance(data, np.ndarray):
    return Image.fromarray(data)
  try:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
      image.load()
      return _to_rgb(_upright(image))
  except Image.UnidentifiedImageError as error:
    allowed = ', '.join(FORMATS)
    raise UserError(f'{name} is not an image (allowed: {allowed})') from error
  except Image.DecompressionBombError as error:
    raise UserError(f'{name} is refused as a decompression bomb: {error}') from error
  except Exception as error:  # Pillow's plugins raise whatever the damage leads to
    raise UserError(f'cannot decode {name}: {error or type(error).__name__}') from error


def check_read(data: bytes | np.ndarray | OSError, name: str) -> None:
  """Raises a UserError for an image that could not be read; the arguments are `decode`'s."""
  if isinstance(data, OSError):
    raise UserError(f'cannot read {name}: {data.strerror}')


def read_bytes(path: pathlib.Path) -> bytes:
  """Returns what a file holds; one that cannot be read is a UserError that names it."""
  try:
    return path.read_bytes()
  except OSError as e:
    raise UserError(f'{path}: {e.strerror}') from e


def read(path: pathlib.Path, size: int, crop_ratio: float) -> np.ndarray:
  """Reads an image file and `prepare`s it."""
  return prepare(read_bytes(path), str(path), size, crop_ratio)


def prepare(
  data: bytes | np.ndarray | OSError, name: str, size: int, crop_ratio: float
) -> np.ndarray:
  """Decodes an image and gives it the network's size, as the official evaluation does.

  Args:
    data, name: as for `decode`.
    size: height and width of the result, in pixels.
    crop_ratio: as for `resize_and_crop`; 0: `squash`.

  Returns:
    uint8 [size, size, 3].

  Raises:
    UserError: it cannot be decoded, or is so long and thin that it would be resized to more pixels
      than Pillow takes from a file. The message names the image.
  """
  image = decode(data, name)
  if not crop_ratio:
    return squash(image, size)
  try:
    return resize_and_crop(image, size, crop_ratio)
  except ValueError as error:
    raise UserError(f'{name}: {error}') from error


def squash(image: Image.Image, size: int) -> np.ndarray:
  """Resizes to size x size whatever the sides were, as the official evaluation at 384 does.

  Args:
    image: an RGB image of any size.
    size: height and width of the result, in pixels.

  Returns:
    uint8 [size, size, 3], by Pillow's antialiased bicubic filter.
  """
  return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def resize_and_crop(image: Image.Image, size: int, crop_ratio: float = 0.875) -> np.ndarray:
  """The official evaluation geometry: resizes the shorter side, then cuts out the centre.

  The shorter side becomes int(size / crop_ratio), 256 for 224, with Pillow's antialiased bicubic
  filter; rounding is torchvision's `Resize` and `CenterCrop`. An image that is already size x
  size passes unchanged when `crop_ratio` is 1.

  Args:
    image: an RGB image of any size.
    size: height and width of the result, in pixels.
    crop_ratio: the part of the shorter side that the crop keeps, in (0, 1].

  Returns:
    uint8 [size, size, 3].

  Raises:
    ValueError: `crop_ratio` is outside (0, 1], or the image is so long and thin that it would be
      resized to more pixels than `decode` takes from a file.
  """
  if not 0 < crop_ratio <= 1:
    raise ValueError(f'crop_ratio is {crop_ratio}, but must be in (0, 1]')
  width, height = image.size
  shorter = int(size / crop_ratio)
  limit = Image.MAX_IMAGE_PIXELS  # which programs set to None for none
  if limit and shorter**2 * max(width, height) / min(width, height) > 2 * limit:
    raise ValueError(f'{width}x{height} pixels are too thin for a crop of the centre')
  if width <= height:
    width, height = shorter, int(shorter * height / width)
  else:
    width, height = int(shorter * width / height), shorter
  left, top = round((width - size) / 2), round((height - size) / 2)
  # Pillow resizes the width first, then the height, with 8 bits in between. So the columns that the
  # crop leaves out need no height: the same pixels for less.
  image = image.resize((width, image.height), Image.Resampling.BICUBIC)
  image = image.crop((left, 0, left + size, image.height))
  image = image.resize((size, height), Image.Resampling.BICUBIC)
  return np.asarray(image.crop((0, top, size, top + size)))


def _upright(image: Image.Image) -> Image.Image:
  """Returns the image turned as its EXIF orientation says."""
  try:
    orientation = image.getexif().get(ExifTags.Base.Orientation)
  except Exception:  # damaged metadata say nothing about the pixels
    return image
  method = _UPRIGHT.get(orientation)
  return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
  """Returns the image in mode 'RGB'."""
  if image.mode == 'RGB':
    return image  # `convert` would copy it
  if image.mode == 'I' or image.mode.startswith('I;16'):
    image = _grey_16_to_8(image)
  elif image.mode == 'F':
    raise ValueError('it has floating-point pixels, whose range is unknown')
  elif image.mode == 'P' and 'transparency' in image.info:
    image = image.convert('RGBA')  # the same colours, without Pillow's warning
  return image.convert('RGB')


def _grey_16_to_8(image: Image.Image) -> Image.Image:
  """Scales 0..65535 to 0..255, to the nearest; Pillow's own conversion clips or truncates."""
  grey = np.asarray(image).astype(np.int64)
  if grey.min() < 0 or grey.max() > 65535:
    raise ValueError('it has 32-bit pixels outside 0..65535, whose range is unknown')
  return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
