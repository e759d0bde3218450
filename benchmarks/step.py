"""The training step that the benchmarks take: batch statistics, mean cross entropy, AdamW."""

import jax
import jax.numpy as jnp
import optax

LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.05


def adamw():
  return optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def train_step(model):
  """Returns a function, not jitted: (state, images, labels) to (state, loss).

  The state is (variables, `adamw().init` of their parameters).
  """

  def step(state, images, labels):
    variables, optimizer_state = state

    def loss_fn(params):
      logits, updates = model.apply(
        {**variables, 'params': params}, images, train=True, mutable=['batch_stats']
      )
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
      return losses.mean(), updates

    (loss, updates), gradients = jax.value_and_grad(loss_fn, has_aux=True)(variables['params'])
    changes, optimizer_state = adamw().update(gradients, optimizer_state, variables['params'])
    params = optax.apply_updates(variables['params'], changes)
    return ({**updates, 'params': params}, optimizer_state), loss

  return step


def lower_train_step(model, variables, images, labels):
  """Traces the training step, whose state is donated; returns a `jax.stages.Lowered`."""
  state = variables, jax.eval_shape(adamw().init, variables['params'])
  return jax.jit(train_step(model), donate_argnums=0).lower(state, images, labels)


def step_taker(compiled, variables, images, labels):
  """Returns a function that takes a compiled step and waits for it."""
  variables = jax.tree.map(jnp.array, variables)  # a copy: the step overwrites its state
  state = variables, adamw().init(variables['params'])

  def run():
    nonlocal state
    state, _ = jax.block_until_ready(compiled(state, images, labels))

  return run
