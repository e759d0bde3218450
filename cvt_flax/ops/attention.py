"""Scaled dot-product attention, with a gradient that reads the weights as they were stored."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, DTypeLike, Float

# Bytes of an image's scores from which on a CPU computes it by itself.
_LARGE = 2**22


def attention(
  q: Float[Array, 'b t h d'],
  k: Float[Array, 'b s h d'],
  v: Float[Array, 'b s h d'],
  scale: float,
  dropout: Callable[[Array], Array] | None = None,
) -> Float[Array, 'b t h d']:
  """Returns, for every query, the mean of the values weighted by softmax(scale q k^T).

  On CPU, an image with many scores is computed by itself, so that they stay in memory that is at
  hand. The numbers agree.

  Args:
    q: queries.
    k: keys.
    v: values.
    scale: what the scores are multiplied by before the softmax.
    dropout: applied to the weights; None for none.

  Returns:
    The weighted values in v's dtype; scores and softmax are float32 whatever the inputs are.
  """
  whole = functools.partial(at_once, scale=scale, dropout=dropout)
  image = 4 * q.shape[1] * k.shape[1] * q.shape[2]  # bytes of scores
  if dropout or image <= _LARGE:
    return whole(q, k, v)
  each = functools.partial(image_by_image, scale=scale)
  return lax.platform_dependent(q, k, v, cpu=each, default=whole)


def at_once(q, k, v, *, scale, dropout=None):
  """The form for accelerators, and for small images."""
  q, k, v = (rearrange(x, 'b n h d -> b h n d') for x in (q, k, v))
  # The softmax's division is over s weights a query, or over the d numbers that they give.
  divide_first = k.shape[2] < v.shape[3]
  weights, total = _exp_scores(q * scale, k, v.dtype, divide_first)
  if dropout:
    weights = dropout(weights)
  mixed = _product('bhts,bhsd->bhtd', weights, v)
  if not divide_first:
    mixed *= 1 / total
  return rearrange(mixed.astype(v.dtype), 'b h t d -> b t h d')


def image_by_image(q, k, v, *, scale):
  """The form for CPU and large images."""
  # Each as a batch of one.
  q, k, v = (x[:, None] for x in (q, k, v))
  return lax.map(lambda image: at_once(*image, scale=scale), (q, k, v))[:, 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _exp_scores(
  q: Float[Array, 'b h t d'], k: Float[Array, 'b h s d'], dtype: DTypeLike, divide: bool
) -> tuple[Float[Array, 'b h t s'], Float[Array, 'b h t 1']]:
  """Returns exp(q k^T - their largest) in `dtype`, and its sums over the keys in float32.

  With `divide` the first is divided by the second.

  The gradient is of these weights alone. Automatic differentiation would keep the scores, as
  float32, and take their exponential again wherever it is needed.
  """
  return _forward(q, k, dtype, divide)[0]


def _forward(q, k, dtype, divide):
  heads = q.shape[1]
  # Without the barrier XLA for TPUs may take what made q or k into the product, and the softmax,
  # which is many times as much, out of it. It stands where the heads are together: apart they would
  # be copied, which has the same effect.
  q, k = (rearrange(x, 'b h n d -> b n (h d)') for x in (q, k))
  q, k = lax.optimization_barrier((q, k))
  q, k = (rearrange(x, 'b n (h d) -> b h n d', h=heads) for x in (q, k))
  scores = _product('bhtd,bhsd->bhts', q, k)
  weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
  total = jnp.sum(weights, axis=-1, keepdims=True)
  if divide:
    weights /= total
  weights = weights.astype(dtype)
  return (weights, total), (q, k, weights)


def _backward(_, divide, residuals, gradients):
  q, k, weights = residuals
  dweights, dtotal = gradients
  if divide:
    dtotal = -jnp.sum(weights * dweights.astype(jnp.float32), axis=-1, keepdims=True)
  # None goes through the largest: any other number in its place would give the same attention.
  dscores = (weights * (dweights + dtotal)).astype(q.dtype)
  dq = _product('bhts,bhsd->bhtd', dscores, k)
  dk = _product('bhts,bhtd->bhsd', dscores, q)
  return dq.astype(q.dtype), dk.astype(k.dtype)


_exp_scores.defvjp(_forward, _backward)


def _product(equation, a, b):
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
