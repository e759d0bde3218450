"""Images in files of their own, with as little memory a name as makes 14 million of them no matter.

Names repeat each other (n01440764/n01440764_10026.JPEG), so they are kept in compressed blocks:
a few bytes a name of ImageNet, in place of 30, and of more as a Python string. Every process that
reads a split has its own copy.
"""

import dataclasses
import errno
import itertools
import os
import pathlib
import zlib
from collections.abc import Iterable

import numpy as np

from cvt_flax.data.dataset import Example, Split, sha256

_BLOCK = 64  # names: to look one up is quick, and larger blocks are hardly smaller
# What makes a file an image that cannot be decoded; other errors are of what it lies on.
_OF_THE_FILE = {
  errno.ENOENT,
  errno.EACCES,
  errno.EPERM,
  errno.EISDIR,
  errno.ENOTDIR,
  errno.ELOOP,
  errno.ENAMETOOLONG,
}


class NamePacker:
  """Takes file names one after the other and makes blocks of them."""

  def __init__(self):
    self._blocks, self._names = [], []

  def extend(self, names: Iterable[str]) -> None:
    """Appends names, which hold no NUL, as no file name does."""
    for name in names:
      self._names.append(os.fsencode(name))  # so that any name comes back, UTF-8 or not
      if len(self._names) == _BLOCK:
        self._close_block()

  def finish(self) -> tuple[bytes, ...]:
    """Returns the blocks: `_BLOCK` names each, and in the last one the rest."""
    if self._names:
      self._close_block()
    return tuple(self._blocks)

  def _close_block(self):
    self._blocks.append(zlib.compress(b'\0'.join(self._names)))
    self._names.clear()


@dataclasses.dataclass(frozen=True, eq=False)
class FileSplit(Split):
  """Image files, read when asked for.

  Attributes:
    name: as for every split.
    root: the folder that file names are relative to.
    blocks: the file names, from a `NamePacker`; absolute ones stand for themselves.
    labels: int32 [N].
  """

  name: str
  root: str
  blocks: tuple[bytes, ...]
  labels: np.ndarray

  def path(self, index: int) -> str:
    """Returns the path of the file at `index`."""
    block, place = divmod(index, _BLOCK)
    name = zlib.decompress(self.blocks[block]).split(b'\0')[place]
    return os.path.join(self.root, os.fsdecode(name))

  def name_of(self, index: int) -> str:
    return self.path(index)

  def digest(self) -> str:
    # Of the names, not of the blocks: another zlib compresses otherwise.
    return sha256(itertools.chain([self.labels], map(zlib.decompress, self.blocks)))

  def _read(self, index: int) -> Example:
    path = self.path(index)
    try:
      data = pathlib.Path(path).read_bytes()
    except OSError as error:
      if error.errno == errno.ENOENT and self.root and _is_gone(self.root):  # as a disk may be
        raise OSError(errno.EIO, 'the folder is gone, or empty', self.root) from error
      if error.errno in _OF_THE_FILE:
        return Example(error, int(self.labels[index]), index, path)
      error.filename = path  # reading, in place of opening, names none
      raise
    return Example(data, int(self.labels[index]), index, path)


def _is_gone(folder: str) -> bool:
  """Whether a folder is not there, or empty, as is where a disk was mounted."""
  try:
    with os.scandir(folder) as entries:
      return next(entries, None) is None
  except OSError:
    return True
