"""Mean and variance, in as few passes as the values' digits allow."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def moments(
  x: Float[Array, '...'], axes: tuple[int, ...]
) -> tuple[Float[Array, '...'], Float[Array, '...']]:
  """Returns the mean and the biased variance over some axes, which stay with length 1, in float32.

  Of float32 values the variance is the mean of squared differences, of others the difference of two
  means, in one pass. That loses digits when the mean is large, but always fewer than rounding the
  values to 8 bits has lost.
  """
  wide = x.astype(jnp.float32)
  mean = jnp.mean(wide, axes, keepdims=True)
  if x.dtype == jnp.float32:
    return mean, jnp.mean(jnp.square(wide - mean), axes, keepdims=True)
  squares = jnp.mean(jnp.square(wide), axes, keepdims=True)
  return mean, jnp.maximum(squares - jnp.square(mean), 0)
