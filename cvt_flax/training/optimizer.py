"""Learning-rate schedules, weight-decay groups and the optimizers, all from optax."""

import math
import re
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from cvt_flax.errors import UserError
from cvt_flax.training.config import OptimizerConfig


def peak_learning_rate(config: OptimizerConfig, learning_rate: float, batch_size: int) -> float:
  """Returns the highest learning rate: scaled by batch_size / reference_batch where that is set."""
  if not config.reference_batch:
    return learning_rate
  return learning_rate * batch_size / config.reference_batch


def make_schedule(
  config: OptimizerConfig, peak: float, total_steps: int, steps_per_epoch: int
) -> optax.Schedule:
  """Returns the learning rate as a function of the step.

  The cosine runs over all steps, the warm-up's included, and the warm-up replaces its beginning,
  as timm's CosineLRScheduler does without warmup_prefix.

  Raises:
    UserError: when the cosine would rise.
  """
  if config.schedule == 'cosine' and config.min_learning_rate > peak:
    raise UserError(
      f'optimizer.min_learning_rate={config.min_learning_rate} is above the highest rate, {peak}'
    )
  match config.schedule:
    case 'cosine':
      floor = config.min_learning_rate / peak if peak else 0.0
      after = optax.cosine_decay_schedule(peak, total_steps, alpha=floor)
    case 'constant':
      after = optax.constant_schedule(peak)
    case 'multistep':
      steps = [round(m * steps_per_epoch) for m in config.milestones]
      boundaries = {step: config.gamma ** steps.count(step) for step in steps}
      after = optax.piecewise_constant_schedule(peak, boundaries)
  warmup_steps = round(config.warmup_epochs * steps_per_epoch)
  before = optax.linear_schedule(config.warmup_learning_rate, peak, max(warmup_steps, 1))

  def schedule(step):
    if config.schedule_per == 'epoch':
      step = step // steps_per_epoch * steps_per_epoch
    return jnp.where(step < warmup_steps, before(step), after(step))

  return schedule


def decayed(params):
  """Returns a tree of booleans: which parameters weight decay acts on.

  As the authors' code has it: all kernels, those of depthwise convolutions too; no bias, no scale
  or bias of a norm, no class token (lib/optim/build.py of github.com/microsoft/CvT).
  """
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == 'kernel', params)


_STAGE, _BLOCK = re.compile(r'stage(\d+)'), re.compile(r'blocks_(\d+)')


def _layer(path: tuple[str, ...]) -> tuple[float, int]:
  """Returns where the parameter of that name stands: the stage, and the block in it.

  The embedding of a stage and its class token stand below its first block. Above all stages are
  the head and what stands just before it.
  """
  stage, block = _STAGE.fullmatch(path[0]), -1
  for name in path:
    if match := _BLOCK.fullmatch(name):
      block = int(match[1])
  if stage:
    return int(stage[1]), block
  if block >= 0 or path[0].endswith(('embed', 'token', 'tokenizer')):  # of a CompactViT
    return 0, block
  return math.inf, 0


def layer_scales(decay: float, paths: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
  """Returns by what the learning rate of every parameter is multiplied: {path: decay ** depth}.

  As BEiT (https://arxiv.org/abs/2106.08254) and timm have it: the head and the norm before it have
  depth 0, and each layer is one deeper than the one above it. Layers are the blocks and, each below
  the blocks of its stage, the embeddings with their class tokens. CvT-13 so has 16 below the head.
  """
  layers = {path: _layer(path) for path in paths}
  order = sorted(set(layers.values()), reverse=True)
  return {path: decay ** order.index(layer) for path, layer in layers.items()}


def make_optimizer(
  config: OptimizerConfig,
  schedule: optax.Schedule,
  scales: Mapping[tuple[str, ...], float] | None = None,
) -> optax.GradientTransformation:
  """Returns the optimizer: clipping, weight decay, the update rule, the schedule.

  Weight decay is decoupled for adamw, and added to the gradient for the others, as in PyTorch.

  Args:
    config: of the optimizer.
    schedule: of the learning rate.
    scales: by what that is multiplied, for every parameter; see `layer_scales`. None: by 1.
  """
  c = config
  match c.name:
    case 'adamw':
      rule = optax.adamw(
        schedule, c.beta1, c.beta2, c.epsilon, weight_decay=c.weight_decay, mask=decayed
      )
    case 'adam':
      rule = optax.adam(schedule, c.beta1, c.beta2, c.epsilon)
    case 'sgd':
      rule = optax.sgd(schedule, c.momentum or None, c.nesterov)
    case 'rmsprop':
      # optax.rmsprop has the learning rate inside the velocity; PyTorch multiplies what comes out.
      rule = optax.chain(
        optax.scale_by_rms(c.rms_decay, c.epsilon, eps_in_sqrt=False),
        optax.trace(c.momentum) if c.momentum else optax.identity(),
        optax.scale_by_learning_rate(schedule),
      )
  parts = []
  if c.clip_norm:
    parts.append(optax.clip_by_global_norm(c.clip_norm))
  if c.weight_decay and c.name != 'adamw':
    parts.append(optax.add_decayed_weights(c.weight_decay, mask=decayed))
  parts.append(rule)
  if scales is not None:  # updates are linear in the rate, decoupled weight decay included
    parts.append(
      optax.stateless(
        lambda updates, _: unflatten_dict(
          {path: scales[path] * x for path, x in flatten_dict(updates).items()}
        )
      )
    )
  return optax.chain(*parts)
