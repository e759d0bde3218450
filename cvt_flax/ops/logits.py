"""What a classifier gives out, as one logit a class."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def class_logits(logits: Float[Array, 'b n']) -> Float[Array, 'b k']:
  """Returns one logit a class: of a classifier with one logit z for two classes, (0, z).

  The softmax over (0, z) is (1 - sigmoid(z), sigmoid(z)), and its cross entropy the binary one. So
  the second class is taken where sigmoid(z) is above 0.5.
  """
  if logits.shape[-1] != 1:
    return logits
  return jnp.concatenate([jnp.zeros_like(logits), logits], axis=-1)


def num_classes(num_logits: int) -> int:
  """Returns how many classes a classifier of so many logits has."""
  return 2 if num_logits == 1 else num_logits
