"""The layers below CvT: depthwise convolution, normalisations, drop path, activations."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cvt_flax.ops.batch_norm import project, project_groups
from cvt_flax.ops.depthwise import depthwise_conv
from cvt_flax.ops.layer_norm import layer_norm
from cvt_flax.ops.linear import linear

# PyTorch's defaults, which the official model keeps: torch.nn.LayerNorm and BatchNorm2d have
# epsilon 1e-5; BatchNorm2d's momentum 0.1 is 0.9 in Flax's terms.
EPSILON = 1e-5
BATCH_NORM_MOMENTUM = 0.9

# timm's trunc_normal_(std=0.02) cuts at -2 and 2, a hundred standard deviations away.
dense_init = nn.initializers.normal(stddev=0.02)


def check_images(images: Array, channels: int) -> None:
  """Raises a ValueError when images are not [b h w channels]."""
  if images.ndim != 4 or images.shape[-1] != channels:
    raise ValueError(
      f'in_channels={channels}: images [b h w {channels}] are needed, these are '
      f'{list(images.shape)}'
    )


def uniform_init(fan_in: int) -> nn.initializers.Initializer:
  """Returns PyTorch's default for weights and biases: uniform within 1 / sqrt(fan_in)."""
  bound = fan_in**-0.5

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def quick_gelu(x: Array) -> Array:
  """Returns x sigmoid(1.702 x), the activation that the official weights were trained with."""
  return x * nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
  """Returns the exact GELU, by the error function."""
  return nn.gelu(x, approximate=False)


def gelu_tanh(x: Array) -> Array:
  """Returns the GELU with a hyperbolic tangent in place of the error function."""
  return nn.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  'quick_gelu': quick_gelu,
  'gelu': gelu,
  'gelu_tanh': gelu_tanh,
}


def dense(
  x: Float[Array, '*rows c'], kernel: Float[Array, 'c features'], bias: Float[Array, ' features']
) -> Float[Array, '*rows features']:
  """Returns x kernel + bias in x's dtype."""
  return linear(x, kernel.astype(x.dtype)) + bias.astype(x.dtype)


class Dense(nn.Dense):
  """A linear layer over the last axis, [*rows c] to [*rows features]; see `cvt_flax.ops.linear`."""

  kernel_init: nn.initializers.Initializer = dense_init
  dot_general: Callable = lambda x, kernel, *_, **__: linear(x, kernel)


class LayerNorm(nn.Module):
  """Layer normalisation over the last axis, computed in float32; see `cvt_flax.ops.layer_norm`.

  Attributes:
    dtype: of the result.
  """

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, '*rows c']) -> Float[Array, '*rows c']:
    scale = self.param('scale', nn.initializers.ones, x.shape[-1:], jnp.float32)
    bias = self.param('bias', nn.initializers.zeros, x.shape[-1:], jnp.float32)
    scale, bias = scale.astype(jnp.float32), bias.astype(jnp.float32)  # whatever they were made
    return layer_norm(x, scale, bias, EPSILON, self.dtype)


class DepthwiseConv(nn.Module):
  """A depthwise convolution; see `cvt_flax.ops.depthwise` for its two forms.

  Attributes:
    kernel_size: height and width.
    stride: in both directions.
    padding: zeros on each side.
    use_bias: whether it has a bias.
    dtype: of the computation.
  """

  kernel_size: int
  stride: int
  padding: int
  use_bias: bool = False
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b h2 w2 c']:
    shape = (self.kernel_size, self.kernel_size, 1, x.shape[-1])
    init = uniform_init(self.kernel_size**2)
    kernel = self.param('kernel', init, shape)
    x = depthwise_conv(x.astype(self.dtype), kernel.astype(self.dtype), self.stride, self.padding)
    if not self.use_bias:
      return x
    return x + self.param('bias', init, shape[-1:]).astype(self.dtype)


class DenseParameters(nn.Module):
  """The kernel [c features] and bias [features] of a linear layer that something else applies.

  The bias is zero where there is none.

  Attributes:
    features: length of the result.
    use_bias: whether it has a bias.
  """

  features: int
  use_bias: bool

  @nn.compact
  def __call__(self, c: int) -> tuple[Float[Array, 'c features'], Float[Array, ' features']]:
    kernel = self.param('kernel', dense_init, (c, self.features), jnp.float32)
    if not self.use_bias:
      return kernel, jnp.zeros(self.features, jnp.float32)
    return kernel, self.param('bias', nn.initializers.zeros, (self.features,), jnp.float32)


class BatchNorm(nn.Module):
  """Batch normalisation, and a linear layer after it; see `cvt_flax.ops.batch_norm`.

  Collections: 'params' (scale, bias) and 'batch_stats' (mean, var), all [c] and float32.

  Attributes:
    group_size: images over which training statistics are taken; 0 means the whole batch.
  """

  group_size: int = 0

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'b h w c'],
    kernel: Float[Array, 'c features'],
    bias: Float[Array, ' features'],
    train: bool,
  ) -> Float[Array, 'b h w features']:
    """Returns the normalised maps times the kernel, plus the bias, in x's dtype."""
    c = x.shape[-1]
    scale = self.param('scale', nn.initializers.ones, (c,), jnp.float32)
    shift = self.param('bias', nn.initializers.zeros, (c,), jnp.float32)
    running_mean = self.variable('batch_stats', 'mean', jnp.zeros, (c,), jnp.float32)
    running_var = self.variable('batch_stats', 'var', jnp.ones, (c,), jnp.float32)
    if not train:
      return project(x, running_mean.value, running_var.value, scale, shift, kernel, bias, EPSILON)
    y, mean, var = project_groups(x, scale, shift, kernel, bias, self.group_size, EPSILON)
    if not self.is_initializing():
      m = BATCH_NORM_MOMENTUM
      running_mean.value = m * running_mean.value + (1 - m) * mean
      running_var.value = m * running_var.value + (1 - m) * var
    return y


class DropPath(nn.Module):
  """Stochastic depth: drops a whole residual branch, for each image on its own.

  Kept branches are divided by the probability of keeping them (timm's DropPath).

  Attributes:
    rate: the probability of dropping.
  """

  rate: float

  @nn.compact
  def __call__(self, x: Float[Array, 'b n c'], train: bool) -> Float[Array, 'b n c']:
    if not train or self.rate == 0:
      return x
    keep = 1 - self.rate
    mask = jax.random.bernoulli(self.make_rng('dropout'), keep, (x.shape[0], 1, 1))
    return jnp.where(mask, x / keep, jnp.zeros_like(x))


class SequencePool(nn.Module):
  """The mean of the tokens, weighted by the softmax of a score that a linear layer gives each.

  The sequence pooling of https://arxiv.org/abs/2104.05704. The bias of the score changes nothing:
  it is there because both code bases have it. Sows 'weights' [b n] into 'intermediates', without
  cost unless that collection is mutable.
  """

  @nn.compact
  def __call__(self, x: Float[Array, 'b n c']) -> Float[Array, 'b c']:
    scores = Dense(1, name='score')(x)[..., 0]
    weights = nn.softmax(scores.astype(jnp.float32), axis=-1)
    self.sow('intermediates', 'weights', weights)
    return jnp.einsum('bn,bnc->bc', weights, x)
