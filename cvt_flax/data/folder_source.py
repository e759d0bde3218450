"""Folders of images, one folder a class."""

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from cvt_flax.data.dataset import SPLIT_NAMES, Dataset
from cvt_flax.data.files import FileSplit, NamePacker
from cvt_flax.errors import UserError, nearest

IMAGE_EXTENSIONS = (
  '.jpg',
  '.jpeg',
  '.jfif',
  '.png',
  '.bmp',
  '.webp',
  '.gif',
  '.tif',
  '.tiff',
  '.pbm',
  '.pgm',
  '.pnm',
  '.ppm',
)
_FOLDER_FORMS = 'DIR/train/CLASS/image or DIR/CLASS/image'


def load_folder(directory: str) -> Dataset:
  """Lists the images of a folder; see `sources.load` for its forms."""
  root = os.path.expanduser(directory)
  if not os.path.isdir(root):
    raise UserError(f'no folder {root!r}; looked for {_FOLDER_FORMS} below it')
  try:
    return _list_folder(root)
  except OSError as error:
    raise UserError(f'cannot read {error.filename}: {error.strerror}') from error


def list_images(directory: str) -> FileSplit:
  """Returns the visible images in and below a folder, folder by folder; all labels are -1.

  Raises:
    UserError: there is none, or a folder cannot be read.
  """
  packer, count, others = NamePacker(), 0, Counter()
  try:
    for names in _images_below(directory, '', others):
      packer.extend(names)
      count += len(names)
  except OSError as error:
    raise UserError(f'cannot read {error.filename}: {error.strerror}') from error
  if not count:
    raise UserError(f'no images in {directory}; looked for {" ".join(IMAGE_EXTENSIONS)}')
  _tell_of(others, directory)
  return FileSplit(directory, directory, packer.finish(), np.full(count, -1, np.int32))


def _list_folder(root: str) -> Dataset:
  folders = _split_folders(root)
  first, *others = folders.values()
  class_names = _subfolders(first)
  if not class_names:
    raise UserError(f'no class folders in {first}; looked for {_FOLDER_FORMS}')
  for other in others:
    names = _subfolders(other)
    for name in sorted(set(class_names) ^ set(names)):
      has, lacks = (other, first) if name in names else (first, other)
      raise UserError(
        f'{lacks} has no class {name!r}, but {has} has; all splits have the same '
        'class folders (they may be empty in validation and test)'
      )
  others = Counter()
  splits = {
    split: _list_split(path, class_names, others, may_lack=path != first)
    for split, path in folders.items()
  }
  _tell_of(others, root)
  return Dataset(os.path.basename(os.path.abspath(root)), tuple(class_names), **splits)


def _list_split(
  path: str, class_names: Sequence[str], others: Counter, may_lack: bool
) -> FileSplit:
  """Lists one split; unless `may_lack`, each class has an image. Adds to `others`."""
  packer, counts = NamePacker(), []
  for name in class_names:
    found = sorted(itertools.chain.from_iterable(_images_below(path, name, others)))
    packer.extend(found)
    counts.append(len(found))
  empty = [name for name, count in zip(class_names, counts, strict=True) if not count]
  if len(empty) == len(counts) or empty and not may_lack:
    raise UserError(
      f'no images in {os.path.join(path, empty[0])}; looked for '
      f'{" ".join(IMAGE_EXTENSIONS)}, there and in the folders below it'
    )
  labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
  return FileSplit(path, path, packer.finish(), labels)


def _split_folders(root: str) -> dict[str, str]:
  """Returns {'train': path, ...}, in this order; a flat folder of classes is all train."""
  folders = _subfolders(root)
  kinds = {alias: split for split, aliases in SPLIT_NAMES.items() for alias in aliases}
  named = [folder for folder in folders if folder.lower() in kinds]
  # A class may be called 'test': what tells a split is that there are class folders inside.
  if named != folders and not any(_subfolders(os.path.join(root, name)) for name in named):
    return {'train': root}
  splits = {}
  for folder in folders:
    kind = kinds.get(folder.lower())
    if kind in splits:
      raise UserError(
        f'{root} has two folders for {kind}: {os.path.basename(splits[kind])} and {folder}'
      )
    if kind:
      splits[kind] = os.path.join(root, folder)
    elif hint := nearest(folder.lower(), kinds):
      raise UserError(f'{root} has an unknown folder {folder!r} beside its splits{hint}')
  return {split: splits[split] for split in SPLIT_NAMES if split in splits} or {'train': root}


def _subfolders(path: str) -> list[str]:
  """Returns the names of the visible folders in `path`, links included, sorted."""
  with os.scandir(path) as entries:
    visible = [e.name for e in entries if e.is_dir() and not e.name.startswith('.')]
  return sorted(name for name in visible if name != '__MACOSX')  # macOS's notes in a zip file


def _images_below(
  root: str, folder: str, others: Counter, above: tuple[str, ...] = ()
) -> Iterator[list[str]]:
  """Yields the visible images in and below root/folder, from root on, sorted; follows links.

  Those of one folder come together, then those of the folders in it. The extensions of files that
  are none are counted in `others`. `above` are the real paths of the folders that it is in.
  """
  path = os.path.join(root, folder)
  above += (os.path.realpath(path),)
  if above[-1] in above[:-1]:  # a link that leads back up
    return
  with os.scandir(path) as entries:
    visible = sorted((e for e in entries if not e.name.startswith('.')), key=lambda e: e.name)
  images = []
  for file in (e.name for e in visible if not e.is_dir()):
    extension = os.path.splitext(file)[1].lower()
    if extension in IMAGE_EXTENSIONS:
      images.append(os.path.join(folder, file))
    else:
      others[extension or 'none'] += 1
  yield images
  for entry in visible:
    if entry.is_dir():
      yield from _images_below(root, os.path.join(folder, entry.name), others, above)


def _tell_of(others: Counter, root: str) -> None:
  """Prints how many files were left out, by their extension."""
  if others:
    kinds = ', '.join(f'{extension} {count:,}' for extension, count in others.most_common(5))
    print(f'{root}: left out {others.total():,} files that by name are no images ({kinds})')
