"""What a run folder is, for those who write it and those who read weights from it."""

from __future__ import annotations

import json
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from cvt_flax import storage
from cvt_flax.errors import UserError
from cvt_flax.models.compact import CompactViT
from cvt_flax.models.cvt import CvT
from cvt_flax.weights import tensor_checks

# The folder of the checkpoints, and what each of them holds: {'params', 'batch_stats'} of the
# model, and their averages where the run keeps them.
CHECKPOINTS = 'checkpoints'
MODEL, AVERAGES = 'model', 'ema'
# The file that describes the model: weights/description.py.
DESCRIPTION = 'model.json'
# Its config, class names and hardware; a JSON line at every interval; what the best checkpoint
# makes of every image of the test split, or of validation.
EXPERIMENT, METRICS, PREDICTIONS = 'experiment.json', 'metrics.jsonl', 'predictions.npz'
# The table of parameters.
PARAMETERS = 'parameters.txt'
# The page about it.
REPORT = 'report/index.html'
# The metric by which a checkpoint is the best.
BEST = 'val/top1'


class _Manager(ocp.CheckpointManager):
  """Orbax's manager, without its own question whether processes are to stop.

  JAX keeps the number of the last question, and has all processes stop at the one after the
  largest. `training.signals` counts its questions; Orbax would ask by steps in between, and who is
  told to stop while a checkpoint is saved would wait for a question that nobody asks.
  """

  def reached_preemption(self, step: int) -> bool:
    del step
    return False


def manager(
  folder: pathlib.Path, keep: int, read_only: bool, alone: bool = False
) -> ocp.CheckpointManager:
  """Returns Orbax's manager of the checkpoints in `folder`, which keeps the latest and the best.

  Args:
    folder: of the checkpoints.
    keep: how many of the latest.
    read_only: whether nothing is written.
    alone: whether this process reads by itself; else all processes of a run do the same.
  """
  policies = ocp.checkpoint_managers
  processes = ocp.options.MultiprocessingOptions()
  if alone:
    me = jax.process_index()
    processes = ocp.options.MultiprocessingOptions(me, {me}, f'process {me}')
  # best_fn alone would let retention delete the newest checkpoint, the policy alone would not
  # write the metrics that it reads: both are needed.
  options = ocp.CheckpointManagerOptions(
    best_fn=lambda metrics: metrics[BEST],
    preservation_policy=policies.AnyPreservationPolicy(
      [
        policies.LatestN(keep),
        policies.BestN(
          get_metric_fn=lambda metrics: metrics[BEST],
          n=1,
          keep_checkpoints_without_metrics=False,
        ),
      ]
    ),
    # Another process may be writing here: who only reads leaves its unfinished checkpoint alone.
    cleanup_tmp_directories=not read_only,
    create=not read_only,
    read_only=read_only,
    multiprocessing_options=processes,
  )
  return _Manager(storage.absolute(folder), options=options)


def best_step(manager: ocp.CheckpointManager) -> int | None:
  """Returns the step with the highest validation top-1; the latest where none was measured."""
  best = manager.best_step()
  return manager.latest_step() if best is None else best


def restore(manager: ocp.CheckpointManager, step: int, items: dict) -> dict:
  """Returns items of a checkpoint, given {item: tree of jax.ShapeDtypeStruct}.

  Raises:
    UserError: it is damaged.
  """
  arguments = {name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
  try:
    return manager.restore(step, args=ocp.args.Composite(**arguments))
  except (OSError, ValueError, KeyError) as e:
    text = ' '.join(str(e).split())[:200]
    raise UserError(f'the checkpoint {manager.directory / str(step)} cannot be read: {text}') from e


def restore_best(
  folder: pathlib.Path, model: CvT | CompactViT, source: str
) -> tuple[dict, int, bool]:
  """Reads the best checkpoint of a run, the averages where the run keeps them.

  Args:
    folder: of the run.
    model: that it is of.
    source: what a person calls the folder, for messages.

  Returns:
    The variables {'params', 'batch_stats'}, the step, and whether they are averages.

  Raises:
    UserError: there is no checkpoint, it is damaged, or not of `model`.
  """
  checkpoints = folder / CHECKPOINTS
  if not checkpoints.is_dir():
    raise UserError(f'{folder} holds no checkpoint yet')
  with manager(checkpoints, keep=1, read_only=True, alone=True) as opened:
    step = best_step(opened)
    if step is None:
      raise UserError(f'{folder} holds no checkpoint yet')
    averaged = (checkpoints / str(step) / AVERAGES).is_dir()
    name = AVERAGES if averaged else MODEL
    saved = _shapes(storage.absolute(checkpoints) / str(step) / name)
    tensor_checks.check_size(source, model, len(saved))
    shapes = tensor_checks.leaf_shapes(model)
    tensor_checks.check(source, shapes, saved)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = {'batch_stats': {}} | traverse_util.unflatten_dict(
      {p: jax.ShapeDtypeStruct(s, np.float32, sharding=device) for p, s in shapes.items()}
    )
    return restore(opened, step, {name: abstract})[name], step, averaged


def _shapes(item: pathlib.Path) -> dict[tuple[str, ...], tuple[int, ...]]:
  """Returns {path: shape} of what is saved; Orbax itself finds misfits only while it reads."""
  handler = ocp.StandardCheckpointHandler()
  try:
    tree = handler.metadata(item).tree
  except (OSError, ValueError, KeyError, AttributeError) as e:
    raise UserError(f'the checkpoint {item} cannot be read: {type(e).__name__}') from e
  finally:
    handler.close()
  return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree).items()}


def read_metrics(path: pathlib.Path) -> list[dict]:
  """Returns the lines of a metrics.jsonl; [] where there is none.

  A last line that a killed run left half-written is left out.

  Raises:
    UserError: any other line is not one that `MetricWriter` writes.
  """
  if not path.exists():
    return []
  written = path.read_text().splitlines(keepends=True)
  lines = []
  for number, text in enumerate(written, start=1):
    try:
      line = json.loads(text)
      if not isinstance(line['step'], int):
        raise TypeError
    except (ValueError, TypeError, KeyError) as e:
      if number == len(written) and not text.endswith('\n'):
        break
      raise UserError(f'{path}, line {number} is damaged: {text.strip()[:60]!r}') from e
    lines.append(line)
  return lines
