"""Pictures that are there without a download."""

from __future__ import annotations

import pathlib
import zipfile

import numpy as np
import sklearn.datasets
from PIL import Image


def sample_images() -> list[pathlib.Path]:
  """Returns the paths of the two photographs that come with scikit-learn."""
  folder = pathlib.Path(sklearn.datasets.__file__).parent / 'images'
  return [folder / 'china.jpg', folder / 'flower.jpg']


def write_sample_archive(path: str | pathlib.Path, count: int = 60, side: int = 160) -> None:
  """Writes a zip of two folders of pictures, cut at random from `sample_images`.

  Args:
    path: of the zip; there may be one.
    count: of pictures for each folder.
    side: of the pictures, in pixels.
  """
  rng = np.random.default_rng(0)
  with zipfile.ZipFile(path, 'w') as archive:
    for source in sample_images():
      with Image.open(source) as photograph:
        corners = rng.integers((photograph.width - side, photograph.height - side), size=(count, 2))
        for i, (left, top) in enumerate(corners.tolist()):
          piece = photograph.crop((left, top, left + side, top + side))
          with archive.open(f'{source.stem}/{i:03}.png', 'w') as file:
            piece.save(file, 'PNG')
