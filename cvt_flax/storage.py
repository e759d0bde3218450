"""Paths on this machine, and in Google Cloud Storage, 'gs://bucket/run'.

What an object store lacks is left to it: nothing is appended to, renamed or locked there. A file
appears when it is whole, here because it is renamed, there because that is how objects are.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import platform
import re
import shutil
from collections.abc import Iterator

from etils import epath

from cvt_flax.errors import UserError


def path_of(place: str | pathlib.Path) -> pathlib.Path:
  """Returns a path; in an object store it is etils.epath's, which has the same methods.

  Raises:
    UserError: it is in another store, or a pathlib.Path of one, gcsfs is not installed, or the
      place cannot be reached.
  """
  _check_slashes(place)
  if not is_remote(place):
    return pathlib.Path(os.path.expanduser(place))  # a shell leaves the ~ of --workdir=~/runs
  if not str(place).startswith('gs://'):
    raise UserError(f'{place}: a folder of this machine, or gs://BUCKET/FOLDER, is needed')
  if not importlib.util.find_spec('gcsfs'):  # epath comes without it
    raise UserError(f'{place}: gcsfs is needed: pip install gcsfs')
  os.environ.setdefault('EPATH_USE_TF', 'false')  # gcsfs where TensorFlow is installed, too
  path = epath.Path(place)
  try:
    path.exists()
  except Exception as e:  # of the network, of credentials, of the store
    raise UserError(f'{place} cannot be reached: {" ".join(str(e).split())[:300]}') from e
  return path


def _check_slashes(place):
  if re.match(r'[a-z][a-z0-9]+:/[^/]', str(place)):
    raise UserError(f"{place}: give 'gs://BUCKET/FOLDER' as a str; pathlib drops a slash of it")


def absolute(path: pathlib.Path) -> pathlib.Path:
  """Returns the path from the root, as Orbax wants it."""
  return path if is_remote(path) else path.absolute()


def is_remote(place: str | pathlib.Path) -> bool:
  """Returns whether a path, or its text, is one in an object store."""
  return '://' in str(place)


def write_whole(path: pathlib.Path, data: bytes) -> None:
  """Writes a file that appears, or replaces another, when it is whole."""
  if is_remote(path):
    path.write_bytes(data)
    return
  temporary = _temporary(path)
  try:
    with temporary.open('wb') as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())  # or, after a power cut, the name may be there without the bytes
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)  # of a disk that is full


def is_free(folder: pathlib.Path) -> bool:
  """Whether there is nothing, or a folder with nothing in it but hidden files.

  Such are locks, and what a killed process left of a file.
  """
  if not folder.is_dir():
    return not folder.exists()
  return all(path.name.startswith('.') for path in folder.iterdir())


def make_folder(folder: pathlib.Path, called: str = '') -> None:
  """Makes a folder, and those that it is in, where it is not there yet.

  Args:
    folder: to be made.
    called: what a person calls it.

  Raises:
    UserError: it cannot be made.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise UserError(f'{called or folder}: {e.strerror}') from e


def local_path(place: str | pathlib.Path) -> pathlib.Path:
  """Returns the path of a destination on this machine; a shell leaves the ~ of --csv=~/a.csv.

  Raises:
    UserError: it is in an object store, where nothing is renamed.
  """
  _check_slashes(place)
  if is_remote(place):
    raise UserError(f'{place}: a place on this machine is needed; copy it from there')
  return pathlib.Path(os.path.expanduser(place))


def check_new(path: pathlib.Path, folder: bool = False) -> None:
  """Raises a UserError when there is something at `path`; for a `folder` an empty one may be."""
  try:
    empty = folder and path.is_dir() and not any(path.iterdir())
    if path.is_symlink() or (path.exists() and not empty):
      raise UserError(f'{path} exists: give another destination')
  except OSError as e:
    raise UserError(f'{path}: {e.strerror}') from e


@contextlib.contextmanager
def new_path(path: pathlib.Path, folder: bool = False) -> Iterator[pathlib.Path]:
  """Yields a temporary name beside `path`, renamed to it when the block ends well.

  When it does not, nothing is left, nor are folders that were made to hold it.

  Args:
    path: of a new file or folder.
    folder: whether it is to be a folder, where an empty one may be.

  Raises:
    UserError: there is something at `path`, or it cannot be written.
  """
  check_new(path, folder)
  path = path.absolute()
  temporary = _temporary(path)
  missing = [folder for folder in path.parents if not folder.exists()]
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    yield temporary
    os.replace(temporary, path)
    missing = []
  except OSError as e:
    raise UserError(f'{path} cannot be written: {e.strerror or e}') from e
  finally:
    if temporary.is_dir():
      shutil.rmtree(temporary)
    elif temporary.is_file():
      temporary.unlink()
    for folder in missing:  # from the innermost outwards
      with contextlib.suppress(OSError):
        folder.rmdir()


def _temporary(path: pathlib.Path) -> pathlib.Path:
  """Returns a name beside `path` of this process alone: one elsewhere may be writing the same."""
  return path.with_name(f'.{path.name}.{platform.node()}.{os.getpid()}')
