"""Batch normalisation over groups of images: PyTorch's running variance, a gradient of its own."""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from jax import lax
from jaxtyping import Array, DTypeLike, Float


def normalize(
  x: Float[Array, 'b h w c'],
  mean: Float[Array, ' c'],
  var: Float[Array, ' c'],
  scale: Float[Array, ' c'],
  bias: Float[Array, ' c'],
  epsilon: float,
) -> Float[Array, 'b h w c']:
  """Returns (x - mean) / sqrt(var + epsilon) * scale + bias with given statistics, in float32."""
  factor = lax.rsqrt(var + epsilon) * scale
  return x.astype(jnp.float32) * factor + (bias - mean * factor)


def normalize_groups(
  x: Float[Array, 'b h w c'],
  scale: Float[Array, ' c'],
  bias: Float[Array, ' c'],
  group_size: int,
  epsilon: float,
  dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, 'b h w c'], Float[Array, ' c'], Float[Array, ' c']]:
  """Normalises every group of `group_size` consecutive images by its own statistics.

  A group is what one GPU's batch is to PyTorch's BatchNorm2d under DistributedDataParallel. A
  group that lies within a device needs no communication.

  Args:
    x: the maps.
    scale: gamma.
    bias: beta.
    group_size: images to a group; must divide b. 0 means all b.
    epsilon: added to the variance.
    dtype: of the maps that are returned; all is computed in float32.

  Returns:
    y: the normalised maps. The variance in it is the biased one, as in PyTorch.
    mean: over the groups, of each group's mean.
    var: over the groups, of each group's unbiased variance (n / (n - 1) times the biased one, n
      values a channel), which is what PyTorch keeps as the running variance. Neither passes on a
      gradient.

  Raises:
    ValueError: when the batch does not divide into groups, or a group has one value a channel.
  """
  b, h, w, _ = x.shape
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
  y, mean, var = _normalized(x, scale, bias, epsilon, dtype)
  y = rearrange(y, 'g n h w c -> (g n) h w c')
  mean, var = (lax.stop_gradient(jnp.mean(a, (0, 1, 2, 3))) for a in (mean, var))
  return y, mean, var * (n / (n - 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normalized(x: Float[Array, 'g n h w c'], scale, bias, epsilon, dtype):
  """Returns the normalised groups, and their means and variances [g 1 1 1 c] in float32.

  Its gradient takes two sums over the maps. Automatic differentiation makes a chain of them, each
  over what the one before it gave.
  """
  return _forward(x, scale, bias, epsilon, dtype)[0]


def _forward(x, scale, bias, epsilon, dtype):
  maps = x.astype(jnp.float32)
  mean = reduce(maps, 'g n h w c -> g 1 1 1 c', 'mean')
  var = reduce(jnp.square(maps - mean), 'g n h w c -> g 1 1 1 c', 'mean')
  factor = lax.rsqrt(var + epsilon)
  y = (maps - mean) * (factor * scale) + bias
  return (y.astype(dtype), mean, var), (x, scale, mean, factor)


def _backward(_epsilon, _dtype, residuals, gradients):
  x, scale, mean, factor = residuals
  g, *_ = gradients  # the statistics pass none on
  # Without the barrier XLA would keep float32 copies of bfloat16 maps.
  maps, g = (a.astype(jnp.float32) for a in lax.optimization_barrier((x, g)))
  normal = (maps - mean) * factor
  # What moves a group's mean, and what moves its variance, does not move the result.
  along_mean = reduce(g, 'g n h w c -> g 1 1 1 c', 'mean')
  along_map = reduce(g * normal, 'g n h w c -> g 1 1 1 c', 'mean')
  dx = (g - along_mean - normal * along_map) * (factor * scale)
  values = x[0, ..., 0].size
  dscale, dbias = (values * jnp.sum(a, (0, 1, 2, 3)) for a in (along_map, along_mean))
  return dx.astype(x.dtype), dscale, dbias


_normalized.defvjp(_forward, _backward)
