"""Scaled dot-product attention, in the form that the platform runs best."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float

# On a CPU, bytes of scores that are computed at once, about what a core's second-level cache holds,
# and from how many on they are better computed twice than written to memory.
_CACHE = 2**20
_SPILL = 4 * _CACHE


def attention(
  q: Float[Array, 'b t h d'],
  k: Float[Array, 'b s h d'],
  v: Float[Array, 'b s h d'],
  scale: float,
  dropout: Callable[[Array], Array] | None = None,
) -> Float[Array, 'b t h d']:
  """Returns, for every query, the mean of the values weighted by softmax(scale q k^T).

  On CPU, many scores are computed for a few images at a time, so that they stay in the cache, and
  again for the gradient. Elsewhere, and with dropout, all are computed at once. The numbers agree.

  Args:
    q: queries.
    k: keys.
    v: values.
    scale: what the scores are multiplied by before the softmax.
    dropout: applied to the weights; None for none.

  Returns:
    The weighted values in v's dtype; scores and softmax are float32 whatever the inputs are.
  """
  b, t, h, _ = q.shape
  whole = functools.partial(at_once, scale=scale, dropout=dropout)
  image = 4 * t * k.shape[1] * h  # bytes of scores
  if dropout or b * image <= _SPILL:
    return whole(q, k, v)
  few = functools.partial(few_images, scale=scale, images=max(1, _CACHE // image))
  return lax.platform_dependent(q, k, v, cpu=few, default=whole)


def at_once(q, k, v, *, scale, dropout=None):
  """The form for accelerators and few scores: two batched products.

  The softmax's division comes after the second, where it is over d numbers a query in place of s.
  """
  scores = _product('bthd,bshd->bhts', q * scale, k)
  weights = jnp.exp(scores - lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
  total = jnp.sum(weights, axis=-1, keepdims=True)
  if dropout:
    weights = dropout(weights)
  mixed = _product('bhts,bshd->bhtd', weights.astype(v.dtype), v)
  return rearrange((mixed / total).astype(v.dtype), 'b h t d -> b t h d')


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def few_images(q, k, v, scale, images):
  """The form for CPU and many scores: `images` images at a time."""
  return _forward(q, k, v, scale, images)[0]


def _forward(q, k, v, scale, images):
  def image(inputs):
    q, k, v = inputs
    scores = _product('thd,shd->hts', q * scale, k)
    top = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed = _product('hts,shd->htd', weights.astype(v.dtype), v) / total
    return rearrange(mixed.astype(v.dtype), 'h t d -> t h d'), top + jnp.log(total)

  out, log_total = lax.map(image, (q, k, v), batch_size=images)
  return out, (q, k, v, out, log_total)


def _backward(scale, images, residuals, g):
  def image(inputs):
    q, k, v, out, log_total, g = inputs
    weights = jnp.exp(_product('thd,shd->hts', q * scale, k) - log_total)
    dv = _product('hts,thd->shd', weights.astype(v.dtype), g)
    # Through the softmax: its gradient takes off the mean of dweights, which is g . out.
    dweights = _product('thd,shd->hts', g, v)
    dscores = weights * (dweights - _product('thd,thd->ht', g, out)[..., None])
    dscores = dscores.astype(q.dtype)
    dq = scale * _product('hts,shd->thd', dscores, k)
    dk = _product('hts,thd->shd', dscores, q * scale)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)

  return lax.map(image, (*residuals, g), batch_size=images)


few_images.defvjp(_forward, _backward)


def _product(equation, a, b):
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
