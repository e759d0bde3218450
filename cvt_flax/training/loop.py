"""run(config, workdir): the order of things in a run."""

import contextlib
import dataclasses
import gc
import pathlib
import statistics
from collections.abc import Callable

import ml_collections

from cvt_flax import storage
from cvt_flax.errors import Diverged, UserError, told_of_memory
from cvt_flax.report.predictions import ARRAYS, Predictions
from cvt_flax.report.records import SEED_FOLDER
from cvt_flax.training import experiment, processes, summary
from cvt_flax.training.checkpoint import Checkpoints
from cvt_flax.training.config import freeze
from cvt_flax.training.evaluate import summarize
from cvt_flax.training.hardware import return_freed_memory
from cvt_flax.training.metrics import MetricWriter
from cvt_flax.training.setup import Setup, TrainingSetup
from cvt_flax.training.shipped import get_config
from cvt_flax.training.signals import Signals
from cvt_flax.training.steps import take_steps
from cvt_flax.weights import run_folder

# What is said where a run ends between its last step and its last metrics.
_UNFINISHED = 'the same command goes on with the last evaluation'


def run(
  config: ml_collections.ConfigDict | str,
  workdir: str | pathlib.Path = '',
  mode: str = 'train',
  watch: Callable[[dict], None] | None = None,
) -> dict:
  """Trains, or evaluates a trained run.

  A run folder that holds a run of the same config is gone on with; the result is the same, bit
  for bit, as if it had never stopped.

  Args:
    config: as `cvt_flax.get_config` returns it, or a name that it takes.
    workdir: the run folder, here or in an object store, 'gs://BUCKET/RUN'; '' is runs/NAME-seedN.
      With config.seeds above 1 it holds a run folder for each of them, seed-0, seed-1, ...; '' is
      runs/NAME.
    mode: 'train', or 'eval' for the metrics of the run's best checkpoint, or of the weights
      config.init_from where the folder holds no run that started from them.
    watch: called in training with every line of metrics.jsonl, a dict: at its start with those of a
      run that goes on, then with each as it is written. With config.seeds above 1, run after run.

  Returns:
    The final metrics, such as {'test/top1': 0.99, 'test/loss': 0.05, 'test/images': 360, ...}; with
    config.seeds above 1 {'seed-0': the metrics of that run, ...}.

  Raises:
    UserError: the config, the data or the folder are not usable; nothing was written over.
    Diverged: the loss stopped being finite; the last good checkpoint is kept.
    Interrupted: SIGTERM or Ctrl-C came; the state was saved.
  """
  config = freeze(get_config(config) if isinstance(config, str) else config)
  if mode not in ('train', 'eval'):
    raise UserError(f'mode={mode!r}: train or eval is needed')
  if watch and mode == 'eval':
    raise UserError("watch has no effect with mode='eval', which writes no metrics")
  name = config.name or 'run'
  with processes.entered():
    if config.seeds > 1:
      return _run_seeds(config, storage.path_of(workdir or f'runs/{name}'), mode, watch)
    folder = storage.path_of(workdir or f'runs/{name}-seed{config.seed}')
    return _run_one(config, folder, mode, watch)


def _run_seeds(config, folder, mode, watch):
  """Returns {'seed-0': its final metrics, ...}; finished runs are not trained again."""
  if (folder / run_folder.EXPERIMENT).exists():
    raise UserError(
      f'{folder} holds a run of one seed: for seeds={config.seeds} give another, '
      f'{experiment.free(folder)}'
    )
  seeds = range(config.seed, config.seed + config.seeds)
  folders = {seed: folder / SEED_FOLDER.format(seed) for seed in seeds}
  if mode == 'eval' and config.init_from and not all(map(experiment.read, folders.values())):
    raise UserError(
      f'seeds={config.seeds}: {folder} does not hold the run of every seed, and weights have none'
    )
  found, diverged = {}, []
  for number, (seed, run_of_seed) in enumerate(folders.items(), start=1):
    print(f'seed {seed}: run {number} of {config.seeds}')
    last = number == config.seeds
    note = config.closing_note if last else ''
    one = dataclasses.replace(config, seed=seed, seeds=1, closing_note=note)
    try:
      found[run_of_seed.name] = _run_one(one, run_of_seed, mode, watch)
    except Diverged as e:  # the others may not
      print(f'seed {seed}: {e}')
      diverged.append(f'{run_of_seed.name} ({e})')
    gc.collect()  # the jitted step and what holds it are a cycle, with the images on the devices
  for name in ('val/top1', 'test/top1'):
    values = [metrics[name] for metrics in found.values() if name in metrics]
    if len(values) > 1:
      mean, deviation = statistics.mean(values), statistics.stdev(values)
      split = name.partition('/')[0]
      print(f'{split}: top-1 {mean:.4f} ± {deviation:.4f} over {len(values)} seeds')
  if mode == 'train':
    _write_report(folder)
  if diverged:
    raise Diverged(f'{len(diverged)} of {config.seeds} seeds: {"; ".join(diverged)}')
  return found


def _run_one(config, folder, mode, watch):
  match mode:
    case 'train':
      return _train(config, folder, watch)
    case 'eval':
      saved = experiment.read(folder)
      if config.init_from and (saved is None or saved.config.init_from != config.init_from):
        return _evaluate_weights(config, folder)
      return _evaluate_run(config, folder)


def _train(config, folder, watch):
  training = TrainingSetup(config, folder)
  processes.wait_for_all('the run folder is read')
  with contextlib.ExitStack() as stack:
    if processes.is_first():
      locked = stack.enter_context(experiment.only_one(folder))
      if not training.saved:
        # Once more, under the lock: another process may be, or was, at its first steps.
        found, begun = experiment.read(folder), experiment.has_begun(folder)
        if found and (begun or not locked):
          experiment.check_config(folder, found.config, config, evaluation=False)
        if found and not begun:
          print(f'{folder} holds a run that came to no checkpoint; it begins anew')
        training.write_experiment()
    checkpoints = Checkpoints(folder / run_folder.CHECKPOINTS, config.checkpoint.keep)
    stack.callback(checkpoints.close)
    start = int(processes.of_first(checkpoints.latest_step() or 0))
    metrics = folder / run_folder.METRICS
    lines = run_folder.read_metrics(metrics)
    last = _last_metrics(training, lines, start)
    if processes.of_first(last is not None):
      print(f'{folder} is finished')
      for line in lines if watch else ():
        watch(line)
      if not (folder / run_folder.REPORT).exists():  # it was stopped before that
        _write_report(folder)
      # Another process than the first may not see that line yet.
      return summary.tell_result(training, _with_validation(last or {}, metrics))
    if training.saved and processes.is_first():
      training.write_experiment()  # with the hardware of now
    summary.describe(training)
    if not start:
      state = training.from_weights(training.program.init())
    else:
      state = checkpoints.restore(start, training.program.state)
      print(f'going on from step {start}')
    stack.callback(training.progress.end)
    writer = MetricWriter(folder, start, config.tensorboard, watch)
    stack.callback(writer.close)
    processes.wait_for_all('metrics.jsonl ends where the run goes on')
    signals = stack.enter_context(Signals())
    feed = training.engine.feed_training(training.train_data, start, training.total_steps)
    also = ', or a larger optimizer.accumulate_steps (docs/pods.md, Memory)'
    if config.engine == 'resident':
      also += ', or engine=stream'
    also += '; once there is a checkpoint, with another --workdir'  # as a run keeps these
    memory = told_of_memory('--config.batch_size', config.batch_size, training.batch_unit, also)
    with contextlib.closing(feed), memory:
      take_steps(training, state, start, feed, checkpoints, writer, signals)
    if processes.is_first():  # a page of another end: a run that is stopped before its own has none
      (folder / run_folder.REPORT).unlink(missing_ok=True)
    try:
      values = _finish(training, checkpoints, writer, signals)
    except UserError as e:  # of an image, or of memory
      raise UserError(f'{e}; training is over, the last evaluation alone is left') from e.__cause__
    writer.flush()
    processes.wait_for_all('the last metrics are written')
  _write_report(folder)
  values = summary.tell_result(training, _with_validation(values, metrics))
  if config.closing_note:
    print(config.closing_note)
  return values


def _last_metrics(training, lines, step):
  """Returns the line of metrics that ends a run at a step; None where something is missing yet."""
  if step < training.total_steps:
    return None
  sets = [f'{each.name}/top1' for each in training.sets]
  for line in lines:
    if line['step'] == step and all(name in line for name in ('checkpoint', *sets)):
      return line
  return None


def _write_report(folder):
  """Writes the report of what is finished; one that fails costs a line, not the run."""
  if not processes.is_first():
    return
  try:
    from cvt_flax.report.writer import write_report  # here: nothing before needs Matplotlib

    print(f'report: {write_report([folder])}')
  except Exception as e:
    words = ' '.join(f'{type(e).__name__}: {e}'.split())[:300]
    print(f'there is no report ({words}); python -m cvt_flax.report {folder} tries again')


def _finish(training, checkpoints, writer, signals):
  """Reports the best checkpoint: on the test split, which is read here for the only time.

  What it makes of each image is kept; of validation images, where the source has no test split.
  """
  values = {'checkpoint': checkpoints.best_step()}
  test, validation = training.dataset.test, training.dataset.validation
  if test or validation or training.sets:
    variables = training.restore_best(checkpoints)
  if test or validation:
    if test:  # where splits are on the devices, this one needs the place of the others
      training.train_data = training.val_data = None
      return_freed_memory()
      data = training.engine.open(test)
    else:
      data = training.val_data
    answers = training.answers(variables, data, signals)
    if answers is None:
      raise signals.interruption(_UNFINISHED)
    if test:
      metrics = summarize(answers, len(training.dataset.class_names))
      values |= {f'test/{key}': value for key, value in metrics.items()}
    arrays = {name: answers[name] for name in ARRAYS}
    predictions = Predictions('test' if test else 'val', values['checkpoint'], **arrays)
    if processes.is_first():
      predictions.save(training.folder / run_folder.PREDICTIONS)
  if training.sets:
    values |= _evaluate_splits(training, variables, {}, signals, _UNFINISHED)
  writer.write(training.total_steps, training.total_steps / training.steps_per_epoch, values)
  return values


def _with_validation(values, metrics):
  """Returns final values with the validation metrics of the checkpoint that they are of."""
  for line in run_folder.read_metrics(metrics):
    if line['step'] == values.get('checkpoint') and 'val/top1' in line:
      values = values | {name: value for name, value in line.items() if name.startswith('val/')}
  return values


def _evaluate_run(config, folder):
  context = Setup(config, folder, evaluation=True)
  with contextlib.ExitStack() as stack:
    signals = stack.enter_context(Signals())
    checkpoints = folder / run_folder.CHECKPOINTS
    if not checkpoints.is_dir():
      raise UserError(f'{folder} holds no checkpoint yet')
    checkpoints = Checkpoints(checkpoints, config.checkpoint.keep, read_only=True)
    stack.callback(checkpoints.close)
    step = checkpoints.best_step()
    if step is None:
      raise UserError(f'{folder} holds no checkpoint yet')
    variables = context.restore_best(checkpoints)
    values = _evaluate_all(context, variables, signals, context.elsewhere)
    return summary.tell_result(context, values | {'checkpoint': step})


def _evaluate_weights(config, folder):
  context = Setup(config, folder, evaluation=True, weights=True)
  with Signals() as signals:
    values = _evaluate_all(context, context.variables_of_weights(), signals, elsewhere=True)
  return summary.tell_result(context, values)


def _evaluate_all(context, variables, signals, elsewhere):
  """Returns the metrics of validation and test; elsewhere of 'all', where there is only train."""
  splits = {'val': context.dataset.validation, 'test': context.dataset.test}
  if not any(splits.values()) and elsewhere:
    splits = {'all': context.dataset.train}
  values = _evaluate_splits(context, variables, splits, signals, 'the evaluation is not finished')
  if not values:
    source = context.config.source
    raise UserError(f'{source} has neither a validation nor a test split to evaluate')
  return values


def _evaluate_splits(context, variables, splits, signals, unfinished):
  """Returns the metrics of the splits that are there and of config.eval.sets.

  Raises:
    Interrupted: a signal came; the message is `unfinished`.
  """
  values = {}
  for name, split in splits.items():
    if split is None:
      continue
    metrics = context.evaluate(variables, context.engine.open(split), signals)
    if metrics is None:
      raise signals.interruption(unfinished)
    values |= {f'{name}/{key}': value for key, value in metrics.items()}
  metrics = context.evaluate_sets(variables, signals)
  if metrics is None:
    raise signals.interruption(unfinished)
  return values | metrics
