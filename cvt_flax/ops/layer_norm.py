"""Layer normalisation over the channels, with a gradient in two sums a row.

Of the formula as it stands, automatic differentiation makes a chain of sums, each over what the
one before it gave. XLA on a CPU puts the chain into one loop and computes the inner sums again for
every channel.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(
  x: Float[Array, '*rows c'],
  scale: Float[Array, ' c'],
  bias: Float[Array, ' c'],
  epsilon: float,
) -> Float[Array, '*rows c']:
  """Returns (x - mean) / sqrt(var + epsilon) * scale + bias, statistics over the last axis.

  The variance is the mean of the squared differences: the difference of two means loses digits.

  Args:
    x: the rows, of any floating dtype.
    scale: gamma, float32.
    bias: beta, float32.
    epsilon: added to the variance.

  Returns:
    The normalised rows, float32.
  """
  return _forward(x, scale, bias, epsilon)[0]


def _forward(x, scale, bias, epsilon):
  y = x.astype(jnp.float32)
  mean = jnp.mean(y, axis=-1, keepdims=True)
  factor = lax.rsqrt(jnp.mean(jnp.square(y - mean), axis=-1, keepdims=True) + epsilon)
  return (y - mean) * (factor * scale) + bias, (x, scale, mean, factor)


def _backward(_, residuals, g):
  x, scale, mean, factor = residuals
  normal = (x.astype(jnp.float32) - mean) * factor
  scaled = g * scale
  # What moves a row's mean, and what moves its variance, does not move the result.
  along_mean = jnp.mean(scaled, axis=-1, keepdims=True)
  along_row = jnp.mean(scaled * normal, axis=-1, keepdims=True)
  dx = (scaled - along_mean - normal * along_row) * factor
  rows = tuple(range(x.ndim - 1))
  return dx.astype(x.dtype), jnp.sum(g * normal, rows), jnp.sum(g, rows)


layer_norm.defvjp(_forward, _backward)
