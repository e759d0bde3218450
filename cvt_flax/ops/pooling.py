"""Average pooling as PyTorch's AvgPool2d(ceil_mode=True) does it."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def pooled_size(size: int, kernel: int, stride: int, padding: int) -> int:
  """Returns the length of a pooled axis of length `size`, rounded up.

  A window that would start in the padding behind the last pixel is left out.
  """
  windows = -(-(size + 2 * padding - kernel) // stride) + 1
  return windows - ((windows - 1) * stride >= size + padding)


def average_pool(
  x: Float[Array, 'b h w c'], kernel: int, stride: int, padding: int
) -> Float[Array, 'b h2 w2 c']:
  """Averages over windows of kernel x kernel pixels.

  The zeros of the padding count as pixels; what a last window reaches beyond them does not.
  """
  _, h, w, _ = x.shape
  window, strides = (1, kernel, kernel, 1), (1, stride, stride, 1)
  # How far the last window reaches behind the padding; negative where it ends before it.
  beyond = [
    (pooled_size(n, kernel, stride, padding) - 1) * stride + kernel - n - 2 * padding
    for n in (h, w)
  ]

  def window_sums(values, before, after):
    sides = [(before, after + extra) for extra in beyond]
    values = lax.pad(
      values, jnp.zeros((), values.dtype), [(0, 0, 0), *((*s, 0) for s in sides), (0, 0, 0)]
    )
    return lax.reduce_window(values, 0.0, lax.add, window, strides, 'VALID')

  counted = jnp.ones((1, h + 2 * padding, w + 2 * padding, 1), jnp.float32)
  sums = window_sums(x.astype(jnp.float32), padding, padding)
  return (sums / window_sums(counted, 0, 0)).astype(x.dtype)
