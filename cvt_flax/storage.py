"""Paths on this machine, and in Google Cloud Storage, 'gs://bucket/run'.

What an object store lacks is left to it: nothing is appended to, renamed or locked there. A file
appears when it is whole, here because it is renamed, there because that is how objects are.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import platform

from etils import epath

from cvt_flax.errors import UserError


def path_of(place: str | pathlib.Path) -> pathlib.Path:
  """Returns a path; in an object store it is etils.epath's, which has the same methods.

  Raises:
    UserError: it is in another store, gcsfs is not installed, or the place cannot be reached.
  """
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
  # A name of this process alone: another, on another machine, may be writing the same.
  temporary = path.with_name(f'.{path.name}.{platform.node()}.{os.getpid()}')
  with temporary.open('wb') as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())  # or, after a power cut, the name may be there without the bytes
  os.replace(temporary, path)


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
