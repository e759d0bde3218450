"""What a CvT's attributes mean for each of its stages, and which do not fit together."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterable

import numpy as np

from cvt_flax.errors import nearest
from cvt_flax.models.layers import ACTIVATIONS
from cvt_flax.ops.pooling import pooled_size

if typing.TYPE_CHECKING:
  from cvt_flax.models.cvt import CvT

PROJECTIONS = ('dw_bn', 'dw', 'avg', 'linear')
ATTENTION_SCALES = ('embed_dim', 'head_dim')
POOLS = ('cls', 'seq', 'mean')
# Of jax.checkpoint_policies; '' keeps everything.
REMAT_POLICIES = ('', 'dots_saveable', 'dots_with_no_batch_dims_saveable', 'nothing_saveable')


@dataclasses.dataclass(frozen=True)
class StageOptions:
  """The attributes of one stage; see `cvt_flax.models.cvt.CvT` for what they mean."""

  embed_dim: int
  depth: int
  num_heads: int
  head_dim: int
  patch_size: int
  patch_stride: int
  patch_padding: int
  mlp_dim: int
  cls_token: bool
  pos_embed: int
  projection: str
  qkv_kernel: int
  q_stride: int
  kv_stride: int
  shared_kv: bool
  scale: float
  qkv_bias: bool
  out_bias: bool
  mlp_bias: bool
  activation: str
  drop_rate: float
  embed_drop_rate: float
  attn_drop_rate: float
  drop_path_rate: float
  bn_group_size: int
  remat: str

  @property
  def qkv_padding(self) -> int:
    return self.qkv_kernel // 2

  @property
  def dw_bias(self) -> bool:
    """Whether a depthwise convolution alone has a bias: where the linear layer's does not do.

    A class token goes through the linear layer and not through the convolution.
    """
    return self.cls_token or not self.qkv_bias

  def drop_path_schedule(self) -> list[float]:
    """Returns the drop path rate of every block: linear from 0 to drop_path_rate."""
    return np.linspace(0, self.drop_path_rate, self.depth).tolist()

  def map_size(self, height: int, width: int) -> tuple[int, int]:
    """Returns the size of the stage's map for an input of height x width."""
    return tuple(
      (n + 2 * self.patch_padding - self.patch_size) // self.patch_stride + 1
      for n in (height, width)
    )

  def key_map_size(self, height: int, width: int) -> tuple[int, int]:
    """Returns the size of the map of keys (and values) for a stage map of height x width."""
    kernel, stride, padding = self.qkv_kernel, self.kv_stride, self.qkv_padding
    match self.projection:
      case 'dw_bn' | 'dw':
        return tuple((n + 2 * padding - kernel) // stride + 1 for n in (height, width))
      case 'avg':
        return tuple(pooled_size(n, kernel, stride, padding) for n in (height, width))
      case _:
        return height, width


def unknown_attribute(model: str, name: str, allowed: Iterable[str]) -> str:
  """Returns the message for a keyword that is no attribute of the class `model`."""
  if re.match(r's\d_', name):
    return f'{model} has no attribute {name!r}: keywords by stage are those of cvt_flax.compat.CvT'
  return f'{model} has no attribute {name!r}{nearest(name, allowed)}'


def choice(model, name: str, allowed: tuple[str, ...]) -> str:
  """Returns an attribute of `model`.

  Raises:
    ValueError: it is none of `allowed`.
  """
  value = getattr(model, name)
  if value not in allowed:
    raise ValueError(
      f'{name}={value!r}: one of {", ".join(allowed)} is needed{nearest(str(value), allowed)}'
    )
  return value


def resolve(model: CvT) -> list[StageOptions]:
  """Returns the options of every stage of `model`.

  Raises:
    ValueError: naming the attribute that is out of range or does not fit the others.
  """
  stages = len(model.embed_dims)
  if not stages:
    raise ValueError('embed_dims: at least one stage is needed')

  def per_stage(name, default=None, low=None):
    values = getattr(model, name)
    if not isinstance(values, tuple | list):
      raise ValueError(f'{name}={values!r}: one entry for each of the {stages} stages is needed')
    if not values and default is not None:
      values = (default,) * stages
    if len(values) != stages:
      raise ValueError(
        f'{name} has {len(values)} entries, embed_dims has {stages}: one a stage is needed'
      )
    if low is not None and any(v < low for v in values):
      raise ValueError(f'{name}={tuple(values)}: at least {low} is needed')
    return values

  def rates(name):
    values = per_stage(name, default=0.0)
    if any(not 0 <= v < 1 for v in values):
      raise ValueError(f'{name}={tuple(values)}: rates from 0 up to, not including, 1 are needed')
    return values

  projection = choice(model, 'projection', PROJECTIONS)
  scale_of = choice(model, 'attention_scale', ATTENTION_SCALES)
  activation = choice(model, 'activation', tuple(ACTIVATIONS))
  pool = choice(model, 'pool', POOLS)

  unused = {
    'dw_bn': (),
    'dw': ('bn_group_size',),
    'avg': ('q_strides', 'shared_kv', 'bn_group_size'),
    'linear': ('qkv_kernels', 'q_strides', 'kv_strides', 'shared_kv', 'bn_group_size'),
  }[projection]
  for name in unused:
    if getattr(model, name):
      raise ValueError(f'{name}={getattr(model, name)!r}: projection={projection!r} has none')
  for name, low in (('num_classes', 0), ('in_channels', 1), ('head_dim', 0), ('bn_group_size', 0)):
    if getattr(model, name) < low:
      raise ValueError(f'{name}={getattr(model, name)}: at least {low} is needed')

  linear = projection == 'linear'
  columns = {
    'embed_dim': per_stage('embed_dims', low=1),
    'depth': per_stage('depths', low=1),
    'num_heads': per_stage('num_heads', low=1),
    'patch_size': per_stage('patch_sizes', low=1),
    'patch_stride': per_stage('patch_strides', low=1),
    'patch_padding': per_stage('patch_paddings', low=0),
    'mlp_ratio': per_stage('mlp_ratios'),
    'cls_token': per_stage('cls_token', default=False),
    'pos_embed': per_stage('pos_embed', default=0, low=0),
    'qkv_kernel': per_stage('qkv_kernels', default=1 if linear else 3, low=1),
    'q_stride': per_stage('q_strides', default=1, low=1),
    'kv_stride': per_stage('kv_strides', default=1 if linear else 2, low=1),
    'drop_rate': rates('drop_rates'),
    'embed_drop_rate': rates('embed_drop_rates' if model.embed_drop_rates else 'drop_rates'),
    'attn_drop_rate': rates('attn_drop_rates'),
    'drop_path_rate': rates('drop_path_rates'),
    'remat': per_stage('remat', default=''),
  }
  if unknown := set(columns['remat']) - set(REMAT_POLICIES):
    raise ValueError(
      f'remat={tuple(columns["remat"])}: {sorted(unknown)[0]!r} is none of '
      f'{", ".join(map(repr, REMAT_POLICIES))}{nearest(sorted(unknown)[0], REMAT_POLICIES)}'
    )
  if any(stride != 1 for stride in columns['q_stride']):
    raise ValueError(
      f'q_strides={tuple(columns["q_stride"])}: only 1 fits, attention is added to its input '
      'token by token'
    )
  if projection in ('dw_bn', 'dw') and any(kernel % 2 == 0 for kernel in columns['qkv_kernel']):
    raise ValueError(
      f'qkv_kernels={tuple(columns["qkv_kernel"])}: only odd ones fit, an even one with padding '
      'kernel // 2 makes the map of queries larger than that of the tokens'
    )
  if pool == 'cls' and not columns['cls_token'][-1]:
    raise ValueError(
      f"pool='cls' reads the last stage's class token, but cls_token={model.cls_token!r}: give "
      "the last stage one, or use pool='mean'"
    )

  options = []
  for s in range(stages):
    values = {name: column[s] for name, column in columns.items()}
    dim, heads = values['embed_dim'], values['num_heads']
    if not model.head_dim and dim % heads:
      raise ValueError(
        f'num_heads={tuple(columns["num_heads"])}: {heads} heads do not divide the {dim} channels '
        f'of stage {s}'
      )
    mlp_dim = int(dim * values.pop('mlp_ratio'))
    if mlp_dim < 1:
      raise ValueError(f'mlp_ratios={tuple(columns["mlp_ratio"])}: stage {s} has no hidden channel')
    head_dim = model.head_dim or dim // heads
    options.append(
      StageOptions(
        **values,
        head_dim=head_dim,
        mlp_dim=mlp_dim,
        projection=projection,
        shared_kv=model.shared_kv,
        scale=(dim if scale_of == 'embed_dim' else head_dim) ** -0.5,
        qkv_bias=model.qkv_bias,
        out_bias=model.out_bias,
        mlp_bias=model.mlp_bias,
        activation=activation,
        bn_group_size=model.bn_group_size,
      )
    )
  return options
