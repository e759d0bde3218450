"""What a person reads of a run: what is about to happen, and what came of it."""

from __future__ import annotations

import typing
from collections.abc import Sequence

import jax

from cvt_flax.models.geometry import multiply_adds
from cvt_flax.report.records import alarm, are_uneven
from cvt_flax.training import sharding

if typing.TYPE_CHECKING:
  from cvt_flax.training.setup import Setup, TrainingSetup

# From this share on of the first parameters in the averages that are evaluated, a run is warned.
_MOST_OF_THE_FIRST = 0.1


def describe(training: TrainingSetup) -> None:
  """Prints what is about to happen."""
  c, d, state = training.config, training.dataset, training.program.state
  sizes = [
    f'{0 if split is None else len(split):,} {name}'
    for name, split in (('train', d.train), ('validation', d.validation), ('test', d.test))
  ]
  print(f'data {c.source}: {", ".join(sizes)} images, {len(d.class_names)} classes')
  count = sum(x.size for x in jax.tree.leaves(state.params))
  cost = multiply_adds(training.model, c.image_size, c.image_size)
  print(
    f'model {c.model.name}: {count:,} parameters, {cost / 1e6:,.1f} M multiply-adds an image of '
    f'{c.image_size}x{c.image_size}'
  )
  if training.frozen.parameters:
    trained = sum(x.size for x in jax.tree.leaves(training.frozen.trained(state.params)))
    norms = {path[:-1] for path in training.frozen.statistics(state.batch_stats)}
    print(
      f'trained: {trained:,} parameters; frozen: {count - trained:,}, and the statistics of '
      f'{len(norms)} batch norms'
    )
  decay = c.optimizer.ema_decay
  if (first := decay**training.total_steps) > _MOST_OF_THE_FIRST:
    print(
      f'WARNING: optimizer.ema_decay={decay:g} over {training.total_steps} steps: the averages, by '
      f'which a run is evaluated, are to {first:.0%} still the parameters before the first step'
    )
  images, left = training.engine.count(training.train_data), ''
  rest = images - training.steps_per_epoch * c.batch_size
  if rest > images / 20 and c.augment.repeats == 1:
    left = f'; an epoch leaves out {rest:,} images, a smaller batch_size fewer'
  plural = 's' * (training.steps_per_epoch > 1)
  epochs = f'{training.total_steps / training.steps_per_epoch:.4g} epochs'
  steps = f'{training.steps_per_epoch} step{plural}'
  print(f'run folder {training.folder}: {epochs} of {steps}{left}')
  if training.mesh.shape['fsdp'] > 1:
    held = sharding.bytes_a_device(state)
    print(
      f'mesh: data {training.mesh.shape["data"]} x fsdp {training.mesh.shape["fsdp"]}, '
      f'{held / 2**20:,.1f} MiB of state a device'
    )


def metrics_line(metrics: dict, class_names: Sequence[str]) -> str:
  """Returns the metrics of an evaluation that a person looks at first.

  Args:
    metrics: as `evaluate.summarize` returns them.
    class_names: of the classes.
  """
  words = {'top1': 'top-1', 'top5': 'top-5', 'loss': 'loss'}
  if 'auc' in metrics:  # two classes, where top-5 is always 1
    words = {
      'top1': 'top-1',
      'majority': 'majority class',
      'balanced_accuracy': 'balanced',
      'f1': f'F1 of {class_names[1]!r}',
      'auc': 'AUC',
      'loss': 'loss',
    }
  elif are_uneven(metrics):
    words = {'top1': 'top-1', 'majority': 'majority class', 'balanced_accuracy': 'balanced'} | words
  return '  '.join(
    f'{word} {"-" if metrics[name] is None else format(metrics[name], ".4f")}'
    for name, word in words.items()
    if name in metrics  # images with several labels have no loss
  )


def tell_result(context: Setup, values: dict) -> dict:
  """Prints final metrics, and returns them.

  Args:
    context: of the run.
    values: 'checkpoint', the step that they are of, where they are of one, and 'SPLIT/METRIC'.
  """
  classes = context.dataset.class_names
  of = f'checkpoint of step {values["checkpoint"]}' if 'checkpoint' in values else 'these weights'
  for name in ('all', 'val', 'test', *(each.name for each in context.sets)):
    start = f'{name}/'
    metrics = {k.removeprefix(start): v for k, v in values.items() if k.startswith(start)}
    if metrics:
      line = metrics_line(metrics, classes)
      print(f'{name}: {line}  on {metrics["images"]:,} images ({of})')
      if warning := alarm(metrics, classes):
        print(f'{name}: {warning}')
  source = context.config.source
  if 'all/top1' in values:
    print(f'{source} has a single split: whether the weights were trained on it is not known')
  elif 'test/top1' not in values:
    print(
      f'{source} has no labelled test split; a new run with eval.test_holdout=0.2 would make one '
      'of train'
    )
  return values
