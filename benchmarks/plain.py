"""CvT as one would write it in Flax at first: what the fast one is compared with.

Every layer is flax.linen's, the depthwise convolutions are `nn.Conv` with feature_group_count, the
last block is like the others, and gradients are automatic. The names are ours, so that one set of
variables goes into both, and so are the numbers but for one: Flax keeps the biased variance.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange, repeat

from cvt_flax.models import options
from cvt_flax.models.layers import ACTIVATIONS, BATCH_NORM_MOMENTUM, EPSILON

_LayerNorm = functools.partial(nn.LayerNorm, epsilon=EPSILON)


class Projection(nn.Module):
  stride: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x, train):
    c = x.shape[-1]
    x = nn.Conv(
      c,
      (3, 3),
      self.stride,
      ((1, 1), (1, 1)),
      feature_group_count=c,
      use_bias=False,
      dtype=self.dtype,
      name='conv',
    )(x)
    return nn.BatchNorm(not train, momentum=BATCH_NORM_MOMENTUM, dtype=self.dtype, name='bn')(x)


class Attention(nn.Module):
  options: options.StageOptions
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x, size, train):
    o = self.options
    cls, x = jnp.split(x, [int(o.cls_token)], axis=1)
    x = rearrange(x, 'b (h w) c -> b h w c', h=size[0])

    def heads(name, stride):
      y = Projection(stride, self.dtype, name=f'conv_proj_{name}')(x, train)
      y = jnp.concatenate([cls, rearrange(y, 'b h w c -> b (h w) c')], axis=1)
      y = nn.Dense(o.embed_dim, dtype=self.dtype, name=f'proj_{name}')(y)
      return rearrange(y, 'b n (h d) -> b h n d', h=o.num_heads)

    q, k, v = heads('q', 1), heads('k', o.kv_stride), heads('v', o.kv_stride)
    scores = o.scale * jnp.einsum('bhtd,bhsd->bhts', q, k, preferred_element_type=jnp.float32)
    y = jnp.einsum('bhts,bhsd->bhtd', nn.softmax(scores).astype(self.dtype), v)
    y = rearrange(y, 'b h t d -> b t (h d)')
    return nn.Dense(o.embed_dim, dtype=self.dtype, name='proj')(y)


class Mlp(nn.Module):
  options: options.StageOptions
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    o = self.options
    x = ACTIVATIONS[o.activation](nn.Dense(o.mlp_dim, dtype=self.dtype, name='fc1')(x))
    return nn.Dense(o.embed_dim, dtype=self.dtype, name='fc2')(x)


class Block(nn.Module):
  options: options.StageOptions
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x, size, train):
    y = _LayerNorm(dtype=self.dtype, name='norm1')(x)
    x = x + Attention(self.options, self.dtype, name='attn')(y, size, train)
    y = _LayerNorm(dtype=self.dtype, name='norm2')(x)
    return x + Mlp(self.options, self.dtype, name='mlp')(y)


class Embed(nn.Module):
  options: options.StageOptions
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    o = self.options
    side, padding = (o.patch_size,) * 2, ((o.patch_padding,) * 2,) * 2
    x = nn.Conv(o.embed_dim, side, o.patch_stride, padding, dtype=self.dtype, name='proj')(x)
    return _LayerNorm(dtype=self.dtype, name='norm')(x)


class Stage(nn.Module):
  options: options.StageOptions
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x, train):
    o = self.options
    x = Embed(o, self.dtype, name='patch_embed')(x)
    b, h, w, c = x.shape
    x = rearrange(x, 'b h w c -> b (h w) c')
    if o.cls_token:
      cls = self.param('cls_token', nn.initializers.zeros, (1, 1, c)).astype(self.dtype)
      x = jnp.concatenate([repeat(cls, '1 1 c -> b 1 c', b=b), x], axis=1)
    for i in range(o.depth):
      x = Block(o, self.dtype, name=f'blocks_{i}')(x, (h, w), train)
    cls, x = jnp.split(x, [int(o.cls_token)], axis=1)
    return rearrange(x, 'b (h w) c -> b h w c', h=h), cls


class PlainCvT(nn.Module):
  """A CvT of the paper's form: 'dw_bn' projections, a class token in the last stage, no dropout.

  Attributes:
    stages: `options.resolve` of ours.
    num_classes: length of the logits.
    dtype: of the computation.
  """

  stages: tuple[options.StageOptions, ...]
  num_classes: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, images, train=False):
    x, cls = images.astype(self.dtype), None
    for i, stage in enumerate(self.stages):
      x, cls = Stage(stage, self.dtype, name=f'stage{i}')(x, train)
    return nn.Dense(self.num_classes, name='head')(_LayerNorm(name='norm')(cls)[:, 0])


def plain(model):
  """Returns the plain form of one of `VARIANTS`: images [b h w 3] to logits [b num_classes]."""
  return PlainCvT(tuple(options.resolve(model)), model.num_classes, model.dtype)
