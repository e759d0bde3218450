"""The CvT of vit-pytorch, by its own keywords; conceptofmind's Flax port has them too.

    from cvt_flax.compat import CvT
    model = CvT(num_classes=1000, s1_emb_dim=64, s3_depth=10)

The network is that of vit_pytorch/cvt.py (github.com/lucidrains/vit-pytorch), number for number:
three stages without class token, heads of 64 channels, keys and values from one convolution, the
exact GELU. The port (github.com/conceptofmind/CvT-flax) computes something else with these
keywords: other padding, fewer biases, and always the statistics of the batch.
"""

from __future__ import annotations

import re

from cvt_flax.errors import nearest
from cvt_flax.models import cvt

_STAGES = ('s1', 's2', 's3')

# What no keyword changes.
ATTRIBUTES = dict(
  cls_token=(False,) * len(_STAGES),
  shared_kv=True,
  head_dim=64,
  attention_scale='head_dim',
  qkv_bias=False,
  activation='gelu',
  embed_drop_rates=(0.0,) * len(_STAGES),
  drop_path_rates=(0.0,) * len(_STAGES),
  pool='mean',
  final_norm=False,
)

# A stage's keyword without its prefix -> the attribute of cvt_flax.CvT.
_PER_STAGE = {
  'emb_dim': 'embed_dims',
  'emb_kernel': 'patch_sizes',
  'emb_stride': 'patch_strides',
  'proj_kernel': 'qkv_kernels',
  'kv_proj_stride': 'kv_strides',
  'heads': 'num_heads',
  'depth': 'depths',
  'mlp_mult': 'mlp_ratios',
}


def CvT(  # noqa: N802  (a class in both)
  num_classes: int,
  *,
  s1_emb_dim: int = 64,
  s1_emb_kernel: int = 7,
  s1_emb_stride: int = 4,
  s1_proj_kernel: int = 3,
  s1_kv_proj_stride: int = 2,
  s1_heads: int = 1,
  s1_depth: int = 1,
  s1_mlp_mult: int = 4,
  s2_emb_dim: int = 192,
  s2_emb_kernel: int = 3,
  s2_emb_stride: int = 2,
  s2_proj_kernel: int = 3,
  s2_kv_proj_stride: int = 2,
  s2_heads: int = 3,
  s2_depth: int = 2,
  s2_mlp_mult: int = 4,
  s3_emb_dim: int = 384,
  s3_emb_kernel: int = 3,
  s3_emb_stride: int = 2,
  s3_proj_kernel: int = 3,
  s3_kv_proj_stride: int = 2,
  s3_heads: int = 6,
  s3_depth: int = 10,
  s3_mlp_mult: int = 4,
  dropout: float = 0.0,
  channels: int = 3,
  name: str | None = None,
  **unknown,
) -> cvt.CvT:
  """Returns vit-pytorch's network as a `cvt_flax.CvT`, a linen module.

  Images are NHWC. As every CvT it is applied in evaluation mode unless `train=True` is given, which
  takes the batch's statistics (mutable=['batch_stats']) and, with dropout, rngs={'dropout': key}.

  Args:
    num_classes: length of the logits.
    s1_emb_dim, s2_emb_dim, s3_emb_dim: channels of the stage. Likewise for three stages:
    s1_emb_kernel: kernel of its convolutional embedding, padded by kernel // 2 on each side.
    s1_emb_stride: stride of that.
    s1_proj_kernel: kernel of the convolutions of queries, keys and values; odd.
    s1_kv_proj_stride: stride of those of keys and values.
    s1_heads: attention heads, of 64 channels each.
    s1_depth: blocks.
    s1_mlp_mult: hidden channels of the MLP, as a multiple of the stage's.
    dropout: of the attention's weights, its output and in the MLP.
    channels: of the images.
    name: of the module, inside another one.

  Raises:
    TypeError: for a keyword that is none of these.
    ValueError: for values that are out of range or do not fit together.
  """
  # Before any other local name: the arguments, by their names.
  keywords = dict(locals())
  for keyword in unknown:
    allowed = keywords.keys() - {'unknown'}
    raise TypeError(f'CvT has no keyword {keyword!r}{nearest(keyword, allowed)}')
  stages = {
    attribute: tuple(keywords[f'{stage}_{suffix}'] for stage in _STAGES)
    for suffix, attribute in _PER_STAGE.items()
  }
  try:
    return cvt.CvT(
      num_classes=num_classes,
      patch_paddings=tuple(kernel // 2 for kernel in stages['patch_sizes']),
      drop_rates=(dropout,) * len(_STAGES) if dropout else (),
      attn_drop_rates=(dropout,) * len(_STAGES) if dropout else (),
      in_channels=channels,
      name=name,
      **stages,
      **ATTRIBUTES,
    )
  except ValueError as e:
    raise ValueError(_by_keyword(str(e))) from e


def _by_keyword(message: str) -> str:
  """Returns a message of `cvt_flax.CvT`, which starts with an attribute, for these keywords."""
  keywords = {
    attribute: ', '.join(f'{stage}_{suffix}' for stage in _STAGES)
    for suffix, attribute in _PER_STAGE.items()
  }
  keywords |= {'drop_rates': 'dropout', 'in_channels': 'channels'}
  return re.sub(r'^\w+', lambda found: keywords.get(found[0], found[0]), message)
