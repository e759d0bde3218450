"""CvT: Introducing Convolutions to Vision Transformers (Wu et al. 2021, arXiv 2103.15808).

Every stage embeds its map by a strided convolution, then runs transformer blocks whose queries,
keys and values are depthwise convolutions of the map. The numbers follow the authors' code
(github.com/microsoft/CvT, lib/models/cls_cvt.py at f851e68), and so do the parameters' names.

Shapes: b images, h w a map, n tokens (h w of a map, and one more where there is a class token),
c channels of a stage. Maps are NHWC, tokens [b n c] in the order of the map's rows. The class token
is the last, where cutting it off moves no other; to attention their order is all the same.
"""

import functools
import warnings

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from cvt_flax.models.layers import (
  ACTIVATIONS,
  BatchNorm,
  Dense,
  DenseParameters,
  DepthwiseConv,
  DropPath,
  LayerNorm,
  SequencePool,
  check_images,
  dense,
  dense_init,
  uniform_init,
)
from cvt_flax.models.options import StageOptions, resolve, unknown_attribute
from cvt_flax.ops.attention import attention
from cvt_flax.ops.pooling import average_pool


class ConvEmbed(nn.Module):
  """Convolutional token embedding: a strided convolution with bias, then a layer norm."""

  options: StageOptions
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b h2 w2 c2']:
    o = self.options
    init = uniform_init(o.patch_size**2 * x.shape[-1])
    padding = (o.patch_padding, o.patch_padding)
    x = nn.Conv(
      o.embed_dim,
      (o.patch_size, o.patch_size),
      o.patch_stride,
      (padding, padding),
      dtype=self.dtype,
      kernel_init=init,
      bias_init=init,
      name='proj',
    )(x)
    return LayerNorm(dtype=self.dtype, name='norm')(x)


class ConvProjection(nn.Module):
  """A linear layer over a map, and what stands before it: 'dw_bn', 'dw', 'avg' or 'linear'.

  'dw_bn' is a depthwise convolution and a batch norm, 'dw' the convolution alone, 'avg' average
  pooling, 'linear' nothing.
  """

  options: StageOptions
  kind: str
  stride: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'b h w c'],
    kernel: Float[Array, 'c features'],
    bias: Float[Array, ' features'],
    train: bool,
  ) -> Float[Array, 'b h2 w2 features']:
    o = self.options
    match self.kind:
      case 'dw_bn' | 'dw':
        alone = self.kind == 'dw'
        x = DepthwiseConv(
          o.qkv_kernel, self.stride, o.qkv_padding, alone and o.dw_bias, self.dtype, name='conv'
        )(x)
        if alone:
          return dense(x, kernel, bias)
        return BatchNorm(o.bn_group_size, name='bn')(x, kernel, bias, train)
      case 'avg':
        return dense(average_pool(x, o.qkv_kernel, self.stride, o.qkv_padding), kernel, bias)
      case 'linear':
        return dense(x, kernel, bias)


class Attention(nn.Module):
  """Multi-head attention over convolved queries, keys and values.

  The class token goes round the convolutions and through the linear projections. With `cls_only` it
  alone is a query, and the result is [b 1 c]; the query convolution then still feeds its batch
  norm's statistics in training, and is not computed otherwise.
  """

  options: StageOptions
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b n c'], size: tuple[int, int], train: bool, cls_only: bool = False
  ) -> Float[Array, 'b n2 c']:
    o = self.options
    h, w = size
    x, cls = jnp.split(x, [h * w], axis=1)
    x = rearrange(x, 'b (h w) c -> b h w c', h=h, w=w)

    def project(names, kind, stride):
      """Returns what the linear layers `names` make of one convolution, as tokens [b n h d]."""
      width = o.num_heads * o.head_dim
      layers = [DenseParameters(width, o.qkv_bias, name=f'proj_{n}')(x.shape[-1]) for n in names]
      kernel, bias = (jnp.concatenate(parts, axis=-1) for parts in zip(*layers, strict=True))
      convolution = ConvProjection(o, kind, stride, self.dtype, name=f'conv_proj_{names}')
      tokens = [rearrange(convolution(x, kernel, bias, train), 'b h w c -> b (h w) c')]
      if o.cls_token:
        tokens.append(dense(cls, kernel, bias))
      y = tokens[-1] if cls_only and names == 'q' else jnp.concatenate(tokens, axis=1)
      return rearrange(y, 'b n (p h d) -> p b n h d', p=len(names), h=o.num_heads)

    (q,) = project('q', 'linear' if o.projection == 'avg' else o.projection, o.q_stride)
    if o.shared_kv:
      k, v = project('kv', o.projection, o.kv_stride)
    else:
      (k,), (v,) = (project(name, o.projection, o.kv_stride) for name in 'kv')
    if k.shape[1] == 1:
      warnings.warn(
        f'a {h}x{w} map with kv stride {o.kv_stride} leaves a single key: the softmax over it is '
        'always 1 and attention does nothing. Use kv stride 1, a smaller patch stride or larger '
        'images',
        stacklevel=2,
      )

    drop = train and o.attn_drop_rate > 0
    dropout = nn.Dropout(o.attn_drop_rate, deterministic=False) if drop else None
    # For attention_maps; nothing is kept, or computed, unless 'intermediates' is mutable.
    self.sow('intermediates', 'queries', q)
    self.sow('intermediates', 'keys', k)
    x = rearrange(attention(q, k, v, o.scale, dropout), 'b n h d -> b n (h d)')
    x = Dense(o.embed_dim, o.out_bias, dtype=self.dtype, name='proj')(x)
    return nn.Dropout(o.drop_rate, deterministic=not train)(x)


class Mlp(nn.Module):
  """Two linear layers with an activation in between."""

  options: StageOptions
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Float[Array, 'b n c'], train: bool) -> Float[Array, 'b n c']:
    o = self.options

    def dense(features, name):
      return Dense(features, o.mlp_bias, dtype=self.dtype, name=name)

    dropout = nn.Dropout(o.drop_rate, deterministic=not train)
    x = dropout(ACTIVATIONS[o.activation](dense(o.mlp_dim, 'fc1')(x)))
    return dropout(dense(o.embed_dim, 'fc2')(x))


class Block(nn.Module):
  """A pre-norm transformer block; drop path acts on the two residual branches.

  With `cls_only` the block returns its class token alone, [b 1 c], and computes no more for it.
  """

  options: StageOptions
  drop_path: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b n c'], size: tuple[int, int], train: bool, cls_only: bool = False
  ) -> Float[Array, 'b n2 c']:
    drop_path = DropPath(self.drop_path)
    y = LayerNorm(dtype=self.dtype, name='norm1')(x)
    y = Attention(self.options, self.dtype, name='attn')(y, size, train, cls_only)
    x = (x[:, -1:] if cls_only else x) + drop_path(y, train)
    y = LayerNorm(dtype=self.dtype, name='norm2')(x)
    return x + drop_path(Mlp(self.options, self.dtype, name='mlp')(y, train), train)


class Stage(nn.Module):
  """A convolutional embedding and its blocks."""

  options: StageOptions
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b h w c'], train: bool, cls_only: bool
  ) -> tuple[Float[Array, 'b h2 w2 c2'] | None, Float[Array, 'b m c2']]:
    """Returns the stage's map and its class tokens: m is 1 or, without a class token, 0.

    With `cls_only` there is no map: the last block computes the class token alone.
    """
    o = self.options
    x = ConvEmbed(o, self.dtype, name='patch_embed')(x)
    b, h, w, c = x.shape
    if 0 in (h, w):
      raise ValueError(f'the images are too small: a stage is left with a map of {h}x{w}')
    if o.pos_embed:
      table = self.param('pos_embed', dense_init, (1, o.pos_embed, o.pos_embed, c), jnp.float32)
      if (h, w) != table.shape[1:3]:
        table = jax.image.resize(table, (1, h, w, c), 'bicubic')
      x = x + table.astype(self.dtype)
    x = rearrange(x, 'b h w c -> b (h w) c')
    if o.cls_token:
      cls = self.param('cls_token', dense_init, (1, 1, c), jnp.float32)
      cls = einops.repeat(cls.astype(self.dtype), '1 1 c -> b 1 c', b=b)
      x = jnp.concatenate([x, cls], axis=1)
    x = nn.Dropout(o.embed_drop_rate, deterministic=not train)(x)
    block = Block
    if o.remat:
      policy = getattr(jax.checkpoint_policies, o.remat)
      block = nn.remat(Block, policy=policy, static_argnums=(2, 3, 4))  # all but the tokens
    # The rate of drop path rises from zero inside every stage, as in the authors' code.
    for j, rate in enumerate(o.drop_path_schedule()):
      only = cls_only and j == o.depth - 1
      x = block(o, rate, self.dtype, name=f'blocks_{j}')(x, (h, w), train, only)
    if cls_only:
      return None, x
    x, cls = jnp.split(x, [h * w], axis=1)
    return rearrange(x, 'b (h w) c -> b h w c', h=h, w=w), cls


class CvT(nn.Module):
  """The Convolutional vision Transformer; the defaults are CvT-13.

  A per-stage attribute is a tuple with one entry a stage; () stands for its default.

  Attributes:
    num_classes: length of the logits; 0 returns the pooled features [b c].
    embed_dims: channels of every stage.
    depths: blocks.
    num_heads: attention heads.
    patch_sizes: kernel of the convolutional embedding.
    patch_strides: its stride.
    patch_paddings: its padding on each side.
    mlp_ratios: hidden channels of the MLP, as a multiple of the stage's.
    cls_token: whether the stage has a class token. It does not pass on to the next stage.
    pos_embed: side of the square map that the stage's learnt position embedding is for; maps of
      another size get it resized. 0 is none, and so is (): the convolutions tell positions, as the
      paper's table 5 has it.
    projection: 'dw_bn' (depthwise convolution and batch norm), 'dw' (the convolution alone, as
      `cvt_flax.fold` leaves it), 'avg' (pooled keys and values) or 'linear'.
    qkv_kernels: kernel of the projections, padded by kernel // 2 on each side; () is 3. Not for
      'linear'.
    q_strides: stride of the query convolution; () is 1, the only one that keeps the residual's
      shape. For 'dw_bn' and 'dw'.
    kv_strides: stride of keys and values; () is 2. Not for 'linear'.
    shared_kv: keys and values share one depthwise convolution ('dw_bn' and 'dw').
    head_dim: channels of a head; 0 is embed_dim // num_heads.
    attention_scale: 'embed_dim' (scores times embed_dim ** -0.5, as the authors do) or 'head_dim'.
    qkv_bias, out_bias, mlp_bias: whether those linear layers have a bias.
    activation: 'quick_gelu' (the authors'), 'gelu' (exact) or 'gelu_tanh'.
    drop_rates: dropout of the attention's output and in the MLP; () is 0.
    embed_drop_rates: dropout after the embedding; () is drop_rates.
    attn_drop_rates: dropout of the attention weights; () is 0.
    drop_path_rates: of the last block of the stage, rising linearly from 0 at the first; () is 0.
    pool: what the classifier reads: 'cls', the last stage's class token; 'mean', the mean over its
      map; 'seq', that mean weighted by the softmax of a score that a linear layer gives each pixel.
    final_norm: whether a layer norm stands before the classifier (before the pooling).
    in_channels: of the images.
    bn_group_size: images over which a batch norm takes its training statistics; 0 is the whole
      batch, across all devices ('dw_bn').
    remat: what the stage's blocks keep of the forward pass for the backward pass, which computes
      the rest again: 'nothing_saveable', 'dots_saveable' or 'dots_with_no_batch_dims_saveable', as
      jax.checkpoint_policies has them; '' and () keep everything. Less memory, more time, the same
      numbers.
    dtype: of the computation. Parameters, statistics, softmax and logits are float32.

  Raises:
    ValueError: on construction, naming the attribute, when the attributes do not fit together; on
      application, when the images are not [b h w in_channels].
    TypeError: on construction, for a keyword that is none of these.
  """

  num_classes: int = 1000
  embed_dims: tuple[int, ...] = (64, 192, 384)
  depths: tuple[int, ...] = (1, 2, 10)
  num_heads: tuple[int, ...] = (1, 3, 6)
  patch_sizes: tuple[int, ...] = (7, 3, 3)
  patch_strides: tuple[int, ...] = (4, 2, 2)
  patch_paddings: tuple[int, ...] = (2, 1, 1)
  mlp_ratios: tuple[float, ...] = (4.0, 4.0, 4.0)
  cls_token: tuple[bool, ...] = (False, False, True)
  pos_embed: tuple[int, ...] = ()
  projection: str = 'dw_bn'
  qkv_kernels: tuple[int, ...] = ()
  q_strides: tuple[int, ...] = ()
  kv_strides: tuple[int, ...] = ()
  shared_kv: bool = False
  head_dim: int = 0
  attention_scale: str = 'embed_dim'
  qkv_bias: bool = True
  out_bias: bool = True
  mlp_bias: bool = True
  activation: str = 'quick_gelu'
  drop_rates: tuple[float, ...] = ()
  embed_drop_rates: tuple[float, ...] = ()
  attn_drop_rates: tuple[float, ...] = ()
  drop_path_rates: tuple[float, ...] = (0.0, 0.0, 0.1)
  pool: str = 'cls'
  final_norm: bool = True
  in_channels: int = 3
  bn_group_size: int = 0
  remat: tuple[str, ...] = ()
  dtype: jnp.dtype = jnp.float32

  def __post_init__(self):
    resolve(self)
    super().__post_init__()

  @nn.compact
  def __call__(
    self, images: Float[Array, 'b h w c'], train: bool = False
  ) -> Float[Array, 'b num_classes']:
    """Classifies images.

    Args:
      images: normalised, of any height and width that leave the last stage a pixel.
      train: batch norms use (and update: mutable=['batch_stats']) the batch's statistics, and
        dropouts draw from rngs={'dropout': key}.

    Returns:
      The logits, float32.
    """
    maps, cls = self._stages(images, train, last_map=self.pool != 'cls')
    x = cls if self.pool == 'cls' else rearrange(maps[-1], 'b h w c -> b (h w) c')
    if self.final_norm:
      x = LayerNorm(name='norm')(x)
    x = x.astype(jnp.float32)
    x = SequencePool(name='seq_pool')(x) if self.pool == 'seq' else jnp.mean(x, axis=1)
    if not self.num_classes:
      return x
    return Dense(
      self.num_classes,
      bias_init=lambda key, shape, dtype: uniform_init(x.shape[-1])(key, shape, dtype),
      name='head',
    )(x)

  def stage_maps(
    self, images: Float[Array, 'b h w c'], train: bool = False
  ) -> list[Float[Array, 'b h2 w2 c2']]:
    """Returns the map of every stage as its last block leaves it, without class token or norm.

    With the default patch strides they have strides 4, 8 and 16: a backbone for segmentation and
    detection. Call it as `model.apply(variables, images, method='stage_maps')`.
    """
    return self._stages(images, train, last_map=True)[0]

  @nn.compact
  def _stages(self, images, train, last_map):
    """Returns the maps of all stages, the last one None unless wanted, and its class tokens."""
    check_images(images, self.in_channels)
    x, maps, cls = images.astype(self.dtype), [], None
    stages = resolve(self)
    for s, options in enumerate(stages):
      cls_only = not last_map and s == len(stages) - 1
      x, cls = Stage(options, self.dtype, name=f'stage{s}')(x, train, cls_only)
      maps.append(x)
    return maps, cls


def _naming_unknown_attributes(init):
  """Returns a constructor that says what a keyword that CvT does not have may have meant."""

  @functools.wraps(init)
  def checked(self, *args, **attributes):
    for name in attributes:
      if name not in CvT.__dataclass_fields__:
        raise TypeError(unknown_attribute('CvT', name, CvT.__dataclass_fields__))
    init(self, *args, **attributes)

  return checked


# The one that linen's dataclass has made.
CvT.__init__ = _naming_unknown_attributes(CvT.__init__)
