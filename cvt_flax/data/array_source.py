"""Arrays in memory: an .npz file, scikit-learn's digits."""

import dataclasses
import os
import pathlib
import typing
import zipfile
import zlib

import numpy as np

from cvt_flax.data.dataset import Dataset, Example, Split, sha256, wrong_label
from cvt_flax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySplit(Split):
  """Images in memory, uint8 [N, h, w, 1 or 3]; grey ones are given out with three channels."""

  name: str
  images: np.ndarray
  labels: np.ndarray
  in_memory: typing.ClassVar[bool] = True

  def _read(self, index: int) -> Example:
    image = self.images[index]
    rgb = np.repeat(image, 3 // image.shape[-1], axis=-1)
    return Example(rgb, int(self.labels[index]), index, f'{self.name} #{index}')

  def digest(self) -> str:
    return sha256([str(self.images.shape), self.images, self.labels])


def load_digits() -> Dataset:
  """scikit-learn's 1,797 handwritten digits, at 32x32: 1,257 train, 180 validation, 360 test.

  The split is stratified and the same for every seed, so that results compare.
  """
  from sklearn.datasets import load_digits
  from sklearn.model_selection import train_test_split

  digits = load_digits()
  images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 0..16 in the original
  images = images.repeat(4, axis=1).repeat(4, axis=2)[..., np.newaxis]
  labels = digits.target.astype(np.int32)
  rest, test = train_test_split(
    np.arange(len(labels)), test_size=360, stratify=labels, random_state=0
  )
  train, validation = train_test_split(rest, test_size=180, stratify=labels[rest], random_state=0)
  splits = {'train': train, 'validation': validation, 'test': test}
  return Dataset(
    'digits',
    tuple('0123456789'),
    **{
      split: ArraySplit(f'digits {split}', images[np.sort(where)], labels[np.sort(where)])
      for split, where in splits.items()
    },
  )


_NPZ_KEYS = {
  'train': ('x_train', 'y_train'),
  'validation': ('x_val', 'y_val'),
  'test': ('x_test', 'y_test'),
}


def load_npz(file: str) -> Dataset:
  """Reads arrays from an .npz file; see `load` for what it holds."""
  path = os.path.expanduser(file)
  arrays = _read_npz(path)
  allowed = [key for pair in _NPZ_KEYS.values() for key in pair] + ['class_names']
  for key in arrays:
    if key not in allowed:
      raise UserError(
        f'{path}: unknown key {key!r} (allowed: {", ".join(allowed)}){nearest(key, allowed)}'
      )
  pairs = {}
  for split, (x_key, y_key) in _NPZ_KEYS.items():
    if (x_key in arrays) != (y_key in arrays):
      raise UserError(f'{path}: {x_key} and {y_key} come together, but one is missing')
    if x_key in arrays:
      pairs[split] = _checked_arrays(path, x_key, arrays[x_key], y_key, arrays[y_key])
  if not pairs:
    raise UserError(f'{path} holds no images; wanted are x_train, y_train, x_test and y_test')
  labels = np.concatenate([y for _, y in pairs.values()])
  class_names = _npz_class_names(path, arrays.get('class_names'), labels)
  name = pathlib.Path(path).stem
  splits = {}
  for split, (x, y) in pairs.items():
    wrong = np.flatnonzero((y < 0) | (y >= len(class_names)))
    if wrong.size:
      raise wrong_label(f'{path}: {_NPZ_KEYS[split][1]}[{wrong[0]}]', y[wrong[0]], len(class_names))
    splits[split] = ArraySplit(f'{name} {split}', x, y.astype(np.int32))
  return Dataset(name, class_names, **splits)


def _npz_class_names(path: str, names: np.ndarray | None, labels: np.ndarray) -> tuple[str, ...]:
  """Returns the names given, or else the numbers from 0 to the highest label."""
  if names is None:
    if labels.max() >= len(labels):
      raise UserError(
        f'{path}: labels go up to {labels.max()}, but there are only {len(labels)} '
        'images; number the classes from 0, or give class_names'
      )
    return tuple(str(i) for i in range(int(labels.max()) + 1))
  if names.ndim != 1 or names.dtype.kind != 'U':
    raise UserError(
      f'{path}: class_names is {names.dtype} {list(names.shape)}, but must be strings [K]'
    )
  return tuple(names.tolist())


def _read_npz(path: str) -> dict[str, np.ndarray]:
  try:
    with open(path, 'rb') as file, np.load(file, allow_pickle=False) as arrays:
      return dict(arrays)
  except OSError as error:
    raise UserError(f'cannot read {path}: {error.strerror or error}') from error
  except (TypeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    raise UserError(f'{path} is not an .npz file of plain arrays (no objects)') from error


def _checked_arrays(path, x_key, x, y_key, y) -> tuple[np.ndarray, np.ndarray]:
  """Returns images uint8 [N, h, w, 1 or 3] and labels, integers [N]."""
  if x.ndim == 3:
    x = x[..., np.newaxis]
  if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] not in (1, 3) or 0 in x.shape:
    raise UserError(
      f'{path}: {x_key} is {x.dtype} {list(x.shape)}, but must be uint8 '
      '[N, H, W], [N, H, W, 1] or [N, H, W, 3]'
    )
  if not np.issubdtype(y.dtype, np.integer) or y.shape != x.shape[:1]:
    raise UserError(
      f'{path}: {y_key} is {y.dtype} {list(y.shape)}, but must be integers '
      f'[{len(x)}], one for each image of {x_key}'
    )
  return x, y
