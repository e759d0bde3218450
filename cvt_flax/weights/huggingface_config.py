"""config.json of transformers' CvtForImageClassification: to a CvT, and back."""

from __future__ import annotations

from collections.abc import Mapping

from cvt_flax.errors import UserError
from cvt_flax.models.cvt import CvT
from cvt_flax.models.options import resolve
from cvt_flax.weights import architecture

# Hugging Face's config.json: their key -> ours, one entry a stage.
_CONFIG = {
  'embed_dim': 'embed_dims',
  'depth': 'depths',
  'num_heads': 'num_heads',
  'patch_sizes': 'patch_sizes',
  'patch_stride': 'patch_strides',
  'patch_padding': 'patch_paddings',
  'mlp_ratio': 'mlp_ratios',
  'cls_token': 'cls_token',
  'kernel_qkv': 'qkv_kernels',
  'stride_kv': 'kv_strides',
  'drop_rate': 'drop_rates',
  'attention_drop_rate': 'attn_drop_rates',
  'drop_path_rate': 'drop_path_rates',
}
# What a config leaves out has CvtConfig's default: of the keys above, and of those that must have
# a certain value for our attributes to say the same.
_CONFIG_DEFAULTS = {
  'embed_dim': (64, 192, 384),
  'depth': (1, 2, 10),
  'num_heads': (1, 3, 6),
  'patch_sizes': (7, 3, 3),
  'patch_stride': (4, 2, 2),
  'patch_padding': (2, 1, 1),
  'mlp_ratio': (4.0, 4.0, 4.0),
  'cls_token': (False, False, True),
  'kernel_qkv': (3, 3, 3),
  'stride_kv': (2, 2, 2),
  'stride_q': (1, 1, 1),
  'padding_kv': (1, 1, 1),
  'padding_q': (1, 1, 1),
  'qkv_bias': (True, True, True),
  'qkv_projection_method': ('dw_bn', 'dw_bn', 'dw_bn'),
  'drop_rate': (0.0, 0.0, 0.0),
  'attention_drop_rate': (0.0, 0.0, 0.0),
  'drop_path_rate': (0.0, 0.0, 0.1),
}


def to_model(config: Mapping, classes: int, where: str) -> CvT:
  """Returns the CvT that transformers would build from its config.json.

  Its MLP computes the exact GELU, whatever the weights were trained with; where the config has
  our key 'activation' that is taken.

  Raises:
    UserError: the config is damaged, or of something that this model cannot be.
  """
  values = {k: config.get(k, default) for k, default in _CONFIG_DEFAULTS.items()}
  if not all(isinstance(v, list | tuple) and v for v in values.values()):
    raise UserError(f'{where}: a list with a value for every stage is needed for each of its keys')
  values = {k: tuple(v) for k, v in values.items()}
  stages = len(values['embed_dim'])
  half = tuple(k // 2 if type(k) is int else 1 for k in values['kernel_qkv'])
  for key, needed in (
    ('qkv_projection_method', ('dw_bn',) * stages),
    ('stride_q', (1,) * stages),
    ('padding_q', half),
    ('padding_kv', half),
    ('qkv_bias', values['qkv_bias'][:1] * stages),
  ):
    if values[key] != needed:
      raise UserError(f'{where}: {key}={list(values[key])}: only {list(needed)} can be read here')
  return architecture.build(
    dict(
      num_classes=classes,
      in_channels=config.get('num_channels', 3),
      qkv_bias=values['qkv_bias'][0],
      activation=config.get('activation', 'gelu'),
      pool='cls' if values['cls_token'][-1] else 'mean',
      **{ours: values[theirs] for theirs, ours in _CONFIG.items()},
    ),
    where,
  )


def from_model(model: CvT) -> dict:
  """Returns the config.json of CvtForImageClassification for `model`, less its class names."""
  stages = resolve(model)

  def each(attribute):
    return [getattr(o, attribute) for o in stages]

  return {
    'model_type': 'cvt',
    'architectures': ['CvtForImageClassification'],
    'dtype': 'float32',
    'num_channels': model.in_channels,
    'embed_dim': each('embed_dim'),
    'depth': each('depth'),
    'num_heads': each('num_heads'),
    'patch_sizes': each('patch_size'),
    'patch_stride': each('patch_stride'),
    'patch_padding': each('patch_padding'),
    'mlp_ratio': [float(ratio) for ratio in model.mlp_ratios],
    'cls_token': [bool(cls) for cls in each('cls_token')],
    'qkv_projection_method': each('projection'),
    'qkv_bias': each('qkv_bias'),
    'kernel_qkv': each('qkv_kernel'),
    'padding_kv': each('qkv_padding'),
    'stride_kv': each('kv_stride'),
    'padding_q': each('qkv_padding'),
    'stride_q': each('q_stride'),
    'drop_rate': [float(rate) for rate in each('drop_rate')],
    'attention_drop_rate': [float(rate) for rate in each('attn_drop_rate')],
    'drop_path_rate': [float(rate) for rate in each('drop_path_rate')],
    # transformers ignores this key and computes 'gelu'.
    'activation': model.activation,
  }
