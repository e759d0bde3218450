"""take_steps(...): the steps of a run, and what is measured, evaluated and saved in between."""

import collections
import math
import time
from collections.abc import Iterable

import jax

from cvt_flax.errors import Diverged
from cvt_flax.report.records import alarm
from cvt_flax.training import processes, summary
from cvt_flax.training.checkpoint import Checkpoints
from cvt_flax.training.metrics import MetricWriter
from cvt_flax.training.setup import TrainingSetup
from cvt_flax.training.sharding import place
from cvt_flax.training.signals import Signals
from cvt_flax.training.step import TrainMetrics, TrainState
from cvt_flax.weights import run_folder

# Steps that the host may be ahead of the device: enough to keep it busy, few enough that a loss
# that is not finite stops the run at once.
_STEPS_AHEAD = 2


def take_steps(
  training: TrainingSetup,
  state: TrainState,
  start: int,
  feed: Iterable[tuple],
  checkpoints: Checkpoints,
  writer: MetricWriter,
  signals: Signals,
) -> None:
  """Takes all steps that are left, with their metrics, evaluations and checkpoints.

  Args:
    training: of the run.
    state: after `start` steps; it is donated to the next one.
    start: steps that were taken before.
    feed: what the jitted step takes beside the state, step after step.
    checkpoints: where the state is saved.
    writer: of metrics.jsonl.
    signals: which end the run, after the state was saved.

  Raises:
    Diverged: a loss or a norm is not finite; the last good checkpoint is kept.
    Interrupted: a signal came; the state was saved.
  """
  config, progress = training.config, training.progress
  # Losses of steps that the devices may still be at.
  pending = collections.deque()

  def settle(ahead):
    """Waits until at most `ahead` steps are unfinished, and looks at the losses of the others."""
    while len(pending) > ahead:
      step, loss = pending.popleft()
      loss = float(loss)
      if not math.isfinite(loss):
        raise Diverged(f'the loss is {loss} at step {step}: {kept()}')
      progress.step(step, loss)

  def check_norms(step):
    """Looks at gradients, updates and parameters: what was not finite since the last line shows."""
    for name in ('gradient_norm', 'update_norm', 'parameter_norm'):
      norm = float(getattr(state.window, name).total)
      if not math.isfinite(norm):
        raise Diverged(f'the {name} is {norm} at or before step {step}: {kept()}')

  def kept():
    last = checkpoints.latest_step()
    words = (
      'there is no checkpoint yet' if last is None else f'the checkpoint of step {last} is kept'
    )
    return f'{words} in {training.folder}'

  def write_window(step):
    """Writes the training metrics since the last such line; returns the state with none."""
    check_norms(step)
    window = jax.device_get(state.window).compute()
    values = {f'train/{name}': float(value) for name, value in window.items()}
    values['train/images_per_sec'] = rate = progress.images_per_second()
    if training.image_share and rate:
      values['train/mfu'] = rate * training.image_share
    writer.write(step, step / training.steps_per_epoch, values)
    progress.interval(step, values['train/loss'])
    return state.replace(window=place(TrainMetrics.empty(), training.replicated))

  def save(step, val_top1=None):
    check_norms(step)
    writer.flush()
    checkpoints.save(step, state, val_top1)

  def validate(step):
    """Evaluates and saves; False when a signal came in between."""
    metrics = training.evaluate(state.variables, training.val_data, signals)
    if metrics is None:
      return False
    if not math.isfinite(metrics['loss']):
      raise Diverged(f'the validation loss is {metrics["loss"]} after step {step}: {kept()}')
    values, names = {f'val/{k}': v for k, v in metrics.items()}, training.dataset.class_names
    writer.write(step, step / training.steps_per_epoch, values)
    epoch, rest = divmod(step, training.steps_per_epoch)
    when = f'step {step}' if rest else f'epoch {epoch}'
    progress.say(f'{when}  validation: {summary.metrics_line(metrics, names)}')
    if warning := alarm(metrics, names):
      progress.say(warning)
    save(step, metrics['top1'])
    return True

  def interrupted(step):
    if checkpoints.latest_step() != step:
      save(step)
    checkpoints.wait()
    return signals.interruption(f'saved step {step}; the same command goes on from there')

  # A signal during an evaluation saved the state, not the metrics: the evaluation is still due.
  lines = run_folder.read_metrics(training.folder / run_folder.METRICS)
  evaluated = processes.of_first(
    any(line['step'] == start and 'val/top1' in line for line in lines)
  )
  if start and training.eval_is_due(start) and not evaluated and not validate(start):
    raise interrupted(start)

  for step, fed in enumerate(feed, start):
    began = time.perf_counter()
    state, loss = training.program.step(state, *fed)
    done = step + 1
    pending.append((done, loss))
    settle(_STEPS_AHEAD if step > start else 0)
    if step == start:  # it compiled, which is not counted
      progress.say(f'first step: loss {loss:.4f}, after {time.perf_counter() - began:.1f} s')
      progress.start()

    last = done == training.total_steps
    save_is_due = config.checkpoint.every_steps and done % config.checkpoint.every_steps == 0
    if done % config.log_every == 0 or last:
      settle(0)
      state = write_window(done)
    if training.eval_is_due(done):
      settle(0)
      if not validate(done):
        raise interrupted(done)
      progress.start()
    elif save_is_due or last:
      settle(0)
      save(done)
      progress.start()
    if signals.received():
      settle(0)
      raise interrupted(done)
  checkpoints.wait()
  progress.end()
