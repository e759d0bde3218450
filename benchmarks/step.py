"""The training step that the benchmarks take: batch statistics, mean cross entropy, AdamW."""

import jax
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
