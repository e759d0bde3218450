"""JPEGs to load: made of photographs that packages bring along, or found in a folder."""

import importlib.resources
import io
import pathlib
import statistics
import sys

import numpy as np
from PIL import Image

# The photographs in the wheels of scikit-image and scikit-learn, and the quality at which cuts of
# them at the sizes of ImageNet have the mean of ImageNet's bytes, 110 kB.
SKIMAGE_FILES = (
  'astronaut.png',
  'chelsea.png',
  'coffee.png',
  'hubble_deep_field.jpg',
  'ihc.png',
  'motorcycle_left.png',
  'motorcycle_right.png',
  'retina.jpg',
  'rocket.jpg',
)
SKLEARN_FILES = ('china.jpg', 'flower.jpg')
SIZES = ((500, 375), (500, 375), (500, 333), (375, 500))
QUALITY = 98


def make(folder, count):
  """Writes `count` JPEGs like ImageNet's in size and bytes: cuts of photographs, some mirrored."""
  from sklearn import datasets

  from cvt_flax.data import augment

  data = importlib.resources.files('skimage') / 'data'
  photographs = [Image.open(io.BytesIO((data / name).read_bytes())) for name in SKIMAGE_FILES]
  photographs += [Image.fromarray(datasets.load_sample_image(name)) for name in SKLEARN_FILES]
  rng = np.random.default_rng(0)
  for number in range(count):
    photograph = photographs[number % len(photographs)]
    width, height = SIZES[rng.integers(len(SIZES))]
    aspect = (width / height, width / height)
    box = augment.random_box(*photograph.size, (0.6, 1.0), aspect, rng)
    image = photograph.crop(box).resize((width, height), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
      image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image.save(folder / f'{number:04}.jpg', quality=QUALITY)


def find(folder, least, most):
  """Returns the paths of JPEGs below a folder, at most `most`, spread over all there are.

  Where there are fewer than `least`, which is a batch, this program ends.
  """
  paths = sorted(
    str(path.absolute())
    for path in pathlib.Path(folder).rglob('*')
    if path.suffix.lower() in ('.jpg', '.jpeg')
  )
  if len(paths) < least:
    sys.exit(f'{len(paths)} JPEGs below {folder}, which do not make a batch of {least}')
  places = np.linspace(0, len(paths) - 1, min(len(paths), most)).astype(int)
  return [paths[place] for place in places]


def describe(paths):
  """Returns number and mean size of the images, all of which are read: no disk is measured."""
  data = [pathlib.Path(path).read_bytes() for path in paths]
  width, height = np.mean([Image.open(io.BytesIO(each)).size for each in data], axis=0)
  return {
    'images': len(paths),
    'bytes': statistics.mean(map(len, data)),
    'width': float(width),
    'height': float(height),
  }
