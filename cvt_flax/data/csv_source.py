"""Image files that a CSV file lists."""

import array
import csv
import hashlib
import itertools
import os
import pathlib
import re
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np

from cvt_flax.data.dataset import SPLIT_NAMES, Dataset
from cvt_flax.data.files import FileSplit, NamePacker
from cvt_flax.errors import UserError, nearest

_COLUMNS = ('path', 'label', 'split')
_NOT_UTF8 = re.compile('[\udc80-\udcff]')  # what surrogateescape makes of other bytes
_KINDS = {alias: split for split, aliases in SPLIT_NAMES.items() for alias in aliases}


class _Rows:
  """The images of one split, as they come."""

  def __init__(self):
    self.names, self.classes = NamePacker(), array.array('i')
    self.digests = array.array('Q')  # of the names: 8 bytes, where a set of them takes over 100


def load_csv(file: str) -> Dataset:
  """Reads a list of images; see `sources.load` for its form."""
  if not file:
    raise UserError("source 'csv:' names no file: csv:FILE is needed")
  path = os.path.expanduser(file)
  folder = os.path.dirname(path)
  splits, first_lines = {}, {}  # _Rows of each split; the line where a class is first seen
  try:
    # The mark that spreadsheets put in front is skipped, and names that are not UTF-8 are kept.
    with open(path, encoding='utf-8-sig', errors='surrogateescape', newline='') as lines:
      numbers = {}  # of classes, in the order in which they are seen
      for line, name, label, kind in _records(path, lines):
        rows = splits.setdefault(kind, _Rows())
        rows.names.extend([name])
        rows.digests.append(_digest(os.path.join(folder, name)))
        rows.classes.append(numbers.setdefault(label, len(numbers)))
        first_lines.setdefault(label, line)
  except OSError as error:
    raise UserError(f'cannot read {path}: {error.strerror}') from error
  if not splits:
    raise UserError(f'{path} lists no images; wanted is a line for each, below the header')
  class_names = _sorted_classes(numbers)
  label_of = np.empty(len(numbers), np.int32)
  label_of[[numbers[name] for name in class_names]] = np.arange(len(numbers))
  found = {
    kind: FileSplit(
      f'{path} {kind}', folder, splits[kind].names.finish(), label_of[splits[kind].classes]
    )
    for kind in SPLIT_NAMES
    if kind in splits
  }
  digests = [np.frombuffer(splits[kind].digests, np.uint64) for kind in found]
  _check_apart(path, found, digests)
  if 'train' in found:
    _check_classes(path, class_names, found['train'].labels, first_lines)
  train = digests[0] if 'train' in found else np.zeros(0)
  repeats = len(train) - len(np.unique(train))
  return Dataset(pathlib.Path(path).stem, class_names, **found, repeats=repeats)


def _records(path: str, lines: Iterable[str]) -> Iterator[tuple[int, str, str, str]]:
  """Yields (line number, path, label, split) of every image."""
  reader = csv.reader(lines, strict=True, skipinitialspace=True)
  try:
    header = next(reader, None)
    if header is None:
      raise UserError(f'{path} is empty; its first line names the columns, path,label,split')
    columns = _columns(path, header)
    for row in reader:
      if not row:
        continue
      where = f'{path} line {reader.line_num}'
      if len(row) != len(header):
        raise UserError(
          f'{where} has {len(row)} fields, but the header has {len(header)}; quote a field that '
          'holds a comma'
        )
      name, label, split = ('train' if c is None else row[c] for c in columns)
      label, split = label.strip(), split.strip()
      for column, value in zip(_COLUMNS, (name, label, split), strict=True):
        if not value.strip() or '\0' in value:
          raise UserError(f'{where} has {"a NUL in its" if value.strip() else "no"} {column}')
      if _NOT_UTF8.search(label):
        raise UserError(f'{where} has a label that is not UTF-8: save the list as UTF-8')
      kind = _KINDS.get(split.lower())
      if kind is None:
        raise UserError(
          f'{where} has the unknown split {split!r} (allowed: {", ".join(_KINDS)})'
          f'{nearest(split.lower(), _KINDS)}'
        )
      yield reader.line_num, name, label, kind
  except csv.Error as error:
    raise UserError(f'{path} line {reader.line_num} is not CSV: {error}') from error


def _digest(file: str) -> int:
  plain = os.fsencode(os.path.normpath(file))
  return int.from_bytes(hashlib.blake2b(plain, digest_size=8).digest(), 'little')


def _check_apart(path: str, splits: dict[str, FileSplit], digests: Sequence[np.ndarray]) -> None:
  """No file is in two splits: it would be trained on and evaluated."""
  pairs = itertools.combinations(zip(splits.items(), digests, strict=True), 2)
  for ((a, split), first), ((b, _), second) in pairs:
    both = np.intersect1d(first, second)
    if both.size:
      name = split.path(int(np.flatnonzero(first == both[0])[0]))
      raise UserError(f'{path} lists {name} in {a} and in {b}: an image may be in one split alone')


def _columns(path: str, header: Sequence[str]) -> list[int | None]:
  """Returns where path, label and split stand in a row; None for a split that is not there."""
  for column in _COLUMNS:
    if header.count(column) > 1:
      raise UserError(f'{path} line 1 has two columns {column!r}')
    if column not in header and column != 'split':
      raise UserError(
        f'{path} line 1 has no column {column!r} (it has {", ".join(map(repr, header))}; needed '
        f'are path and label, and split where there is more than train){nearest(column, header)}'
      )
  return [header.index(column) if column in header else None for column in _COLUMNS]


def _sorted_classes(names: Collection[str]) -> tuple[str, ...]:
  """Sorts class names: as numbers where all of them are written in digits."""
  if all(name.isascii() and name.isdigit() for name in names):
    return tuple(sorted(names, key=lambda name: (int(name), name)))
  return tuple(sorted(names))


def _check_classes(path, class_names, train_labels, first_lines):
  """Each class is trained on; one that is not is most often a slip of the pen."""
  counts = np.bincount(train_labels, minlength=len(class_names))
  for name, count in zip(class_names, counts, strict=True):
    if not count:
      trained = [n for n, c in zip(class_names, counts, strict=True) if c]
      raise UserError(
        f'{path} line {first_lines[name]}: class {name!r} has no image in train'
        f'{nearest(name, trained)}'
      )
