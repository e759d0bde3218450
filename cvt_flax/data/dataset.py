"""What a data set is: splits of examples, read at random."""

import abc
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from cvt_flax.errors import UserError

SPLIT_NAMES = {
  'train': ('train', 'training'),
  'validation': ('validation', 'val', 'valid'),
  'test': ('test', 'evaluation'),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
  """One image with its label.

  Attributes:
    image: an encoded image, or its pixels, uint8 [h, w, 3]. An OSError where there is none: a file
      that is gone is an image that cannot be decoded.
    label: the class, from 0.
    index: the position in the source's own split; it stays the same when images are held out.
    name: where the image comes from, for error messages: a path, or 'cifar10 train #17'.
    labels: every class that counts as right, which may be none at all; None where there is just
      `label`.
  """

  image: bytes | np.ndarray | OSError
  label: int
  index: int
  name: str
  labels: tuple[int, ...] | None = None


class Split(abc.ABC):
  """A random-access sequence of examples, picklable and safe to read from many threads.

  Attributes:
    name: what it is, for messages, as in 'cifar10 train'.
    labels: the labels of all examples in order, int32 [N]. To ask a TFDS split for them is to read
      all of it once.
    multi_label: whether examples have `Example.labels`.
    in_memory: whether pixels are there already, and not to be read and decoded.
  """

  name: str
  labels: np.ndarray
  multi_label: bool = False
  in_memory: bool = False

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, index: int) -> Example:
    """Returns one example; raises UserError when it cannot be read."""
    if not 0 <= index < len(self):
      raise IndexError(f'{self.name} has {len(self)} examples, none is #{index}')
    return self._read(int(index))

  def __getitems__(self, indices: Sequence[int]) -> list[Example]:
    """Returns many examples, which some sources read faster together than one by one."""
    return [self[i] for i in indices]

  def name_of(self, index: int) -> str:
    """Returns what the example of that `Example.index` is called, as `Example.name`."""
    return f'{self.name} #{index}'

  @abc.abstractmethod
  def _read(self, index: int) -> Example:
    """Returns the example at `index`, which exists."""

  def digest(self) -> str:
    """Returns a SHA-256 in hex that tells which images and labels these are, in which order.

    It is another one when images are added, removed, renamed or relabelled, as far as that shows
    without reading them; here, in the labels.
    """
    return sha256([self.labels])

  def __iter__(self) -> Iterator[Example]:
    for start in range(0, len(self), 256):
      yield from self.__getitems__(range(start, min(start + 256, len(self))))


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """A data set, with validation images that are in neither train nor test.

  Attributes:
    name: its name, for messages.
    class_names: the name of each label.
    train: what to train on, None when the source has no such split.
    validation: what to choose models by; None when the source has none and nothing is held out.
    test: what to report, with labels; None when the source has none.
    held_out: int32, sorted: where in the source's own train split the validation images are.
      Empty when the source brings a validation split of its own, or nothing is held out.
    held_out_test: likewise, where the test images are.
    repeats: how many places of train hold an image that another one holds, as far as that is known.
  """

  name: str
  class_names: tuple[str, ...]
  train: Split | None = None
  validation: Split | None = None
  test: Split | None = None
  held_out: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
  held_out_test: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
  repeats: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Subset(Split):
  """Some examples of another split, which keep their index there."""

  name: str
  split: Split
  indices: np.ndarray  # int32 [N]

  @property
  def labels(self) -> np.ndarray:
    return self.split.labels[self.indices]

  @property
  def multi_label(self) -> bool:
    return self.split.multi_label

  @property
  def in_memory(self) -> bool:
    return self.split.in_memory

  def digest(self) -> str:
    return sha256([self.split.digest(), self.indices])

  def __len__(self) -> int:
    return len(self.indices)

  def name_of(self, index: int) -> str:
    return self.split.name_of(index)

  def _read(self, index: int) -> Example:
    return self.split[self.indices[index]]

  def __getitems__(self, indices: Sequence[int]) -> list[Example]:
    return self.split.__getitems__(self.indices[list(indices)].tolist())


def sha256(parts: Iterable[str | bytes | np.ndarray]) -> str:
  """Returns the SHA-256, in hex, of texts, bytes and the contents of arrays, kept apart."""
  digest = hashlib.sha256()
  for part in parts:
    part = part.encode() if isinstance(part, str) else part
    data = memoryview(np.ascontiguousarray(part) if isinstance(part, np.ndarray) else part)
    digest.update(data.nbytes.to_bytes(8, 'little'))
    digest.update(data.cast('B'))
  return digest.hexdigest()


def wrong_label(where: str, label: int, classes: int) -> UserError:
  return UserError(
    f'{where}: label {label} is not one of the {classes} classes, 0 to {classes - 1}'
  )
