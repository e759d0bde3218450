"""What a run computes: its jitted training step, and the state before the first one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
from jax.sharding import Mesh

from cvt_flax.training import sharding
from cvt_flax.training.config import TrainConfig
from cvt_flax.training.engines import Engine
from cvt_flax.training.freeze import Frozen
from cvt_flax.training.optimizer import (
  layer_scales,
  make_optimizer,
  make_schedule,
  peak_learning_rate,
)
from cvt_flax.training.step import TrainState, init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Program:
  """The functions of a run.

  Attributes:
    init: jitted, () -> the state before the first step.
    step: jitted, (state, *what the engine feeds) -> (state, loss); the state is donated.
    state: the state as jax.ShapeDtypeStructs with shardings.
  """

  init: Callable[[], TrainState]
  step: Callable[..., tuple[TrainState, jax.Array]]
  state: TrainState


def make_program(
  config: TrainConfig,
  model: nn.Module,
  params: dict[tuple[str, ...], jax.ShapeDtypeStruct],
  frozen: Frozen,
  engine: Engine,
  mesh: Mesh,
  *,
  total_steps: int,
  steps_per_epoch: int,
) -> Program:
  """Returns what a run computes.

  Args:
    config: of the run.
    model: that is trained.
    params: its parameters, flat, by path.
    frozen: those that stay.
    engine: that feeds the step.
    mesh: that it computes on; its devices need not be there.
    total_steps, steps_per_epoch: by which the learning rate goes.
  """
  c = config.optimizer
  peak = peak_learning_rate(c, config.learning_rate, config.batch_size)
  schedule = make_schedule(c, peak, total_steps, steps_per_epoch)
  scales = None if c.layer_decay == 1 else layer_scales(c.layer_decay, params)
  tx = make_optimizer(c, schedule, scales)
  replicated = sharding.replicated(mesh)
  train_step = make_train_step(
    model,
    tx,
    schedule,
    seed=config.seed,
    mean=config.mean,
    std=config.std,
    augment=config.augment,
    ema_decay=c.ema_decay,
    accumulate_steps=c.accumulate_steps,
    class_weights=config.class_weights,
    frozen=frozen,
    whole=replicated,
    spread=sharding.split_microbatches(mesh),
  )

  def init():
    return init_state(model, tx, config.seed, config.image_size, bool(c.ema_decay), frozen)

  def step(state, *fed):
    return train_step(state, engine.train_batch(state.step, *fed))

  shapes = jax.eval_shape(init)
  shardings = sharding.split_state(mesh, shapes)
  # `init` runs once, and to optimise the many draws of random numbers would take the CPU's compiler
  # as long as the training step does.
  quick = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None
  return Program(
    jax.jit(init, out_shardings=shardings, compiler_options=quick),
    jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated)),
    sharding.abstract(shapes, shardings),
  )
