"""What a CompactViT's attributes mean for its parts, and which do not fit together."""

from __future__ import annotations

import dataclasses
import typing

import numpy as np

from cvt_flax.models.layers import ACTIVATIONS
from cvt_flax.models.options import POOLS, choice

if typing.TYPE_CHECKING:
  from cvt_flax.models.compact import CompactViT

POSITIONS = ('learnable', 'sine', 'none')


@dataclasses.dataclass(frozen=True)
class CompactOptions:
  """The attributes of the parts; see `cvt_flax.models.compact.CompactViT` for what they mean."""

  embed_dim: int
  depth: int
  num_heads: int
  mlp_dim: int
  patch_size: int
  conv_layers: int
  cls_token: bool
  residual_norm: bool
  qkv_bias: bool
  activation: str
  drop_rate: float
  attn_drop_rate: float
  drop_path_rate: float
  mlp_bias: bool = True  # of the Mlp that CvT has too

  @property
  def scale(self) -> float:
    """What scores are multiplied by: head_dim ** -0.5."""
    return (self.embed_dim // self.num_heads) ** -0.5

  @property
  def conv_stride(self) -> int:
    """The stride of the tokenizer's convolutions, as SHI-Labs derive it from the kernel."""
    return max(1, self.patch_size // 2 - 1)

  @property
  def conv_padding(self) -> int:
    """Their padding, likewise."""
    return max(1, self.patch_size // 2)

  def conv_channels(self) -> list[int]:
    """Returns the channels that every convolution of the tokenizer returns."""
    return [64] * (self.conv_layers - 1) + [self.embed_dim] * (self.conv_layers > 0)

  def drop_path_schedule(self) -> list[float]:
    """Returns the drop path rate of every block: linear from 0 to drop_path_rate."""
    return np.linspace(0, self.drop_path_rate, self.depth).tolist()

  def conv_map_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
    """Returns the size that every convolution of the tokenizer leaves, before it is pooled."""
    sizes, size = [], (height, width)
    for _ in range(self.conv_layers):
      reach = 2 * self.conv_padding - self.patch_size
      sizes.append(tuple((n + reach) // self.conv_stride + 1 for n in size))
      size = tuple((n - 1) // 2 + 1 for n in sizes[-1])  # the pooling, 3 / 2 / 1
    return sizes

  def map_size(self, height: int, width: int) -> tuple[int, int]:
    """Returns how many tokens an image of height x width has in each direction."""
    if self.conv_layers:
      return tuple((n - 1) // 2 + 1 for n in self.conv_map_sizes(height, width)[-1])
    return height // self.patch_size, width // self.patch_size


def resolve_compact(model: CompactViT) -> CompactOptions:
  """Returns the options of `model`.

  Raises:
    ValueError: naming the attribute that is out of range or does not fit the others.
  """
  m = model
  lowest = {'num_classes': 0, 'conv_layers': 0}
  for name in ('num_classes', 'image_size', 'width', 'depth', 'heads', 'patch_size', 'conv_layers'):
    if getattr(m, name) < (low := lowest.get(name, 1)):
      raise ValueError(f'{name}={getattr(m, name)!r}: at least {low} is needed')
  for name in ('drop_rate', 'attn_drop_rate', 'drop_path_rate'):
    if not 0 <= getattr(m, name) < 1:
      raise ValueError(
        f'{name}={getattr(m, name)!r}: a rate from 0 up to, not including, 1 is needed'
      )
  pool, position = choice(m, 'pool', POOLS), choice(m, 'position', POSITIONS)
  if m.width % m.heads:
    raise ValueError(f'heads={m.heads}: they do not divide width={m.width}')
  if position == 'sine' and m.width % 2:
    raise ValueError(f"width={m.width}: position='sine' pairs channels, an even one is needed")
  mlp_dim = int(m.width * m.mlp_ratio)
  if mlp_dim < 1:
    raise ValueError(f'mlp_ratio={m.mlp_ratio}: the MLP has no hidden channel')
  options = CompactOptions(
    embed_dim=m.width,
    depth=m.depth,
    num_heads=m.heads,
    mlp_dim=mlp_dim,
    patch_size=m.patch_size,
    conv_layers=m.conv_layers,
    cls_token=pool == 'cls',
    residual_norm=m.residual_norm,
    qkv_bias=m.qkv_bias,
    activation=choice(m, 'activation', tuple(ACTIVATIONS)),
    drop_rate=m.drop_rate,
    attn_drop_rate=m.attn_drop_rate,
    drop_path_rate=m.drop_path_rate,
  )
  check_size(m, options, m.image_size, m.image_size)
  return options


def check_size(model: CompactViT, options: CompactOptions, height: int, width: int) -> None:
  """Checks that `model` takes images of height x width pixels.

  Raises:
    ValueError: they are of another size than its learnt position embedding, or patches do not cover
      them.
  """
  size, patch = f'{height}x{width}', options.patch_size
  if model.position == 'learnable' and {height, width} != {model.image_size}:
    raise ValueError(
      f'images of {size}: position={model.position!r} is learnt for image_size={model.image_size}'
    )
  if not options.conv_layers and (height % patch or width % patch):
    raise ValueError(f'images of {size}: patch_size={patch} does not divide them')
