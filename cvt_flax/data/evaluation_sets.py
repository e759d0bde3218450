"""Other test sets for a model that is trained: ImageNet-V2, -A, -R, -Sketch, ReaL, one's own.

What they have in common is class names, so labels are matched by name: the same class often has
another number (TFDS's imagenet_resized has ImageNet's classes in an order of its own).
"""

import dataclasses
import os
import re
from collections.abc import Sequence

import numpy as np

from cvt_flax.data import sources
from cvt_flax.data.dataset import Example, Split, sha256
from cvt_flax.errors import UserError, nearest

# TFDS gives these all 1,000 classes of ImageNet, but they have images of 200, and the authors let
# only those compete: https://github.com/hendrycks/natural-adv-examples (eval.py) and
# https://github.com/hendrycks/imagenet-r (eval.py).
_OCCURRING_CLASSES_ONLY = ('imagenet_a', 'imagenet_r')


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluationSet:
  """Images to score a model on.

  Attributes:
    name: for the names of metrics and files, as `set_name` gives it.
    split: the images; labels are the model's classes.
    classes: bool [K], which of the model's classes compete; None when all do.
  """

  name: str
  split: Split
  classes: np.ndarray | None


def set_name(source: str) -> str:
  """Returns the name of an evaluation set, of letters, digits, '_', '-' and '.'.

  It is 'imagenet_v2_topimages' for 'tfds:imagenet_v2/topimages', and for files the last part of
  their path, without .csv or .npz. So two sources may have the same name.
  """
  kind, _, where = source.partition(':')
  if kind in ('folder', 'csv', 'npz'):
    where = os.path.basename(os.path.abspath(os.path.expanduser(where)))
    where = where.removesuffix(f'.{kind}')
  return re.sub(r'[^A-Za-z0-9_.-]+', '_', where or source)


def load(source: str, *, data_dir: str, class_names: Sequence[str]) -> EvaluationSet:
  """Opens a source to score a model on: its test split, else validation, else train.

  Only the classes that the source has compete, so that a model of 1,000 classes can be scored on
  ten of them. For `imagenet_a` and `imagenet_r` of TFDS these are the classes of which there are
  images, which takes reading the set once. In `imagenet2012_real` an image has several labels, or
  none.

  Args:
    source: as for `sources.load`.
    data_dir: likewise.
    class_names: the model's, in the order of its logits.

  Raises:
    UserError: the source cannot be opened, or has a class that the model does not have.
  """
  data = sources.load(source, data_dir=data_dir, holdout=0)
  # Every source has one of them, or says that it has none.
  split = next(s for s in (data.test, data.validation, data.train) if s is not None)
  competing = range(len(data.class_names))
  if source.startswith('tfds:') and data.name in _OCCURRING_CLASSES_ONLY:
    competing = np.unique(split.labels).tolist()
  number_of = {name: number for number, name in enumerate(class_names)}
  numbers = np.full(len(data.class_names), -1, np.int32)
  for cls in competing:
    name = data.class_names[cls]
    if name not in number_of:
      raise UserError(
        f'{source} has the class {name!r}, which is not one of the {len(number_of)} of the model'
        f'{nearest(name, number_of)}'
      )
    numbers[cls] = number_of[name]
  classes = np.isin(np.arange(len(class_names)), numbers)
  return EvaluationSet(
    set_name(source), _Renumbered(split.name, split, numbers), None if classes.all() else classes
  )


@dataclasses.dataclass(frozen=True, eq=False)
class _Renumbered(Split):
  """Another split, with other numbers for its classes."""

  name: str
  split: Split
  numbers: np.ndarray  # int32 [classes of the split]

  @property
  def labels(self) -> np.ndarray:
    return self.numbers[self.split.labels]

  @property
  def multi_label(self) -> bool:
    return self.split.multi_label

  @property
  def in_memory(self) -> bool:
    return self.split.in_memory

  def digest(self) -> str:
    return sha256([self.split.digest(), self.numbers])

  def __len__(self) -> int:
    return len(self.split)

  def name_of(self, index: int) -> str:
    return self.split.name_of(index)

  def _read(self, index: int) -> Example:
    return self._renumbered(self.split[index])

  def __getitems__(self, indices: Sequence[int]) -> list[Example]:
    return [self._renumbered(example) for example in self.split.__getitems__(indices)]

  def _renumbered(self, example: Example) -> Example:
    labels = example.labels
    return dataclasses.replace(
      example,
      label=int(self.numbers[example.label]),
      labels=None if labels is None else tuple(int(self.numbers[cls]) for cls in labels),
    )
