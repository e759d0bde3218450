"""Decoding and evaluation geometry, on pictures made on the spot."""

import concurrent.futures
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image

from cvt_flax.data import images
from cvt_flax.errors import UserError


def picture(height, width, seed=0):
  """A smooth picture with noise, uint8 [height, width, 3]."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:height, :width]
  base = np.stack([255 * x / width, 255 * y / height, 255 * (x + y) / (width + height)], -1)
  return np.clip(base + rng.normal(0, 12, base.shape), 0, 255).astype(np.uint8)


def encoded(image, form='PNG', **options):
  data = io.BytesIO()
  image.save(data, form, **options)
  return data.getvalue()


def decoded(data):
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    image = images.decode(data, 'x.png')
  assert image.mode == 'RGB'
  return np.asarray(image)


@pytest.mark.parametrize('form', ['PNG', 'BMP', 'WEBP', 'TIFF', 'PPM'])
def test_lossless_formats_are_exact(form):
  pixels = picture(13, 17)
  np.testing.assert_array_equal(
    decoded(encoded(Image.fromarray(pixels), form, lossless=True)), pixels
  )


def test_arrays_pass_as_they_are():
  pixels = picture(5, 7)
  np.testing.assert_array_equal(decoded(pixels), pixels)


def test_jpeg_is_what_pillow_decodes():
  data = encoded(Image.fromarray(picture(40, 30)), 'JPEG')
  np.testing.assert_array_equal(decoded(data), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_orientation_is_undone(orientation):
  pixels = picture(6, 9)
  undo = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
  }
  stored = Image.fromarray(pixels)
  if orientation in undo:  # as a camera held that way would store it
    stored = stored.transpose(undo[orientation])
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = orientation
  np.testing.assert_array_equal(decoded(encoded(stored, exif=exif)), pixels)
  jpeg = decoded(encoded(stored, 'JPEG', quality=100, subsampling=0, exif=exif))
  assert np.abs(jpeg.astype(int) - pixels).max() < 12


@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
def test_damaged_exif_does_not_stop_an_image():
  image = Image.fromarray(picture(8, 8))
  data = encoded(image, 'JPEG', exif=b'Exif\x00\x00MM\x00*\x00\x00\xff\xffgarbage')
  assert images.decode(data, 'x').size == (8, 8)


def test_transparency_is_dropped():
  pixels = picture(4, 4)
  alpha = np.array([[0, 80, 160, 255]] * 4, np.uint8)[..., np.newaxis]
  image = Image.fromarray(np.concatenate([pixels, alpha], -1))
  np.testing.assert_array_equal(decoded(encoded(image)), pixels)


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'CMYK'])
def test_every_mode_becomes_rgb_as_torchvision_does(mode):
  image = Image.fromarray(picture(16, 16)).convert(mode)
  form = 'TIFF' if mode == 'CMYK' else 'PNG'
  np.testing.assert_array_equal(decoded(encoded(image, form)), np.asarray(image.convert('RGB')))


def test_palette_with_transparency_keeps_its_colours_and_warns_of_nothing():
  image = Image.fromarray(picture(16, 16)).convert('P')
  data = encoded(image, transparency=bytes(range(256)))
  np.testing.assert_array_equal(decoded(data), np.asarray(image.convert('RGB')))


def test_gif_gives_its_first_frame():
  frames = [Image.fromarray(np.full((4, 4), grey, np.uint8)) for grey in (40, 200)]
  data = encoded(frames[0], 'GIF', save_all=True, append_images=frames[1:])
  np.testing.assert_array_equal(decoded(data), np.full((4, 4, 3), 40))


def test_adobe_cmyk_jpeg_is_not_inverted():
  ink = Image.fromarray(np.full((16, 16, 4), (0, 255, 255, 0), np.uint8), 'CMYK')  # red
  red = decoded(encoded(ink, 'JPEG', quality=100)).reshape(-1, 3).mean(0)
  assert red[0] > 240 and red[1] < 15 and red[2] < 15


@pytest.mark.parametrize('form', ['PNG', 'TIFF', 'PPM'])
def test_sixteen_bit_grey_is_scaled(form):
  grey = np.array([[0, 128, 129, 257, 32768, 65407, 65406, 65535]], np.uint16)
  data = encoded(Image.fromarray(grey), form)
  expected = np.array([0, 0, 1, 1, 128, 255, 254, 255])
  np.testing.assert_array_equal(decoded(data)[0], np.repeat(expected[:, np.newaxis], 3, 1))


@pytest.mark.parametrize('form,keep', [('JPEG', 0.5), ('PNG', 0.5), ('GIF', 0.5), ('WEBP', 0.5)])
def test_truncated_images_are_named(form, keep):
  data = encoded(Image.fromarray(picture(64, 64)), form)
  with pytest.raises(UserError, match='cat.jpg') as error:
    images.decode(data[: int(len(data) * keep)], 'cat.jpg')
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'data', [b'', b'hello', b'\x89PNG\r\n\x1a\n', b'%!PS-Adobe-3.0 EPSF-3.0\n']
)
def test_what_is_not_an_image_is_named(data):
  with pytest.raises(UserError, match='notes.jpg is not an image .allowed: JPEG, PNG'):
    images.decode(data, 'notes.jpg')


def test_damaged_png_is_named():
  data = bytearray(encoded(Image.fromarray(picture(32, 32))))
  data[60:90] = bytes(30)
  with pytest.raises(UserError, match='cannot decode dir/x.png: '):
    images.decode(bytes(data), 'dir/x.png')


def test_decompression_bombs_are_refused():
  header = struct.pack('>IIBBBBB', 20_000, 20_000, 8, 2, 0, 0, 0)

  def chunk(kind, body):
    return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))

  data = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', b'') + chunk(b'IEND', b'')
  with pytest.raises(UserError, match='huge.png is refused as a decompression bomb'):
    images.decode(data, 'huge.png')


@pytest.mark.parametrize(
  'pixels', [np.array([[0.5, 1.5]], np.float32), np.array([[0, 70_000]], np.int32)]
)
def test_pixels_of_unknown_range_are_refused(pixels):
  with pytest.raises(UserError, match='cannot decode depth.tif: .*range is unknown'):
    images.decode(encoded(Image.fromarray(pixels), 'TIFF'), 'depth.tif')


def test_decoding_is_safe_in_threads():
  data = [encoded(Image.fromarray(picture(24, 24, seed)), 'PNG') for seed in range(32)]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(lambda d: np.asarray(images.decode(d, 'x')), data))
  for seed, pixels in enumerate(found):
    np.testing.assert_array_equal(pixels, picture(24, 24, seed))


# What torchvision's Resize(int(size / crop_ratio)) and CenterCrop(size) do: the resized height
# and width, and where the crop starts. Halves are rounded to even, as Python's round does.
TORCHVISION = [
  # height, width, size, crop_ratio, resized, top and left
  (300, 401, 224, 0.875, (256, 342), (16, 59)),
  (401, 300, 224, 0.875, (342, 256), (59, 16)),
  (256, 256, 224, 0.875, (256, 256), (16, 16)),
  (97, 613, 224, 0.875, (256, 1617), (16, 696)),
  (31, 47, 32, 0.875, (36, 54), (2, 11)),
  (100, 103, 32, 1.0, (32, 32), (0, 0)),
  (100, 104, 32, 1.0, (32, 33), (0, 0)),
  (100, 110, 32, 1.0, (32, 35), (0, 2)),
  (1, 9, 33, 1.0, (33, 297), (0, 132)),
]


@pytest.mark.parametrize('height,width,size,crop_ratio,resized,start', TORCHVISION)
def test_resize_and_crop_is_torchvisions(height, width, size, crop_ratio, resized, start):
  image = Image.fromarray(picture(height, width))
  result = images.resize_and_crop(image, size, crop_ratio)
  assert result.dtype == np.uint8
  whole = np.asarray(image.resize(resized[::-1], Image.Resampling.BICUBIC))
  top, left = start
  np.testing.assert_array_equal(result, whole[top : top + size, left : left + size])


def test_programs_may_allow_images_of_any_size(monkeypatch):
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)
  assert images.prepare(encoded(Image.fromarray(picture(8, 9))), '', 4, 1.0).shape == (4, 4, 3)


def test_default_crop_ratio_is_the_official_one():
  image = Image.fromarray(picture(40, 50))
  np.testing.assert_array_equal(
    images.resize_and_crop(image, 28), images.resize_and_crop(image, 28, 0.875)
  )


def test_an_image_of_the_right_size_passes_unchanged():
  pixels = picture(32, 32)
  np.testing.assert_array_equal(images.resize_and_crop(Image.fromarray(pixels), 32, 1.0), pixels)


@pytest.mark.parametrize('crop_ratio', [0.0, -1.0, 1.01])
def test_crop_ratio_is_checked(crop_ratio):
  with pytest.raises(ValueError, match='crop_ratio'):
    images.resize_and_crop(Image.fromarray(picture(8, 8)), 8, crop_ratio)
