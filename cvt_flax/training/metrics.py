"""Where numbers go: metrics.jsonl, and TensorBoard.

clu.metric_writers is not used: importing it takes TensorFlow and TensorBoard.
"""

import json
import math
import pathlib
from collections.abc import Callable

from cvt_flax import storage
from cvt_flax.training.processes import is_first
from cvt_flax.weights.run_folder import METRICS, read_metrics


class MetricWriter:
  """Appends lines to metrics.jsonl and scalars to TensorBoard events.

  Where nothing can be appended to, in an object store, `flush` writes metrics.jsonl anew: before
  every checkpoint, so that no line that a resumed run goes on from is missing.
  On resume the file is cut back to the restored step first, so that it reads as if the run had
  never stopped; what a killed run wrote after its last checkpoint will be written again. Of several
  processes the first writes; in the others nothing happens.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    step: int,
    tensorboard: bool,
    watch: Callable[[dict], None] | None = None,
  ):
    """Opens the files.

    Args:
      folder: of the run.
      step: that it goes on from; 0 for a new one.
      tensorboard: whether to write events.
      watch: called with every line of metrics.jsonl, those that stay from before included.
    """
    self._path, self._watch = folder / METRICS, watch
    self._file = self._events = None
    self._writes = is_first()
    if not self._writes:
      return
    lines = [line for line in read_metrics(self._path) if line['step'] <= step]
    self._text = ''.join(json.dumps(line) + '\n' for line in lines)
    self.flush()
    for line in lines:
      self._show(line)
    if not storage.is_remote(self._path):
      self._file = open(self._path, 'a')
    if tensorboard:
      import tensorboardX

      self._events = tensorboardX.SummaryWriter(str(folder / 'tensorboard'), purge_step=step + 1)

  def _show(self, line):
    if self._watch:
      self._watch(line)

  def write(self, step: int, epoch: float, values: dict) -> None:
    """Writes one line {'step', 'epoch', **values}; lists go to metrics.jsonl alone."""
    if not self._writes:
      return
    finite = {
      k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()
    }
    line = {'step': step, 'epoch': round(epoch, 4), **finite}
    text = json.dumps(line) + '\n'
    if self._file:
      self._file.write(text)
      self._file.flush()
    else:
      self._text += text
    if self._events:
      for name, value in finite.items():
        if isinstance(value, int | float):
          self._events.add_scalar(name, value, step)
      self._events.flush()
    self._show(line)

  def flush(self) -> None:
    """Writes what an object store does not have yet."""
    if self._writes and not self._file:
      storage.write_whole(self._path, self._text.encode())

  def close(self) -> None:
    self.flush()
    if self._file:
      self._file.close()
    if self._events:
      self._events.close()
