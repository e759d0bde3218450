"""Compact vision transformers: one transformer over patches, or over a few convolutions' pixels.

Two code bases have them, and both can be had here, to the last number that they describe:

* c-ViT, of github.com/tintn/vision-transformer-from-scratch (vit.py), a ViT
  (https://arxiv.org/abs/2010.11929) for 32x32 pixels with a class token, and mc-ViT, the same with
  sequence pooling in its place, of github.com/francischen0724
  (Image-classification-by-CVT-based-on-Vit-from-scratch-draft, vit.py).
* CCT of "Escaping the Big Data Paradigm with Compact Transformers"
  (https://arxiv.org/abs/2104.05704), github.com/SHI-Labs/Compact-Transformers (src/), whose tokens
  come from convolutions.

Shapes: b images, h w a map, n tokens (and one more where there is a class token), c channels.
"""

import typing

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jaxtyping import Array, Float

from cvt_flax.models.compact_options import CompactOptions, check_size, resolve_compact
from cvt_flax.models.cvt import Mlp
from cvt_flax.models.layers import (
  Dense,
  DropPath,
  LayerNorm,
  SequencePool,
  check_images,
  dense_init,
)
from cvt_flax.ops.attention import attention


class PatchEmbed(nn.Module):
  """Patches, side by side, each through the same linear layer."""

  options: CompactOptions
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w 3']) -> Float[Array, 'b h2 w2 c']:
    size = (self.options.patch_size,) * 2
    return nn.Conv(
      self.options.embed_dim,
      size,
      size,
      padding='VALID',
      dtype=self.dtype,
      kernel_init=dense_init,
      name='proj',
    )(x)


class ConvTokenizer(nn.Module):
  """CCT's tokenizer: convolutions without bias, each with ReLU and max pooling 3x3, stride 2."""

  options: CompactOptions
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w 3']) -> Float[Array, 'b h2 w2 c']:
    o = self.options
    for i, channels in enumerate(o.conv_channels()):
      x = nn.Conv(
        channels,
        (o.patch_size,) * 2,
        o.conv_stride,
        ((o.conv_padding,) * 2,) * 2,
        use_bias=False,
        dtype=self.dtype,
        kernel_init=nn.initializers.variance_scaling(2, 'fan_in', 'normal'),  # He's, uncut
        name=f'conv_{i}',
      )(x)
      x = nn.max_pool(nn.relu(x), (3, 3), (2, 2), ((1, 1), (1, 1)))
    return x


class Attention(nn.Module):
  """Multi-head attention; one linear layer makes queries, keys and values of all heads.

  With `cls_only` the class token alone is a query, and the result is [b 1 c].

  Sows 'queries' [b n h d] and 'keys' [b n h d] into 'intermediates', without cost unless that
  collection is mutable.
  """

  options: CompactOptions
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b n c'], train: bool, cls_only: bool = False
  ) -> Float[Array, 'b n2 c']:
    o = self.options

    def dense(features, use_bias, name):
      return Dense(features, use_bias, dtype=self.dtype, name=name)

    qkv = dense(3 * o.embed_dim, o.qkv_bias, 'qkv')(x)
    q, k, v = rearrange(qkv, 'b n (p h d) -> p b n h d', p=3, h=o.num_heads)
    if cls_only:
      q = q[:, -1:]
    self.sow('intermediates', 'queries', q)
    self.sow('intermediates', 'keys', k)
    drop = train and o.attn_drop_rate > 0
    dropout = nn.Dropout(o.attn_drop_rate, deterministic=False) if drop else None
    x = rearrange(attention(q, k, v, o.scale, dropout), 'b n h d -> b n (h d)')
    return nn.Dropout(o.drop_rate, deterministic=not train)(dense(o.embed_dim, True, 'proj')(x))


class Block(nn.Module):
  """A pre-norm transformer block; drop path acts on the two residual branches.

  With `cls_only` the block returns its class token alone, [b 1 c], and computes no more for it.
  """

  options: CompactOptions
  drop_path: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b n c'], train: bool, cls_only: bool = False
  ) -> Float[Array, 'b n2 c']:
    o, drop_path = self.options, DropPath(self.drop_path)
    y = LayerNorm(dtype=self.dtype, name='norm1')(x)
    y = Attention(o, self.dtype, name='attn')(y, train, cls_only)
    x = (x[:, -1:] if cls_only else x) + drop_path(y, train)
    y = LayerNorm(dtype=self.dtype, name='norm2')(x)
    if o.residual_norm:
      x = y
    return x + drop_path(Mlp(o, self.dtype, name='mlp')(y, train), train)


class CompactViT(nn.Module):
  """A compact vision transformer; the defaults are c-ViT, and with pool='seq' mc-ViT.

  Attributes:
    num_classes: length of the logits; 0 returns the pooled features [b c].
    image_size: height and width of the images that a learnable position embedding is for.
    width: channels of a token.
    depth: blocks.
    heads: attention heads.
    mlp_ratio: hidden channels of the MLP, as a multiple of the width.
    patch_size: side of a patch; with `conv_layers` the kernel of the convolutions, whose stride is
      max(1, patch_size // 2 - 1) and whose padding max(1, patch_size // 2).
    conv_layers: convolutions of CCT's tokenizer; 0 is patches.
    pool: what the classifier reads: 'cls', a class token; 'seq', the mean of the tokens weighted by
      the softmax of a score that a linear layer gives each; 'mean', their mean.
    position: what is added to the tokens: 'learnable', 'sine' (of their number in the sequence) or
      'none'.
    residual_norm: the norm before the MLP replaces what the MLP is added to as well, as in
      SHI-Labs' code.
    final_norm: whether a layer norm stands before the pooling.
    qkv_bias: whether queries, keys and values have a bias.
    activation: 'gelu_tanh', 'gelu' (exact) or 'quick_gelu'.
    drop_rate: dropout after the position embedding, the attention's output and in the MLP.
    attn_drop_rate: dropout of the attention weights.
    drop_path_rate: of the last block, rising linearly from 0 at the first.
    dtype: of the computation. Parameters, softmax and logits are float32.

  Raises:
    ValueError: on construction, naming the attribute, when the attributes do not fit together.
  """

  in_channels: typing.ClassVar[int] = 3  # of the images

  num_classes: int = 10
  image_size: int = 32
  width: int = 48
  depth: int = 4
  heads: int = 4
  mlp_ratio: float = 4.0
  patch_size: int = 4
  conv_layers: int = 0
  pool: str = 'cls'
  position: str = 'learnable'
  residual_norm: bool = False
  final_norm: bool = False
  qkv_bias: bool = True
  activation: str = 'gelu_tanh'
  drop_rate: float = 0.0
  attn_drop_rate: float = 0.0
  drop_path_rate: float = 0.0
  dtype: jnp.dtype = jnp.float32

  def __post_init__(self):
    resolve_compact(self)
    super().__post_init__()

  @nn.compact
  def __call__(
    self, images: Float[Array, 'b h w c'], train: bool = False
  ) -> Float[Array, 'b num_classes']:
    """Classifies images.

    Args:
      images: normalised, of 3 channels; image_size x image_size where positions are learnt, else of
        any size that leaves a token, and that patches divide.
      train: dropouts draw from rngs={'dropout': key}.

    Returns:
      The logits, float32.
    """
    o = resolve_compact(self)
    check_images(images, self.in_channels)
    check_size(self, o, *images.shape[1:3])
    tokenizer = (
      ConvTokenizer(o, self.dtype, name='tokenizer')
      if o.conv_layers
      else PatchEmbed(o, self.dtype, name='patch_embed')
    )
    x = rearrange(tokenizer(images.astype(self.dtype)), 'b h w c -> b (h w) c')
    if o.cls_token:
      cls = self.param('cls_token', dense_init, (1, 1, self.width), jnp.float32)
      x = jnp.concatenate([repeat(cls.astype(self.dtype), '1 1 c -> b 1 c', b=len(x)), x], axis=1)
    x = self._add_position(x)
    if o.cls_token:
      x = jnp.roll(x, -1, axis=1)  # the first has the first position, but the last place, as in CvT
    x = nn.Dropout(self.drop_rate, deterministic=not train)(x)
    for j, rate in enumerate(o.drop_path_schedule()):
      # The classifier reads the class token alone, so the last block computes no more.
      cls_only = o.cls_token and j == o.depth - 1
      x = Block(o, rate, self.dtype, name=f'blocks_{j}')(x, train, cls_only)
    if self.final_norm:
      x = LayerNorm(name='norm')(x)
    x = x.astype(jnp.float32)
    x = SequencePool(name='seq_pool')(x) if self.pool == 'seq' else jnp.mean(x, axis=1)
    if not self.num_classes:
      return x
    return Dense(self.num_classes, name='head')(x)

  def _add_position(self, x):
    _, n, c = x.shape
    match self.position:
      case 'learnable':
        # What each code base begins with: c-ViT 0.02, CCT 0.2.
        init = nn.initializers.normal(0.2 if self.conv_layers else 0.02)
        return x + self.param('pos_embed', init, (1, n, c), jnp.float32).astype(self.dtype)
      case 'sine':
        return x + sine_embedding(n, c).astype(self.dtype)
      case 'none':
        return x


def sine_embedding(n: int, c: int) -> Float[np.ndarray, 'n c']:
  """Returns sines and cosines of the positions 0 to n - 1, in turn, float32.

  Channels 2 i and 2 i + 1 turn by 10000 ** (-2 i / c) from one position to the next
  (https://arxiv.org/abs/1706.03762).
  """
  angles = np.arange(n)[:, None] / 10000 ** (2 * np.arange(c // 2) / c)
  pairs = np.stack([np.sin(angles), np.cos(angles)], axis=-1)
  return pairs.reshape(n, c).astype(np.float32)
