"""Scaled dot-product attention."""

from collections.abc import Callable

import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float


def attention(
  q: Float[Array, 'b t h d'],
  k: Float[Array, 'b s h d'],
  v: Float[Array, 'b s h d'],
  scale: float,
  dropout: Callable[[Array], Array] = lambda weights: weights,
) -> Float[Array, 'b t h d']:
  """Returns, for every query, the mean of the values weighted by softmax(scale q k^T).

  The softmax's division comes after the product with the values, where it is over d numbers a
  query in place of s.

  Args:
    q: queries.
    k: keys.
    v: values.
    scale: what the scores are multiplied by before the softmax.
    dropout: applied to the weights.

  Returns:
    The weighted values in v's dtype; scores and softmax are float32 whatever the inputs are.
  """
  scores = jnp.einsum('bthd,bshd->bhts', q * scale, k, preferred_element_type=jnp.float32)
  # The largest score is taken off against overflow; the result does not depend on it.
  weights = jnp.exp(scores - lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
  total = jnp.sum(weights, axis=-1, keepdims=True)
  mixed = jnp.einsum(
    'bhts,bshd->bhtd', dropout(weights).astype(v.dtype), v, preferred_element_type=jnp.float32
  )
  return rearrange((mixed / total).astype(v.dtype), 'b h t d -> b t h d')
