"""Orbax checkpoints of a run: the latest, the best, and how to come back to them."""

import pathlib

import numpy as np
import orbax.checkpoint as ocp

from cvt_flax.training.sharding import place
from cvt_flax.training.step import TrainState
from cvt_flax.weights import run_folder


class Checkpoints:
  """The checkpoints of a run folder.

  Each holds, as items of their own, the 'model' (params, batch_stats), its averages 'ema' where
  they are kept, the 'optimizer' state and the metrics 'window'. Kept are the latest few and the
  one with the highest validation top-1. A checkpoint appears under its name only when it is whole.
  """

  def __init__(self, folder: pathlib.Path, keep: int, read_only: bool = False):
    self._manager = run_folder.manager(folder, keep, read_only)

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def best_step(self) -> int | None:
    """Returns the step with the highest validation top-1; the latest where none was measured."""
    return run_folder.best_step(self._manager)

  def save(self, step: int, state: TrainState, val_top1: float | None) -> None:
    """Starts writing a checkpoint; the state may be donated once this returns.

    One of the same step is replaced: a signal during an evaluation saved it without its metric,
    and Orbax cannot add one. Who is killed before the new one is whole goes on from one before it.
    """
    if step in self._manager.all_steps():
      self._manager.wait_until_finished()
      self._manager.delete(step)
    items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
    metrics = None if val_top1 is None else {run_folder.BEST: val_top1}
    self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)

  def restore(self, step: int, abstract: TrainState) -> TrainState:
    """Returns the state of a step.

    Args:
      step: one of the saved steps.
      abstract: jax.ShapeDtypeStructs with the shardings that are wanted.
    """
    restored = run_folder.restore(self._manager, step, _items(abstract))
    return abstract.replace(
      step=place(np.int32(step), abstract.step.sharding),
      **restored[run_folder.MODEL],
      ema=restored.get(run_folder.AVERAGES),
      opt_state=restored['optimizer'],
      window=restored['window'],
    )

  def restore_variables(self, step: int, abstract: dict, averaged: bool) -> dict:
    """Returns what the model of a step is evaluated with.

    Args:
      step: one of the saved steps.
      abstract: {'params', 'batch_stats'} of jax.ShapeDtypeStructs with shardings.
      averaged: whether the run keeps averages; they are returned then.
    """
    name = run_folder.AVERAGES if averaged else run_folder.MODEL
    abstract = {'params': abstract['params'], 'batch_stats': abstract.get('batch_stats', {})}
    return run_folder.restore(self._manager, step, {name: abstract})[name]

  def wait(self) -> None:
    """Returns when every checkpoint is on disk; raises what went wrong in the background."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()


def _items(state):
  items = {
    run_folder.MODEL: {'params': state.params, 'batch_stats': state.batch_stats},
    'optimizer': state.opt_state,
    'window': state.window,
  }
  return items if state.ema is None else items | {run_folder.AVERAGES: state.ema}
