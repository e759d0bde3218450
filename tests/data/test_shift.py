"""Shears and translations against Pillow's own, to the byte."""

import numpy as np
import pytest
from PIL import Image
from skimage import data

from cvt_flax.data import shift

OPERATIONS = 'shear_x', 'shear_y', 'translate_x', 'translate_y'


def matrix(operation, amount):
  position = {'shear_x': 1, 'translate_x': 2, 'shear_y': 3, 'translate_y': 5}[operation]
  values = [1, 0, 0, 0, 1, 0]
  values[position] = amount
  return tuple(values)


def assert_equals_pillow(image, operation, amount, fill=(124, 116, 104)):
  moves = matrix(operation, amount)
  expected = image.transform(
    image.size, Image.Transform.AFFINE, moves, Image.Resampling.BICUBIC, fillcolor=fill
  )
  result = shift.transform(image, moves, fill)
  assert (result.mode, result.size) == ('RGB', image.size)
  np.testing.assert_array_equal(
    np.asarray(result), np.asarray(expected), f'{operation} of {image.size} by {amount!r}'
  )


def picture(rng, width, height):
  """A part of a photograph; or noise of all, the two extreme or three close values; or a colour."""
  shape = height, width, 3
  match rng.integers(5):
    case 0:
      return Image.fromarray(data.astronaut()).resize((width, height))
    case 1:
      pixels = rng.integers(256, size=shape)
    case 2:
      pixels = rng.integers(2, size=shape) * 255
    case 3:
      pixels = rng.integers(254, size=3) + rng.integers(3, size=shape)
    case 4:
      pixels = np.broadcast_to(rng.integers(256, size=3), shape)
  return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize('operation', OPERATIONS)
def test_random_images_and_amounts(operation):
  rng = np.random.default_rng(OPERATIONS.index(operation))
  for case in range(500):
    width, height = (int(side) for side in rng.integers(1, 41, size=2))
    if case % 50 == 0:  # of several blocks
      width, height = (int(side) for side in rng.integers(150, 400, size=2))
    greatest = 0.3 if 'shear' in operation else 0.45 * (width if operation[-1] == 'x' else height)
    amount = rng.uniform(-greatest, greatest)
    if case % 3 == 0:  # a result before it is truncated is often a whole number, or nearly
      amount = greatest * rng.integers(-10, 11) / 10
    fill = tuple(int(value) for value in rng.integers(256, size=3))
    assert_equals_pillow(picture(rng, width, height), operation, float(amount), fill)


@pytest.mark.parametrize('operation', OPERATIONS)
@pytest.mark.parametrize('size', [(1, 1), (1, 7), (7, 1), (2, 30), (30, 2), (13, 12)])
def test_amounts_at_the_edges_of_pixels(operation, size):
  image = picture(np.random.default_rng(1), *size)
  amounts = [0.0, 1e-300, 1e-17, 1e-9, 0.25, 0.5, 1.0, 1.5, 3.0, size[0] - 0.5, size[1], 100.0]
  amounts += [np.nextafter(0.5, way) for way in (0, 1)]
  amounts += [np.nextafter(1.0, way) for way in (0, 2)]
  for amount in amounts:
    for signed in amount, -amount:
      assert_equals_pillow(image, operation, float(signed))


@pytest.mark.parametrize('operation', OPERATIONS)
@pytest.mark.parametrize('block', [1, 300, 5000])
def test_blocks_do_not_show(operation, block, monkeypatch):
  monkeypatch.setattr(shift, '_BLOCK', block)
  image = picture(np.random.default_rng(2), 61, 53)
  for amount in (0.29, -0.17) if 'shear' in operation else (21.3, -8.6):
    assert_equals_pillow(image, operation, amount)


def test_the_image_stays_as_it_was_and_its_info_goes_on():
  image = picture(np.random.default_rng(3), 40, 30)
  before = image.tobytes()
  image.info['dpi'] = 72, 72
  for operation in OPERATIONS:
    result = shift.transform(image, matrix(operation, 0.3), (0, 0, 0))
    assert result.info == image.info
  assert image.tobytes() == before
