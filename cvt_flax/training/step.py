"""The training step: a pure function of the state and a batch."""

from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from clu import metrics
from einops import rearrange

from cvt_flax.ops.logits import class_logits, num_classes
from cvt_flax.rng import Stream, stream_key
from cvt_flax.training.config import AugmentConfig
from cvt_flax.training.freeze import Frozen
from cvt_flax.training.inputs import make_inputs


@flax.struct.dataclass
class TrainMetrics(metrics.Collection):
  """Means over the steps since the last line of training metrics; of the rate, the last value.

  Norms are Euclidean, over all trained parameters at once.
  """

  loss: metrics.Average.from_output('loss')
  top1: metrics.Average.from_output('correct')
  gradient_norm: metrics.Average.from_output('gradient_norm')
  update_norm: metrics.Average.from_output('update_norm')
  parameter_norm: metrics.Average.from_output('parameter_norm')
  learning_rate: metrics.LastValue.from_output('learning_rate')


@flax.struct.dataclass
class TrainState:
  """All that a run carries from step to step, and all that a checkpoint holds.

  Attributes:
    step: steps taken, int32.
    params: the parameters, float32.
    batch_stats: the batch norms' running statistics, float32.
    opt_state: the optimizer's, of the trained parameters.
    ema: moving averages {'params', 'batch_stats'}, or None where none are kept.
    window: metrics since the last line was written, so that a resumed run writes the same lines.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any
  ema: Any
  window: TrainMetrics

  @property
  def variables(self) -> dict[str, Any]:
    """What the model is evaluated with: the averages where they are kept."""
    return self.ema or {'params': self.params, 'batch_stats': self.batch_stats}


def init_state(
  model: nn.Module,
  tx: optax.GradientTransformation,
  seed: int,
  image_size: int,
  ema: bool,
  frozen: Frozen = Frozen(),  # noqa: B008  (immutable)
) -> TrainState:
  """Returns the state before the first step."""
  images = jnp.zeros((1, image_size, image_size, 3))
  variables = model.init(stream_key(seed, Stream.INIT), images)
  params, batch_stats = variables['params'], variables.get('batch_stats', {})
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats=batch_stats,
    opt_state=tx.init(frozen.trained(params)),
    # A copy: the step donates its state, and no buffer can be donated twice.
    ema=jax.tree.map(jnp.copy, {'params': params, 'batch_stats': batch_stats}) if ema else None,
    window=TrainMetrics.empty(),
  )


def make_train_step(
  model: nn.Module,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  *,
  seed: int,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  augment: AugmentConfig,
  ema_decay: float,
  accumulate_steps: int,
  class_weights: tuple[float, ...] = (),
  frozen: Frozen = Frozen(),  # noqa: B008  (immutable)
  whole: jax.sharding.Sharding | None = None,
  spread: jax.sharding.Sharding | None = None,
) -> Callable[[TrainState, dict], tuple[TrainState, jax.Array]]:
  """Returns train_step(state, batch) -> (state, loss).

  The batch is what `make_inputs` takes. The step normalises, erases and mixes, averages the
  gradient over `accumulate_steps` microbatches and updates parameters, running statistics,
  optimizer, averages and metrics. It is meant to be jitted with the state donated.

  The loss is the mean of the images' cross entropies, in which the target of class c counts
  `class_weights[c]`, or 1 for (). What is `frozen` stays byte for byte as it is, in the averages
  too. Parameters that are split over devices are computed with under the sharding `whole`, and
  microbatches, [accumulate_steps b ...], under `spread`.
  """
  groups = getattr(model, 'bn_group_size', 0)  # CompactViT has no batch norm
  classes = num_classes(model.num_classes)
  weights = jnp.array(class_weights or (1.0,) * classes)
  prepare = make_inputs(
    seed=seed, mean=mean, std=std, augment=augment, classes=classes, groups=groups
  )

  def loss_fn(trained, variables, images, targets, dropout_key):
    params = frozen.joined(trained, variables['params'])
    if whole is not None:  # each layer gathers its own: the compiler would as soon move activations
      params = jax.lax.with_sharding_constraint(params, whole)
    with frozen.in_evaluation():
      logits, updates = model.apply(
        variables | {'params': params},
        images,
        train=True,
        mutable=['batch_stats'],
        rngs={'dropout': dropout_key},
      )
    logits = class_logits(logits)
    loss = jnp.mean(optax.softmax_cross_entropy(logits, targets * weights))
    correct = jnp.argmax(logits, -1) == jnp.argmax(targets, -1)
    correct &= jnp.any(targets > 0, -1)  # no hit where there is no image
    return loss, (updates.get('batch_stats', {}), jnp.mean(correct, dtype=jnp.float32))

  def gradients(state, trained, images, targets):
    """Returns the loss, its gradient, the new running statistics and the share of hits."""
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    key = stream_key(seed, Stream.DROPOUT, state.step)
    if accumulate_steps == 1:
      (loss, (batch_stats, top1)), grads = grad_fn(trained, variables, images, targets, key)
      return loss, grads, batch_stats, top1

    # Microbatch j takes the groups j, j + k, ...: a device that has a multiple of k groups has its
    # share of each microbatch. Otherwise they are dealt out, or some devices would have all of a
    # microbatch, and the others would compute the same once more.
    # All start from the same running statistics, whose mean is what the whole batch would give.
    def split(x):
      # Without groups there is no batch norm, and an image is a group of its own.
      x = rearrange(x, '(i k g) ... -> k (i g) ...', k=accumulate_steps, g=groups or 1)
      return x if spread is None else jax.lax.with_sharding_constraint(x, spread)

    def microbatch(total, inputs):
      j, images, targets = inputs
      (loss, (batch_stats, top1)), grads = grad_fn(
        trained, variables, images, targets, jax.random.fold_in(key, j)
      )
      return jax.tree.map(jnp.add, total, (loss, grads, batch_stats, top1)), None

    zeros = jax.tree.map(jnp.zeros_like, (0.0, trained, state.batch_stats, 0.0))
    inputs = (jnp.arange(accumulate_steps), split(images), split(targets))
    total, _ = jax.lax.scan(microbatch, zeros, inputs)
    return jax.tree.map(lambda x: x / accumulate_steps, total)

  def train_step(state, batch):
    images, targets = prepare(state.step, batch)
    trained = frozen.trained(state.params)
    loss, grads, batch_stats, top1 = gradients(state, trained, images, targets)
    updates, opt_state = tx.update(grads, state.opt_state, trained)
    trained = optax.apply_updates(trained, updates)
    new = {'params': frozen.joined(trained, state.params), 'batch_stats': batch_stats}
    new = frozen.kept(new, {'params': state.params, 'batch_stats': state.batch_stats})
    ema = state.ema
    if ema is not None:
      ema = frozen.kept(optax.incremental_update(new, ema, 1 - ema_decay), ema)
    window = state.window.merge(
      TrainMetrics.single_from_model_output(
        loss=loss,
        correct=top1,
        gradient_norm=optax.tree.norm(grads),
        update_norm=optax.tree.norm(updates),
        parameter_norm=optax.tree.norm(trained),
        learning_rate=schedule(state.step),
      )
    )
    state = TrainState(step=state.step + 1, **new, opt_state=opt_state, ema=ema, window=window)
    return state, loss

  return train_step
