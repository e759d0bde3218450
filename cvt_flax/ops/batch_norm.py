"""Batch normalisation over groups of images, with PyTorch's running variance."""

import jax.numpy as jnp
from einops import rearrange, reduce
from jax import lax
from jaxtyping import Array, Float


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

  Returns:
    y: the normalised maps, float32. The variance in it is the biased one, as in PyTorch.
    mean: over the groups, of each group's mean.
    var: over the groups, of each group's unbiased variance (n / (n - 1) times the biased one, n
      values a channel), which is what PyTorch keeps as the running variance.

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
  x = rearrange(x.astype(jnp.float32), '(g n) h w c -> g n h w c', n=size)
  mean = reduce(x, 'g n h w c -> g 1 1 1 c', 'mean')
  var = reduce(jnp.square(x - mean), 'g n h w c -> g 1 1 1 c', 'mean')
  y = (x - mean) * (lax.rsqrt(var + epsilon) * scale) + bias
  y = rearrange(y, 'g n h w c -> (g n) h w c')
  return y, jnp.mean(mean, (0, 1, 2, 3)), jnp.mean(var, (0, 1, 2, 3)) * (n / (n - 1))
