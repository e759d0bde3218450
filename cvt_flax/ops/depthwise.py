"""Depthwise 2-D convolution, in the form that the platform runs best.

XLA's convolution with feature_group_count is slow on CPU (jax#23713): there it is nine shifted
multiply-adds with a gradient of their own. Accelerators keep XLA's convolution. The choice is made
for the platform that is compiled for, not for the one that happens to be attached. Both forms take
the same kernel and give the same numbers.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def depthwise_conv(
  x: Float[Array, 'b h w c'], kernel: Float[Array, 'k k 1 c'], stride: int, padding: int
) -> Float[Array, 'b h2 w2 c']:
  """Convolves every channel with its own k x k kernel.

  Args:
    x: the maps.
    kernel: in the layout [height, width, 1, channels] of `flax.linen.Conv`, in x's dtype.
    stride: in both directions.
    padding: zeros on each of the four sides, as PyTorch counts them.

  Returns:
    The maps, floor((h + 2 padding - k) / stride) + 1 high, likewise wide.
  """
  return _forward(x, kernel, stride, padding)


def _forward(x, kernel, stride, padding):
  return lax.platform_dependent(
    x,
    kernel,
    cpu=functools.partial(shifted, stride=stride, padding=padding),
    default=functools.partial(convolved, stride=stride, padding=padding),
  )


def _forward_rule(x, kernel, stride, padding):
  return _forward(x, kernel, stride, padding), (x, kernel)


def _backward_rule(stride, padding, residuals, g):
  x, kernel = residuals

  def convolved_gradient(x, kernel, g):
    return jax.vjp(functools.partial(convolved, stride=stride, padding=padding), x, kernel)[1](g)

  return lax.platform_dependent(
    x,
    kernel,
    g,
    cpu=functools.partial(shifted_gradient, stride=stride, padding=padding),
    default=convolved_gradient,
  )


depthwise_conv.defvjp(_forward_rule, _backward_rule)


def convolved(x, kernel, *, stride, padding):
  """The form for accelerators: XLA's convolution with one group per channel."""
  return lax.conv_general_dilated(
    x,
    kernel,
    window_strides=(stride, stride),
    padding=((padding, padding), (padding, padding)),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=x.shape[-1],
  )


def shifted(x, kernel, *, stride, padding):
  """The form for CPU: a sum of shifted maps, each times one tap of the kernel."""
  _, h, w, _ = x.shape
  rows = (h + 2 * padding - kernel.shape[0]) // stride + 1
  columns = (w + 2 * padding - kernel.shape[1]) // stride + 1
  return _stencil(_pad(x, padding), kernel, stride, rows, columns)


def shifted_gradient(x, kernel, g, *, stride, padding):
  """Returns the gradients of `shifted` for x and the kernel, given that of its result, g.

  For x it is the same stencil with the kernel turned round, over g spread out by the stride; for
  each tap of the kernel one sum over the batch and the map.
  """
  _, h, w, _ = x.shape
  size = kernel.shape[0]
  _, rows, columns, _ = g.shape

  low = size - 1 - padding
  spread = [
    (low, n + size - 1 - low - ((m - 1) * stride + 1), stride - 1)
    for n, m in ((h, rows), (w, columns))
  ]
  spread_g = lax.pad(g, jnp.zeros((), g.dtype), [(0, 0, 0), *spread, (0, 0, 0)])
  dx = _stencil(spread_g, kernel[::-1, ::-1], 1, h, w)

  # One pass over x and g for all taps: separate sums would first write out every shifted map.
  padded = _pad(x, padding)
  products = [
    (_shift(padded, i, j, stride, rows, columns) * g).astype(jnp.float32)
    for i, j in itertools.product(range(size), repeat=2)
  ]
  zeros = [jnp.zeros((), jnp.float32)] * len(products)
  taps = lax.reduce(
    products, zeros, lambda a, b: [m + n for m, n in zip(a, b, strict=True)], (1, 2)
  )
  # The batch last, and by itself: over devices this is then part of the step's one all-reduce,
  # where a reduction of many operands would be an all-gather for each of them.
  return dx, jnp.stack(taps).sum(1).reshape(kernel.shape).astype(kernel.dtype)


def _pad(x, padding):
  return jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))


def _shift(x, i, j, stride, rows, columns):
  """Returns every stride-th pixel of x from (i, j) on, as a map of rows x columns."""
  b, _, _, c = x.shape
  last = (b, i + (rows - 1) * stride + 1, j + (columns - 1) * stride + 1, c)
  return lax.slice(x, (0, i, j, 0), last, (1, stride, stride, 1))


def _stencil(x, kernel, stride, rows, columns):
  return sum(
    _shift(x, i, j, stride, rows, columns) * kernel[i, j, 0]
    for i, j in itertools.product(range(kernel.shape[0]), range(kernel.shape[1]))
  )
