"""A linear layer's product, whose kernel's gradient has the form that the platform runs best."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@jax.custom_vjp
def linear(
  x: Float[Array, '*rows c'], kernel: Float[Array, 'c features']
) -> Float[Array, '*rows features']:
  """Returns x times the kernel, in their dtype."""
  return x @ kernel


def _forward(x, kernel):
  return x @ kernel, (x, kernel)


def _backward(residuals, g):
  x, kernel = residuals
  return g @ kernel.T, lax.platform_dependent(x, g, cpu=merged, default=apart)


linear.defvjp(_forward, _backward)


def merged(x, g):
  """The form for CPU: two matrices. Of more axes XLA first writes a transposed copy."""
  return x.reshape(-1, x.shape[-1]).T @ g.reshape(-1, g.shape[-1])


def apart(x, g):
  """The form for accelerators: a TPU would move rows to merge axes that do not fill its tiles."""
  rows = tuple(range(x.ndim - 1))
  return jnp.tensordot(x, g, (rows, rows))
