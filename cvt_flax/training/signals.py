"""SIGTERM and Ctrl-C as requests that the run answers at its next step."""

import contextlib
import itertools
import signal
import sys
import threading

import jax
from jax.experimental import multihost_utils

from cvt_flax import terminal
from cvt_flax.errors import Interrupted

# jax counts the times that a process asks whether to stop, over all of its runs.
_ASKED = itertools.count(1)
# What a run exits with: 75 (EX_TEMPFAIL of sysexits.h) asks a scheduler to run it again.
_EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}


class Signals:
  """Notes signals while the block lasts; a second one of the same kind acts as it always did.

  Where processes have joined, jax notes the first SIGTERM that any of them gets, before the block
  too, and has all of them answer at the same step. Ctrl-C in one of several is a SIGTERM to the
  others. Further ones do nothing there.

  Outside the main thread, where Python delivers no signals, nothing is noted.
  """

  def __init__(self):
    self._noted: int | None = None
    self._pressed = False  # Ctrl-C, in this one of several processes
    self._previous = {}
    self._joined = jax.distributed.is_initialized()
    self._several = jax.process_count() > 1

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      numbers = [signal.SIGINT] if self._several else _EXIT_CODES
      self._previous = {s: signal.signal(s, self._note) for s in numbers}
    return self

  def __exit__(self, *_):
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _note(self, number, frame):
    del frame
    signal.signal(number, self._previous[number])
    with contextlib.suppress(RuntimeError):  # something is being written there at this moment
      terminal.say(sys.stderr, f'{_name(number)}: stopping after this step; again stops at once')
    if self._several:
      self._pressed = True
      signal.raise_signal(signal.SIGTERM)
    else:
      self._noted = number

  def received(self) -> bool:
    """Whether to stop. All processes ask equally often, and get the same answer each time."""
    if self._joined and self._noted is None:
      if multihost_utils.reached_preemption_sync_point(next(_ASKED)):
        self._noted = signal.SIGINT if self._pressed else signal.SIGTERM
    return self._noted is not None

  def interruption(self, what: str) -> Interrupted:
    """Returns the exception to raise, with `what` is to be told of the state of things."""
    return Interrupted(f'{_name(self._noted)}: {what}', _EXIT_CODES[self._noted])


def _name(number):
  return 'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name
