"""Layer normalisation over the channels, with a gradient in two sums a row.

Of the formula as it stands, automatic differentiation makes a chain of sums, each over what the
one before it gave. XLA on a CPU puts the chain into one loop and computes the inner sums again for
every channel.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float

from cvt_flax.ops.moments import moments


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(
  x: Float[Array, '*rows c'],
  scale: Float[Array, ' c'],
  bias: Float[Array, ' c'],
  epsilon: float,
  dtype: DTypeLike = jnp.float32,
) -> Float[Array, '*rows c']:
  """Returns (x - mean) / sqrt(var + epsilon) * scale + bias, statistics over the last axis.

  All is computed in float32; see `cvt_flax.ops.moments` for the variance.

  Args:
    x: the rows, of any floating dtype.
    scale: gamma, float32.
    bias: beta, float32.
    epsilon: added to the variance.
    dtype: of the result.

  Returns:
    The normalised rows.
  """
  return _forward(x, scale, bias, epsilon, dtype)[0]


def _forward(x, scale, bias, epsilon, dtype):
  rows = x.astype(jnp.float32)
  mean, var = moments(x, (-1,))
  factor = lax.rsqrt(var + epsilon)
  y = (rows - mean) * (factor * scale) + bias
  return y.astype(dtype), (x, scale, mean, factor)


def _backward(_epsilon, _dtype, residuals, g):
  x, scale, mean, factor = residuals
  # Without the barrier XLA would keep float32 copies of bfloat16 rows, and move those.
  rows, g = (a.astype(jnp.float32) for a in lax.optimization_barrier((x, g)))
  normal = (rows - mean) * factor
  scaled = g * scale
  # What moves a row's mean, and what moves its variance, does not move the result.
  along_mean = jnp.mean(scaled, axis=-1, keepdims=True)
  along_row = jnp.mean(scaled * normal, axis=-1, keepdims=True)
  dx = (scaled - along_mean - normal * along_row) * factor
  axes = tuple(range(x.ndim - 1))
  return dx.astype(x.dtype), jnp.sum(g * normal, axes), jnp.sum(g, axes)


layer_norm.defvjp(_forward, _backward)
