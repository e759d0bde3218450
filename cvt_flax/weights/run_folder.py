"""What a run folder is, for those who write it and those who read weights from it."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from cvt_flax.errors import UserError

# The folder of the checkpoints, and what each of them holds: {'params', 'batch_stats'} of the
# model, and their averages where the run keeps them.
CHECKPOINTS = 'checkpoints'
MODEL, AVERAGES = 'model', 'ema'
# The file that describes the model: weights/description.py.
DESCRIPTION = 'model.json'
# The metric by which a checkpoint is the best.
BEST = 'val/top1'


def manager(folder: pathlib.Path, keep: int, read_only: bool) -> ocp.CheckpointManager:
  """Returns Orbax's manager of the checkpoints in `folder`, which keeps the latest and the best."""
  policies = ocp.checkpoint_managers
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
  )
  return ocp.CheckpointManager(folder.absolute(), options=options)


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


def restore_best(folder: pathlib.Path, abstract: dict) -> tuple[dict, int, bool]:
  """Reads the best checkpoint of a run, the averages where the run keeps them.

  Args:
    folder: of the run.
    abstract: {'params', 'batch_stats'} of jax.ShapeDtypeStructs with shardings.

  Returns:
    The variables, the step, and whether they are averages.

  Raises:
    UserError: there is no checkpoint, or it is damaged.
  """
  checkpoints = folder / CHECKPOINTS
  if not checkpoints.is_dir():
    raise UserError(f'{folder} holds no checkpoint yet')
  with manager(checkpoints, keep=1, read_only=True) as opened:
    step = best_step(opened)
    if step is None:
      raise UserError(f'{folder} holds no checkpoint yet')
    averaged = (checkpoints / str(step) / AVERAGES).is_dir()
    name = AVERAGES if averaged else MODEL
    return restore(opened, step, {name: abstract})[name], step, averaged


def on_host(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
  """Returns what restores a float32 array onto one device of this process."""
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(shape, np.float32, sharding=device)
