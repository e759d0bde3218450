"""A linear layer's product and its gradient, in the forms that the platform runs best."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# Rows of a TPU's tiles.
_TILE = 8


@jax.custom_vjp
def linear(
  x: Float[Array, '*rows c'], kernel: Float[Array, 'c features']
) -> Float[Array, '*rows features']:
  """Returns x times the kernel, in their dtype."""
  return _product(x, kernel)


def _product(x, kernel):
  return lax.platform_dependent(x, kernel, tpu=in_tiles, default=jnp.matmul)


def _forward(x, kernel):
  return _product(x, kernel), (x, kernel)


def _backward(residuals, g):
  x, kernel = residuals
  return _product(g, kernel.T), kernel_gradient(x, g).astype(kernel.dtype)


linear.defvjp(_forward, _backward)


def kernel_gradient(
  x: Float[Array, '*rows c'], g: Float[Array, '*rows features']
) -> Float[Array, 'c features']:
  """Returns x^T g in float32, the gradient of a kernel, given that of the product, g."""
  return lax.platform_dependent(x, g, cpu=merged, tpu=apart_in_tiles, default=apart)


def in_tiles(x, kernel):
  """The form of the product for TPU.

  A class token makes the tokens an odd number. With the batch in the rows of the tiles instead,
  tokens need no padding, and the class token can be cut off without moving the others.
  """
  if _fits(x):
    return x @ kernel
  return (x.swapaxes(0, 1) @ kernel).swapaxes(0, 1)


def merged(x, g):
  """The form for CPU: two matrices. Of more axes XLA first writes a transposed copy."""
  x, g = (a.reshape(-1, a.shape[-1]) for a in (x, g))
  return jnp.matmul(x.T, g, preferred_element_type=jnp.float32)


def apart(x, g):
  """The form for GPU: whatever its library likes best."""
  rows = tuple(range(x.ndim - 1))
  return jnp.tensordot(x, g, (rows, rows), preferred_element_type=jnp.float32)


def apart_in_tiles(x, g):
  """The form for TPU, which would move rows to merge axes that do not fill its tiles."""
  return apart(x, g) if _fits(x) else apart(x.swapaxes(0, 1), g.swapaxes(0, 1))


def _fits(x):
  return x.ndim != 3 or x.shape[1] % _TILE == 0
