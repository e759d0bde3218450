"""SIGTERM and Ctrl-C as requests that the run answers at its next step."""

import signal
import sys
import threading

from cvt_flax.errors import Interrupted

# What a run exits with: 75 (EX_TEMPFAIL of sysexits.h) asks a scheduler to run it again.
_EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}


class Signals:
  """Notes signals while the block lasts; a second one of the same kind acts as it always did.

  Outside the main thread, where Python delivers no signals, nothing is noted.
  """

  def __init__(self):
    self.received: signal.Signals | None = None
    self._previous = {}

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      self._previous = {s: signal.signal(s, self._note) for s in _EXIT_CODES}
    return self

  def __exit__(self, *_):
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _note(self, number, frame):
    del frame
    self.received = signal.Signals(number)
    signal.signal(number, self._previous[number])
    print(f'{self._name()}: stopping after this step; again stops at once', file=sys.stderr)

  def interruption(self, what: str) -> Interrupted:
    """Returns the exception to raise, with `what` is to be told of the state of things."""
    return Interrupted(f'{self._name()}: {what}', _EXIT_CODES[self.received])

  def _name(self):
    return 'Ctrl-C' if self.received == signal.SIGINT else self.received.name
