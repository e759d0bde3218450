"""Batch normalisation over groups of images and the linear layer after it, as one product.

A batch norm multiplies and shifts every channel, so the kernel of the linear layer that follows can
be multiplied in its place: the normalised maps are never written. The gradient has a like form. The
two sums over the maps that a batch norm's gradient needs are sums over the gradient of that kernel,
which is small and there anyway. Running variances are PyTorch's.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float

from cvt_flax.ops import linear
from cvt_flax.ops.moments import moments


def project(
  x: Float[Array, 'b h w c'],
  mean: Float[Array, ' c'],
  var: Float[Array, ' c'],
  scale: Float[Array, ' c'],
  shift: Float[Array, ' c'],
  kernel: Float[Array, 'c features'],
  bias: Float[Array, ' features'],
  epsilon: float,
) -> Float[Array, 'b h w features']:
  """Returns ((x - mean) / sqrt(var + epsilon) * scale + shift) kernel + bias, in x's dtype."""
  gain = lax.rsqrt(var + epsilon) * scale
  y, _ = _folded_product(x[None], mean[None], gain[None], shift, kernel, bias)
  return y[0]


def project_groups(
  x: Float[Array, 'b h w c'],
  scale: Float[Array, ' c'],
  shift: Float[Array, ' c'],
  kernel: Float[Array, 'c features'],
  bias: Float[Array, ' features'],
  group_size: int,
  epsilon: float,
) -> tuple[Float[Array, 'b h w features'], Float[Array, ' c'], Float[Array, ' c']]:
  """Normalises every group of `group_size` consecutive images by its own statistics, and projects.

  A group is what one GPU's batch is to PyTorch's BatchNorm2d under DistributedDataParallel. A
  group that lies within a device needs no communication.

  Args:
    x: the maps.
    scale: gamma of the batch norm.
    shift: its beta.
    kernel: of the linear layer, float32.
    bias: of the linear layer, float32.
    group_size: images to a group; must divide b. 0 means all b.
    epsilon: added to the variance.

  Returns:
    y: the projected maps, in x's dtype. The variance in it is the biased one, as in PyTorch.
    mean: over the groups, of each group's mean.
    var: over the groups, of each group's unbiased variance (n / (n - 1) times the biased one, n
      values a channel), which is what PyTorch keeps as the running variance. Neither passes on a
      gradient.

  Raises:
    ValueError: when the batch does not divide into groups, or a group has one value a channel.
  """
  b, h, w, _ = x.shape
  if not b:
    raise ValueError('batch normalisation of no images: there are no statistics')
  size = group_size or b
  if b % size:
    raise ValueError(f'bn_group_size={size} does not divide the batch of {b} images')
  n = size * h * w
  if n == 1:
    raise ValueError(
      'batch normalisation of one image with a 1x1 map: a single value has no variance. '
      'Train with at least 2 images to a group'
    )
  x = rearrange(x, '(g n) h w c -> g n h w c', n=size)
  scale, shift, kernel, bias = (a.astype(jnp.float32) for a in (scale, shift, kernel, bias))
  y, mean, var = _project_groups(x, scale, shift, kernel, bias, epsilon)
  y = rearrange(y, 'g n h w c -> (g n) h w c')
  mean, var = (lax.stop_gradient(jnp.mean(a, 0)) for a in (mean, var))
  return y, mean, var * (n / (n - 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _project_groups(x: Float[Array, 'g n h w c'], scale, shift, kernel, bias, epsilon):
  """Returns the projected groups, and their means and biased variances [g c] in float32."""
  return _forward(x, scale, shift, kernel, bias, epsilon)[0]


def _forward(x, scale, shift, kernel, bias, epsilon):
  mean, var = (rearrange(a, 'g 1 1 1 c -> g c') for a in moments(x, (1, 2, 3)))
  factor = lax.rsqrt(var + epsilon)
  y, folded = _folded_product(x, mean, factor * scale, shift, kernel, bias)
  return (y, mean, var), (x, scale, shift, kernel, mean, factor, folded)


def _backward(_epsilon, residuals, gradients):
  x, scale, shift, kernel, mean, factor, folded = residuals
  g, *_ = gradients  # the statistics pass none on
  gain = factor * scale
  values = x[0, ..., 0].size
  # Two sums over a group's maps, of g [g features] and of (x - mean) g [g c features]; all other
  # gradients are made of them.
  g_sum = jnp.sum(g.astype(jnp.float32), (1, 2, 3))
  xg_sum = _kernel_gradients(x, g) - mean[:, :, None] * g_sum[:, None]
  dkernel = _exact('gc,gcf->cf', gain, xg_sum) + _exact('c,gf->cf', shift, g_sum)
  dshift = _exact('gf,cf->gc', g_sum, kernel)
  dscale = factor * _exact('gcf,cf->gc', xg_sum, kernel)
  # What moves a group's mean, and what moves its variance, does not move the result.
  slope = gain * factor * dscale / values
  level = gain * dshift / values - slope * mean
  dx = _product(g, folded.swapaxes(1, 2)) - _wide(slope) * x - _wide(level)
  return dx.astype(x.dtype), dscale.sum(0), dshift.sum(0), dkernel, g_sum.sum(0)


_project_groups.defvjp(_forward, _backward)


def _folded_product(x, mean, gain, shift, kernel, bias):
  """Returns the groups normalised and projected, and the kernels that did both [g c features]."""
  folded = (gain[:, :, None] * kernel).astype(x.dtype)
  # Of the mean the very product that it has in x, rounded kernel and all, is taken away.
  level = _exact('c,cf->f', shift, kernel) + bias - _exact('gc,gcf->gf', mean, folded)
  return (_product(x, folded) + _wide(level)).astype(x.dtype), folded


def _product(x, kernels):
  return jnp.einsum('gnhwc,gcf->gnhwf', x, kernels, preferred_element_type=jnp.float32)


def _kernel_gradients(x, g):
  """Returns x^T g of each group [g c features], in float32.

  Of a batch of one XLA on a CPU transposes an operand before the product, and computes what made
  it, a depthwise convolution, again in that order.
  """
  if len(x) == 1:
    return linear.kernel_gradient(x[0], g[0])[None]
  return jax.vmap(linear.kernel_gradient)(x, g)


def _exact(equation, *operands):
  """Returns an einsum of small operands in float32, of all their digits on every platform."""
  operands = (a.astype(jnp.float32) for a in operands)
  return jnp.einsum(equation, *operands, precision=lax.Precision.HIGHEST)


def _wide(a: Float[Array, 'g c']) -> Float[Array, 'g 1 1 1 c']:
  return a[:, None, None, None]
