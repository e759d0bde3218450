"""Named models."""

import dataclasses

from cvt_flax.errors import nearest
from cvt_flax.models.compact import CompactViT
from cvt_flax.models.cvt import CvT
from cvt_flax.models.options import unknown_attribute

CVT_13 = dict(
  embed_dims=(64, 192, 384),
  depths=(1, 2, 10),
  num_heads=(1, 3, 6),
  drop_path_rates=(0.0, 0.0, 0.1),
)
CVT_21 = CVT_13 | dict(depths=(1, 4, 16))

# For 32x32 pixels. The official strides 4, 2, 2 leave the last stage a 2x2 map with one key beside
# the class token; these leave it an 8x8 map with sixteen.
SMALL_IMAGES = dict(patch_sizes=(3, 3, 3), patch_strides=(1, 2, 2), patch_paddings=(1, 1, 1))

# The attributes of every named CvT; what is not given has CvT's default. The first three are
# experiments/imagenet/cvt/*.yaml of the authors' code; the others are this project's.
VARIANTS: dict[str, dict] = {
  'cvt-13': CVT_13,
  'cvt-21': CVT_21,
  'cvt-w24': dict(
    embed_dims=(192, 768, 1024),
    depths=(2, 2, 20),
    num_heads=(3, 12, 16),
    drop_path_rates=(0.0, 0.0, 0.3),
  ),
  'cvt-13-small-images': CVT_13 | SMALL_IMAGES,
  'cvt-21-small-images': CVT_21 | SMALL_IMAGES,
  'cvt-small': SMALL_IMAGES
  | dict(
    embed_dims=(64, 128, 256),
    depths=(1, 2, 5),
    num_heads=(1, 2, 4),
    kv_strides=(2, 2, 1),
    drop_path_rates=(0.0, 0.0, 0.1),
  ),
  'cvt-nano': dict(
    embed_dims=(32, 64, 96),
    depths=(1, 1, 2),
    num_heads=(1, 2, 3),
    patch_sizes=(3, 3, 3),
    patch_strides=(2, 2, 1),
    patch_paddings=(1, 1, 1),
    drop_path_rates=(0.0, 0.0, 0.0),
  ),
}


# What SHI-Labs' code has in all its models (src/utils/transformers.py, src/cct.py).
CCT = dict(
  pool='seq',
  patch_size=3,
  residual_norm=True,
  final_norm=True,
  qkv_bias=False,
  activation='gelu',
)

# The attributes of every named CompactViT; what is not given has CompactViT's default. CCT's names
# are depth / kernel x convolutions, as in the paper. Its code has 0.1 for attn_drop_rate and
# drop_path_rate: that is for a recipe to say.
COMPACT_VARIANTS: dict[str, dict] = {
  'cvit': dict(pool='cls'),
  'mcvit': dict(pool='seq'),
  'cct-2/3x2': CCT | dict(conv_layers=2, width=128, depth=2, heads=2, mlp_ratio=1.0),
  'cct-7/3x1': CCT | dict(conv_layers=1, width=256, depth=7, heads=4, mlp_ratio=2.0),
}


def list_models() -> list[str]:
  """Returns the names that `create_model` takes."""
  return [*VARIANTS, *COMPACT_VARIANTS]


def create_model(name: str, num_classes: int = 1000, **attributes) -> CvT | CompactViT:
  """Returns the model of that name, a linen module.

  Args:
    name: one of `list_models()`.
    num_classes: length of the logits; 0 for the pooled features.
    **attributes: of `CvT` or `CompactViT`, in place of the named model's.

  Raises:
    ValueError: for an unknown name or attribute, or attributes that do not fit together.
  """
  family, variants = (CompactViT, COMPACT_VARIANTS) if is_compact(name) else (CvT, VARIANTS)
  if name not in variants:
    known = list_models()
    raise ValueError(f'model {name!r}: one of {", ".join(known)} is needed{nearest(name, known)}')
  fields = {field.name for field in dataclasses.fields(family)}
  allowed = fields - {'parent', 'name', 'num_classes'}
  for attribute in attributes:
    if attribute not in allowed:
      raise ValueError(f'{name}: {unknown_attribute(family.__name__, attribute, allowed)}')
  return family(num_classes=num_classes, **variants[name] | attributes)


def is_compact(name: str) -> bool:
  """Returns whether the model of that name is a CompactViT."""
  return name in COMPACT_VARIANTS
