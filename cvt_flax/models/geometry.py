"""What a CvT costs at an image size: maps, tokens, multiply-adds."""

import dataclasses

from cvt_flax.models.cvt import CvT
from cvt_flax.models.options import StageOptions, resolve


@dataclasses.dataclass(frozen=True)
class StageGeometry:
  """Sizes of one stage for a given image size.

  Attributes:
    options: the stage's attributes.
    height: of the map.
    width: of the map.
    tokens: queries of the attention, the class token included.
    keys: keys of the attention, the class token included.
  """

  options: StageOptions
  height: int
  width: int
  tokens: int
  keys: int


def stage_geometry(model: CvT, height: int, width: int) -> list[StageGeometry]:
  """Returns the sizes of every stage for images of height x width pixels."""
  stages = []
  for o in resolve(model):
    height, width = o.map_size(height, width)
    key_height, key_width = o.key_map_size(height, width)
    cls = int(o.cls_token)
    stages.append(
      StageGeometry(o, height, width, height * width + cls, key_height * key_width + cls)
    )
  return stages


def multiply_adds(model: CvT, height: int, width: int) -> int:
  """Returns the multiply-adds of one image's forward pass: convolutions, linear layers, attention.

  This is what the paper and the authors' table call FLOPs. Norms, activations and poolings are
  not counted.
  """
  total, channels = 0, model.in_channels
  for stage in stage_geometry(model, height, width):
    o, area, keys = stage.options, stage.height * stage.width, stage.keys
    dim, inner = o.embed_dim, o.num_heads * o.head_dim
    key_area = keys - int(o.cls_token)
    total += area * dim * channels * o.patch_size**2
    block = 0
    if o.projection == 'dw_bn':
      maps_of_keys = 1 if o.shared_kv else 2
      block += (area + maps_of_keys * key_area) * dim * o.qkv_kernel**2
    block += (stage.tokens + 2 * keys) * dim * inner  # q, k and v
    block += 2 * stage.tokens * keys * inner  # scores, and the weighted values
    block += stage.tokens * inner * dim  # output projection
    block += 2 * stage.tokens * dim * o.mlp_dim
    total += o.depth * block
    channels = dim
  return total + channels * model.num_classes
