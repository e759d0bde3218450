"""What the terminal shows of a run."""

import sys
import time

from cvt_flax import terminal

_FIRST_WORDS = 10  # seconds of steps after which a log says how long it will take


class Progress:
  """Images/s, loss and the time that is left.

  A terminal gets one line that is written over about once a second, a log file or a notebook one
  plain line at every interval, and a first one after ten seconds of steps. The rate is over
  training steps alone: compilation, evaluation and checkpoints do not count.
  """

  def __init__(
    self,
    total_steps: int,
    steps_per_epoch: int,
    batch_size: int,
    stream=None,
    image_share: float | None = None,
  ):
    """Nothing is shown yet.

    Args:
      total_steps, steps_per_epoch, batch_size: of the run.
      stream: to write to; stdout by default.
      image_share: of what the devices could do in a second, what one image takes. With it the rate
        is also shown as a share of that, the model's flops utilisation (MFU).
    """
    self._image_share = image_share
    self._stream = stream or sys.stdout
    self._tty = terminal.is_terminal(self._stream)
    self._total, self._per_epoch, self._batch = total_steps, steps_per_epoch, batch_size
    self._seconds, self._steps = 0.0, 0  # since the rate was last asked for
    self._all_seconds, self._all_steps = 0.0, 0
    self._shown = time.perf_counter()
    self._told = False  # how long it will take
    self._last = None  # when the clock was last read; None while it stands still
    self._open = False  # whether the terminal's last line is the one that is written over

  def start(self) -> None:
    """Begins to count time: after the step that compiles, after an evaluation."""
    self._last = time.perf_counter()

  def step(self, step: int, loss: float) -> None:
    """Counts one finished step, unless the clock stands still."""
    now = time.perf_counter()
    if self._last is not None:
      self._seconds += now - self._last
      self._all_seconds += now - self._last
      self._steps += 1
      self._all_steps += 1
      self._last = now
    if not self._tty and not self._told and self._all_seconds > _FIRST_WORDS:
      self.interval(step)
    elif self._tty and now - self._shown > 1:
      self._shown = now
      words = self._words(step, loss)
      while len(words) > 2 and len('  '.join(words)) >= terminal.columns():
        del words[1]  # of a narrow terminal's line the epoch and the time left stay
      terminal.write_over(self._stream, '  '.join(words))
      self._open = True

  def images_per_second(self) -> float | None:
    """Returns the rate since the last call; None when there was no step to measure."""
    rate = self._batch * self._steps / self._seconds if self._seconds else None
    self._seconds, self._steps = 0.0, 0
    return rate

  def interval(self, step: int, loss: float | None = None) -> None:
    """Shows the line of an interval, in a log, with its mean loss where that is known."""
    self._told = True
    if not self._tty:
      self.say('  '.join(self._words(step, loss)))

  def say(self, text: str) -> None:
    """Shows a line that stays."""
    terminal.say(self._stream, text)
    self._open = False

  def end(self) -> None:
    """Leaves the terminal to others: the line that is written over stays as it is."""
    if self._open:
      print(file=self._stream, flush=True)
      self._open = False

  def _words(self, step, loss):
    words = [
      f'epoch {step / self._per_epoch:.2f}/{self._total / self._per_epoch:.4g}',
      f'step {step}/{self._total}',
    ]
    if loss is not None:
      words.append(f'loss {loss:.4f}')
    if self._all_seconds:
      rate = self._all_steps / self._all_seconds
      left = (self._total - step) / rate
      words.append(f'{rate * self._batch:,.0f} images/s')
      if self._image_share:
        words.append(f'{rate * self._batch * self._image_share:.1%} MFU')
      words.append(f'{_duration(left)} left')
    return words


def _duration(seconds):
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'
