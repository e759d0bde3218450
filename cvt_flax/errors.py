"""Errors that a person can act on."""

import contextlib
import difflib
import errno
import os
from collections.abc import Iterable, Iterator, Mapping

_MOMENTARY = (
  errno.EIO,
  errno.ESTALE,
  errno.ETIMEDOUT,
  errno.EHOSTDOWN,
  errno.EHOSTUNREACH,
  errno.ENOTCONN,
)
# What libraries make of these, of a store that does not answer (gRPC's codes), and of a process
# that is killed (Grain's).
_MOMENTARY_WORDS = (
  *map(os.strerror, _MOMENTARY),
  'UNAVAILABLE',
  'DEADLINE_EXCEEDED',
  'terminated unexpectedly with exit code -',
)


class UserError(Exception):
  """The user's input is wrong; a command line prints the message alone and exits with 2.

  It exits with 1 where the cause `is_momentary`.

  The message is one line: what is wrong, where it stands, what is allowed.
  """


class Diverged(Exception):
  """Training produced a loss that is not finite; a command line exits with 3."""


class Interrupted(Exception):
  """A signal ended the run after its state was saved.

  Attributes:
    exit_code: 75 when the machine is taken away (run me again), 130 for Ctrl-C.
  """

  def __init__(self, message: str, exit_code: int):
    super().__init__(message)
    self.exit_code = exit_code


def nearest(word: str, allowed: Iterable[str], shown: Mapping[str, str] | None = None) -> str:
  """Returns ", did you mean 'x'?" for the closest allowed word, '' when none is close.

  Args:
    word: what was written.
    allowed: words that it could have been.
    shown: what stands in place of each allowed word.
  """
  close = difflib.get_close_matches(word, list(allowed), n=1)
  found = [shown[name] if shown else name for name in close]
  return f', did you mean {found[0]!r}?' if found else ''


def is_momentary(error: BaseException | None) -> bool:
  """Whether an error is of a file system that does not answer, or of a process that was killed.

  Another try may not meet it: the input is not to blame, and a run goes on from its checkpoint.
  """
  if isinstance(error, OSError) and error.errno is not None:
    return error.errno in _MOMENTARY
  return any(words in str(error) for words in _MOMENTARY_WORDS)


@contextlib.contextmanager
def told_of_memory(flag: str, batch_size: int, unit: int, also: str = '') -> Iterator[None]:
  """Makes XLA's RESOURCE_EXHAUSTED, when the block raises it, an error that a person can act on.

  Args:
    flag: that says the batch size, as '--config.eval.batch_size'.
    batch_size: what it is.
    unit: what has to divide a batch: devices, groups of batch norm, microbatches.
    also: what else helps.

  Raises:
    UserError: the memory of a device is too little.
  """
  import jax  # here: who computes has it already, and no one else waits for it

  try:
    yield
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    smaller = batch_size // 2 // unit * unit
    words = f'try {flag}={smaller}' if smaller else f'a smaller one has to be a multiple of {unit}'
    if batch_size == 1:
      words = 'a smaller model is needed'
    elif not smaller and flag.startswith('--config.'):
      words += ': change mesh.data, model.bn_group_size or optimizer.accumulate_steps with it'
    given = f'{flag.removeprefix("--").removeprefix("config.")}={batch_size}'
    raise UserError(
      f'{given} is too large for the memory of a device: {words}, or smaller images{also}'
    ) from e
