"""predictions.npz: what the best checkpoint of a run makes of every image of a split."""

from __future__ import annotations

import dataclasses
import io
import pathlib
import zipfile
import zlib

import numpy as np

from cvt_flax import storage
from cvt_flax.errors import UserError

# dtypes of the arrays, which are all [n].
ARRAYS = {
  'index': np.int32,
  'label': np.int32,
  'prediction': np.int32,
  'probability': np.float32,
  'label_probability': np.float32,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
  """What a checkpoint makes of every image of a split that could be read.

  Attributes:
    split: 'test', or 'val' where the source has no test split.
    step: of the checkpoint.
    index: int32 [n], `dataset.Example.index`: the place of each image in the split of its source.
    label: int32 [n], the true class.
    prediction: int32 [n], the most probable class.
    probability: float32 [n], of the prediction.
    label_probability: float32 [n], of the true class.
  """

  split: str
  step: int
  index: np.ndarray
  label: np.ndarray
  prediction: np.ndarray
  probability: np.ndarray
  label_probability: np.ndarray

  def __len__(self) -> int:
    return len(self.index)

  @property
  def hits(self) -> np.ndarray:
    """bool [n], whether the prediction is right."""
    return self.prediction == self.label

  def save(self, path: pathlib.Path) -> None:
    """Writes the file, which appears when it is whole."""
    data = io.BytesIO()
    np.savez_compressed(data, **dataclasses.asdict(self))
    storage.write_whole(path, data.getvalue())


def read(path: pathlib.Path) -> Predictions | None:
  """Returns the predictions in a file; None where there is none.

  Raises:
    UserError: it is damaged.
  """
  if not path.exists():
    return None
  try:
    with path.open('rb') as opened, np.load(opened) as file:
      arrays = {name: np.asarray(file[name], dtype) for name, dtype in ARRAYS.items()}
      split, step = str(file['split']), int(file['step'])
  except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as e:
    raise UserError(f'{path} is damaged: {e or type(e).__name__}') from e
  if len({x.shape for x in arrays.values()}) != 1 or arrays['index'].ndim != 1:
    raise UserError(f'{path} is damaged: its arrays are not of one length')
  return Predictions(split, step, **arrays)
