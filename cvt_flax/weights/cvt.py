"""CvTs of other code bases: which model tensors belong to, and are told to.

`cvt_flax.weights.architecture` comes here for a CvT, to `...compact` for a CompactViT.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

from cvt_flax import compat
from cvt_flax.errors import UserError
from cvt_flax.models.cvt import CvT
from cvt_flax.models.options import StageOptions, resolve
from cvt_flax.models.zoo import VARIANTS
from cvt_flax.weights.layouts import HUGGING_FACE, OFFICIAL, VIT_PYTORCH, Layout, Shapes

# Attributes of a stage that its inference does not depend on.
_OF_TRAINING = (
  'drop_rate',
  'embed_drop_rate',
  'attn_drop_rate',
  'drop_path_rate',
  'bn_group_size',
  'remat',
)

# In all released weights a head has 64 channels; vit-pytorch's default, which nothing changes.
_HEAD_DIM = 64
# Strides leave no trace in the tensors. Kernels of these sizes have these strides in every config
# of the authors and by default in vit-pytorch; stride 2 for keys and values likewise.
_PATCHES = {'patch_sizes': (7, 3, 3), 'patch_strides': (4, 2, 2)}


def read(layout: Layout, shapes: Shapes, classes: int, source: str, help_: str) -> CvT:
  """Returns the CvT whose tensors have these names and shapes.

  Args:
    layout: theirs.
    shapes: {name: shape}.
    classes: length of the logits.
    source: where they are, for messages.
    help_: how a person says what the model is, for messages.

  Raises:
    UserError: something cannot be known from the shapes.
  """

  def shape(name, axes):
    found = shapes.get(name)
    if found is None or len(found) != axes or not all(found):
      have = 'is missing' if found is None else f'has the shape {list(found)}'
      raise UserError(f'{source}: {name} {have}, and without it the model cannot be known; {help_}')
    return found

  def name(module, leaf, s='', j='', p=''):
    return f'{layout.modules[module].format(s=s, j=j, p=p)}.{leaf}'

  def count(module, **numbers):
    """Returns how many blocks, or stages, there are."""
    letter = 'j' if numbers else 's'
    names = (name(module, 'weight', **numbers, **{letter: n}) for n in itertools.count())
    return sum(1 for _ in itertools.takewhile(shapes.__contains__, names))

  embed, fc1 = 'stage{s}/patch_embed/proj', 'stage{s}/blocks_{j}/mlp/fc1'
  conv, q = 'stage{s}/blocks_{j}/attn/conv_proj_{p}/conv', 'stage{s}/blocks_{j}/attn/proj_{p}'
  stages = range(count(embed))
  depths = tuple(count(fc1, s=s) for s in stages)
  if not all(depths):
    raise UserError(f'{source}: stage {depths.index(0)} has no block; {help_}')
  axes = 4 if layout is VIT_PYTORCH else 2
  patches = [shape(name(embed, 'weight', s), 4) for s in stages]
  dims = tuple(patch[0] for patch in patches)
  sizes = tuple(patch[2] for patch in patches)
  if name(conv, 'weight', 0, 0, 'q') not in shapes:
    raise UserError(
      f"{source} has no convolutions of queries, so its projection is 'avg' or 'linear', which "
      f'does not show in the tensors; {help_}'
    )
  kernels = tuple(shape(name(conv, 'weight', s, 0, 'q'), 4)[2] for s in stages)
  inner = tuple(shape(name(q, 'weight', s, 0, 'q'), axes)[0] for s in stages)
  if len(sizes) != 3:
    raise UserError(f'{source} has {len(sizes)} stages, and only models of 3 are known; {help_}')
  if sizes != _PATCHES['patch_sizes']:
    raise UserError(
      f'{source}: embeddings with kernels of {sizes} pixels, whose strides do not show in the '
      f'tensors; {help_}'
    )
  if any(n % _HEAD_DIM for n in inner):
    raise UserError(
      f'{source}: {inner} channels in the attention, which are not heads of {_HEAD_DIM}; {help_}'
    )
  values = dict(
    num_classes=classes,
    in_channels=patches[0][1],
    embed_dims=dims,
    depths=depths,
    num_heads=tuple(n // _HEAD_DIM for n in inner),
    mlp_ratios=tuple(
      shape(name(fc1, 'weight', s, 0), axes)[0] / dim for s, dim in zip(stages, dims, strict=True)
    ),
    qkv_kernels=kernels,
    kv_strides=(2,) * len(stages),
    drop_path_rates=_drop_path_rates(dims, depths),
    **_PATCHES,
  )
  if layout is VIT_PYTORCH:
    values |= dict(
      patch_paddings=tuple(size // 2 for size in sizes),
      **compat.ATTRIBUTES,
    )
  else:
    cls = tuple(name('stage{s}', 'cls_token', s) in shapes for s in stages)
    values |= dict(
      patch_paddings=(2, 1, 1),
      cls_token=cls,
      qkv_bias=name(q, 'bias', 0, 0, 'q') in shapes,
      pool='cls' if cls[-1] else 'mean',
    )
  try:
    return CvT(**values)
  except ValueError as e:
    raise UserError(f'{source}: {e}') from e


def is_guess(model: CvT) -> bool:
  """Whether `read` made it of sizes that no named model has: of what tensors do not show."""
  return not _variant(model.embed_dims, model.depths)


def _drop_path_rates(dims, depths):
  """Returns what the named model of these sizes is trained with; zeros where there is none."""
  variant = _variant(dims, depths)
  return variant['drop_path_rates'] if variant else (0.0,) * len(dims)


def _variant(dims, depths):
  """Returns the named model of these sizes, None where there is none."""
  sizes = {(v['embed_dims'], v['depths']): v for v in VARIANTS.values()}
  return sizes.get((dims, depths))


# What a layout needs a model to be: (attribute, the words for it, whether a stage is so).
_Needs = tuple[tuple[str, str, Callable[[StageOptions], bool]], ...]
_COMMON: _Needs = (
  ('head_dim', 'embed_dim // num_heads', lambda o: o.head_dim * o.num_heads == o.embed_dim),
  ('attention_scale', "'embed_dim'", lambda o: o.scale == o.embed_dim**-0.5),
  ('shared_kv', 'False', lambda o: not o.shared_kv),
  ('pos_embed', '()', lambda o: not o.pos_embed),
  ('out_bias', 'True', lambda o: o.out_bias),
  ('mlp_bias', 'True', lambda o: o.mlp_bias),
)
_NEEDS: dict[str, _Needs] = {
  OFFICIAL.name: (
    *_COMMON,
    ('projection', "'dw_bn', 'avg' or 'linear'", lambda o: o.projection != 'dw'),
    ('activation', "'quick_gelu'", lambda o: o.activation == 'quick_gelu'),
  ),
  HUGGING_FACE.name: (
    *_COMMON,
    ('projection', "'dw_bn'", lambda o: o.projection == 'dw_bn'),
    ('activation', "'quick_gelu' or 'gelu'", lambda o: o.activation in ('quick_gelu', 'gelu')),
  ),
  VIT_PYTORCH.name: (
    ('projection', "'dw_bn'", lambda o: o.projection == 'dw_bn'),
    ('shared_kv', 'True', lambda o: o.shared_kv),
    ('head_dim', str(_HEAD_DIM), lambda o: o.head_dim == _HEAD_DIM),
    ('attention_scale', "'head_dim'", lambda o: o.scale == o.head_dim**-0.5),
    ('qkv_bias', 'False', lambda o: not o.qkv_bias),
    ('out_bias', 'True', lambda o: o.out_bias),
    ('mlp_bias', 'True', lambda o: o.mlp_bias),
    ('cls_token', 'False', lambda o: not o.cls_token),
    ('pos_embed', '()', lambda o: not o.pos_embed),
    ('activation', "'gelu'", lambda o: o.activation == 'gelu'),
    ('patch_paddings', 'patch_sizes // 2', lambda o: o.patch_padding == o.patch_size // 2),
    ('mlp_ratios', 'integers', lambda o: o.mlp_dim % o.embed_dim == 0),
  ),
}


def problems(layout: Layout, model: CvT) -> list[str]:
  """Returns what of a CvT a layout has no place for, in words."""
  stages = resolve(model)
  found = [
    f'{name}={getattr(model, name)!r} (only {words})'
    for name, words, holds in _NEEDS[layout.name]
    if not all(map(holds, stages))
  ]
  if layout is VIT_PYTORCH:
    wanted = {'final_norm': False, 'pool': 'mean'}
    if len(stages) != 3:
      found.append(f'{len(stages)} stages (only 3)')
  else:
    wanted = {'final_norm': True, 'pool': 'cls' if stages[-1].cls_token else 'mean'}
  if layout is HUGGING_FACE and any(o.cls_token for o in stages[:-1]):
    found.append(f'cls_token={model.cls_token!r} (only in the last stage)')
  # It takes the drop path rate of all blocks of a stage from the block with the stage's number.
  if layout is HUGGING_FACE and any(o.depth <= s for s, o in enumerate(stages)):
    found.append(
      f'depths={model.depths!r} (only 1 block or more in the first stage, 2 in the second, ...)'
    )
  found += [
    f'{name}={getattr(model, name)!r} (only {value!r})'
    for name, value in wanted.items()
    if getattr(model, name) != value
  ]
  if layout is not OFFICIAL and not model.num_classes:
    found.append('num_classes=0 (only with a classifier)')
  return found


def differences(a: CvT, b: CvT) -> dict[str, tuple]:
  """Returns in what two models compute differently, as {name: (of a, of b)}, lists by stage."""
  found = {}
  for name in (f.name for f in dataclasses.fields(StageOptions)):
    values = tuple([getattr(o, name) for o in resolve(model)] for model in (a, b))
    if name not in _OF_TRAINING and values[0] != values[1]:
      found[name] = values
  for name in ('in_channels', 'pool', 'final_norm'):
    if getattr(a, name) != getattr(b, name):
      found[name] = (getattr(a, name), getattr(b, name))
  return found
