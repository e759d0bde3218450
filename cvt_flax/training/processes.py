"""A run of several processes: how they find each other, and what the first alone does.

Each process has its own devices and reads its own part of every batch; all compute the same step.
The run folder is one that all of them see.
"""

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import ArrayLike

from cvt_flax.errors import Interrupted, UserError


def join(how: str) -> None:
  """Joins the other processes; before anything asks jax for its devices.

  Args:
    how: 'auto', where jax finds the others by itself: on Cloud TPU, TPUs of GKE, under Slurm and
      Open MPI. Otherwise 'HOST:PORT,I,N': this is process I of N, and the address is one that
      process 0 can listen on.

  Raises:
    UserError: jax finds none, or it is neither.
    Interrupted: the others do not answer, or not yet; exit code 75.
  """
  if how == 'auto':
    arguments = {}
  else:
    try:
      address, process, count = how.split(',')
      arguments = dict(
        coordinator_address=address, num_processes=int(count), process_id=int(process)
      )
      if ':' not in address or not 0 <= int(process) < int(count):
        raise ValueError
    except ValueError:
      raise UserError(
        f'--distributed={how}: auto or HOST:PORT,I,N is needed, with I from 0 to N-1'
      ) from None
  try:
    jax.distributed.initialize(**arguments)
  except ValueError as e:
    hint = '; where JAX finds no others by itself, HOST:PORT,I,N is needed' if how == 'auto' else ''
    raise UserError(f'--distributed={how}: {_words(e).rstrip(".")}{hint}') from e
  except RuntimeError as e:
    raise Interrupted(f'--distributed={how}: {_words(e)}', 75) from e


def _words(error):
  return ' '.join(str(error).split())


def end_unguarded() -> None:
  """Ends a process that decodes images and has come here.

  It imports the script that it belongs to, and one without a guard would do all it does once more
  in there; the main process says what is missing.
  """
  if getattr(multiprocessing.current_process(), '_inheriting', False):
    sys.exit(1)


def check_joined() -> None:
  """Raises a UserError in a part of a pod that has not joined the rest."""
  if jax.process_count() > 1 and not jax.distributed.is_initialized():
    raise UserError(
      f'this is one of {jax.process_count()} processes that have not joined: start each with '
      '--distributed=auto, or call jax.distributed.initialize() before all else'
    )


def is_first() -> bool:
  """Whether this is process 0, which speaks, and writes of a run folder all but checkpoints."""
  return jax.process_index() == 0


def wait_for_all(name: str) -> None:
  """Returns when all processes are here; `name` is of the place, for whoever waits in vain."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def of_first(values: ArrayLike) -> np.ndarray:
  """Returns the first process's values, so that all decide alike; the others' are of that shape.

  What processes see of a folder may differ for seconds, where a network lies between.
  """
  if jax.process_count() == 1:
    return np.asarray(values)
  return np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(values)))


@contextlib.contextmanager
def entered() -> Iterator[None]:
  """What is done on the devices of all processes: while the block lasts, the first alone prints.

  Raises:
    UserError: in a part of a pod that has not joined the rest.
  """
  end_unguarded()  # before jax takes the devices, which the main process has
  check_joined()
  if is_first():
    yield
    return
  with open(os.devnull, 'w', errors='replace') as nowhere, contextlib.redirect_stdout(nowhere):
    yield
