"""What a model costs at an image size: maps, tokens, multiply-adds."""

import dataclasses

from cvt_flax.models.compact import CompactViT
from cvt_flax.models.compact_options import CompactOptions, check_size, resolve_compact
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

  options: StageOptions | CompactOptions
  height: int
  width: int
  tokens: int
  keys: int


def stage_geometry(model: CvT | CompactViT, height: int, width: int) -> list[StageGeometry]:
  """Returns the sizes of every stage for images of height x width pixels; a CompactViT has one.

  Raises:
    ValueError: a CompactViT does not take images of this size.
  """
  if isinstance(model, CompactViT):
    o = resolve_compact(model)
    check_size(model, o, height, width)
    height, width = o.map_size(height, width)
    tokens = height * width + int(o.cls_token)
    return [StageGeometry(o, height, width, tokens, tokens)]
  stages = []
  for o in resolve(model):
    height, width = o.map_size(height, width)
    key_height, key_width = o.key_map_size(height, width)
    cls = int(o.cls_token)
    stages.append(
      StageGeometry(o, height, width, height * width + cls, key_height * key_width + cls)
    )
  return stages


def multiply_adds(model: CvT | CompactViT, height: int, width: int) -> int:
  """Returns the multiply-adds of one image's forward pass: convolutions, linear layers, attention.

  This is what the paper and the authors' table call FLOPs. Norms, activations and poolings are
  not counted, but for the scores and weights of a sequence pooling.
  """
  stages = stage_geometry(model, height, width)
  last = stages[-1]
  pooling = 2 * last.height * last.width * last.options.embed_dim * (model.pool == 'seq')
  head = last.options.embed_dim * model.num_classes
  if isinstance(model, CompactViT):
    return _compact(last, height, width, model.in_channels) + pooling + head
  total, channels = 0, model.in_channels
  for stage in stages:
    o, area, keys = stage.options, stage.height * stage.width, stage.keys
    dim, inner = o.embed_dim, o.num_heads * o.head_dim
    key_area = keys - int(o.cls_token)
    total += area * dim * channels * o.patch_size**2
    block = 0
    if o.projection in ('dw_bn', 'dw'):
      maps_of_keys = 1 if o.shared_kv else 2
      block += (area + maps_of_keys * key_area) * dim * o.qkv_kernel**2
    block += (stage.tokens + 2 * keys) * dim * inner  # q, k and v
    block += 2 * stage.tokens * keys * inner  # scores, and the weighted values
    block += stage.tokens * inner * dim  # output projection
    block += 2 * stage.tokens * dim * o.mlp_dim
    total += o.depth * block
    channels = dim
  return total + pooling + head


def _compact(stage, height, width, channels):
  """Returns the multiply-adds of a CompactViT's tokenizer and blocks."""
  o, n, c = stage.options, stage.tokens, stage.options.embed_dim
  total = 0 if o.conv_layers else stage.height * stage.width * channels * o.patch_size**2 * c
  sizes = o.conv_map_sizes(height, width)
  for (h, w), features in zip(sizes, o.conv_channels(), strict=True):
    total += h * w * features * channels * o.patch_size**2
    channels = features
  # Queries, keys, values and output; scores and the weighted values; the MLP.
  return total + o.depth * (4 * n * c**2 + 2 * n**2 * c + 2 * n * c * o.mlp_dim)
