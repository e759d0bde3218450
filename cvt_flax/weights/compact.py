"""Compact vision transformers of other code bases: which model tensors belong to, and are told to.

`cvt_flax.weights.architecture` comes here for a CompactViT, to `cvt_flax.weights.cvt` for a CvT.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable

import numpy as np

from cvt_flax.errors import UserError
from cvt_flax.models.compact import CompactViT
from cvt_flax.models.compact_options import resolve_compact
from cvt_flax.weights.files import TensorFile
from cvt_flax.weights.layouts import COMPACT_TRANSFORMERS, VIT_FROM_SCRATCH, Layout, Shapes
from cvt_flax.weights.preprocessing import Preprocessing

# The layouts that hold a CompactViT, and no CvT.
LAYOUTS = (VIT_FROM_SCRATCH.name, COMPACT_TRANSFORMERS.name)

# Attributes that inference, or the same weights for other images and classes, do not depend on.
_NOT_COMPARED = ('parent', 'name', 'num_classes', 'dtype')
_OF_TRAINING = ('drop_rate', 'attn_drop_rate', 'drop_path_rate')

# In all of SHI-Labs' models a head has 64 channels. train.py of vit-from-scratch has 4 heads for 48
# channels.
_HEAD_DIM = 64
_HEADS = {48: 4}

_PER_HEAD = re.compile(r'(.*\.attention)\.heads\.(\d+)\.(query|key|value)\.(weight|bias)')


def merge_heads(file: TensorFile) -> tuple[TensorFile, int]:
  """Returns the file with one projection for all heads, and how many heads it had one each for.

  vit-from-scratch has either; the numbers of the merged one are those of the heads, one below the
  other, first all queries, then the keys, then the values. The count is 0 where none is merged.
  """
  parts: dict[str, dict[tuple[int, int], str]] = {}
  shapes = {}
  for name, shape in file.shapes.items():
    if found := _PER_HEAD.fullmatch(name):
      module, head, kind, leaf = found.groups()
      order = (('query', 'key', 'value').index(kind), int(head))
      parts.setdefault(f'{module}.qkv_projection.{leaf}', {})[order] = name
    else:
      shapes[name] = shape
  if not parts:
    return file, 0
  for merged, names in parts.items():
    first, *rest = (file.shapes[name] for name in names.values())
    if not first or any(shape != first for shape in rest):
      raise UserError(f'{file.path}: the heads of {merged} have different shapes')
    shapes[merged] = (first[0] * len(names), *first[1:])
  heads = {len(names) / 3 for names in parts.values()}
  if len(heads) > 1 or not (count := heads.pop()).is_integer():
    raise UserError(f'{file.path}: heads are missing: not all blocks have the same')

  def read(name):
    if name not in parts:
      return file.read(name)
    return np.concatenate([file.read(part) for _, part in sorted(parts[name].items())])

  return dataclasses.replace(file, shapes=shapes, read=read), int(count)


def read(layout: Layout, shapes: Shapes, source: str, heads: int, help_: str) -> CompactViT:
  """Returns the CompactViT whose tensors have these names and shapes.

  Args:
    layout: theirs.
    shapes: {name: shape}.
    source: where they are, for messages.
    heads: attention heads, where the names showed them; 0 where not.
    help_: how a person says what the model is, for messages.

  Raises:
    UserError: something cannot be known from the shapes.
  """

  def shape(module, axes, leaf='weight', j=0):
    name = _name(layout, module, leaf, j)
    found = shapes.get(name)
    if found is None or len(found) != axes or not all(found):
      have = 'is missing' if found is None else f'has the shape {list(found)}'
      raise UserError(f'{source}: {name} {have}, and without it the model cannot be known; {help_}')
    return found

  def count(module):
    return next(n for n in itertools.count() if _name(layout, module, 'weight', n) not in shapes)

  # A patch's projection has a bias, the convolutions of a tokenizer have none.
  shi = layout is COMPACT_TRANSFORMERS
  patches = not shi or _name(layout, 'patch_embed/proj', 'bias') in shapes
  convs = 0 if patches else count('tokenizer/conv_{i}')
  width = shape('patch_embed/proj', 1, 'bias')[0] if patches else shape('norm', 1)[0]
  kernel = shape('patch_embed/proj' if patches else 'tokenizer/conv_{i}', 4)[2]
  depth = count('blocks_{j}/mlp/fc1')
  cls = _name(layout, '', 'cls_token') in shapes
  learnt = _name(layout, '', 'pos_embed') in shapes
  if shi:
    heads = 0 if width % _HEAD_DIM else width // _HEAD_DIM
  heads = heads or _HEADS.get(width, 0)
  if not heads:
    raise UserError(f'{source}: the heads of {width} channels do not show in the tensors; {help_}')
  if not depth:
    raise UserError(f'{source} has no block; {help_}')
  values = dict(
    width=width,
    depth=depth,
    heads=heads,
    mlp_ratio=shape('blocks_{j}/mlp/fc1', 2)[0] / width,
    patch_size=kernel,
    conv_layers=convs,
    pool='cls' if cls else 'seq',
    position='learnable' if learnt else 'none',
    qkv_bias=_name(layout, 'blocks_{j}/attn/qkv', 'bias') in shapes,
    **_STRUCTURE[layout.name],
  )
  if _name(layout, 'head', 'weight') in shapes:
    values['num_classes'] = shape('head', 2)[0]
  try:
    model = CompactViT(**values | dict(position='none', image_size=kernel * 2**8))
    if learnt:
      tokens = shape('', 3, 'pos_embed')[1] - cls
      values['image_size'] = _image_size(model, tokens, source, help_)
    return CompactViT(**values)
  except ValueError as e:
    raise UserError(f'{source}: {e}') from e


# What all models of a code base have, and no tensor shows.
_STRUCTURE = {
  VIT_FROM_SCRATCH.name: dict(residual_norm=False, final_norm=False, activation='gelu_tanh'),
  COMPACT_TRANSFORMERS.name: dict(residual_norm=True, final_norm=True, activation='gelu'),
}


def _image_size(model, tokens, source, help_):
  """Returns the size of square images that give so many tokens: a multiple of all strides."""
  o, side = resolve_compact(model), math.isqrt(tokens)
  step = (2 * o.conv_stride) ** o.conv_layers if o.conv_layers else o.patch_size
  if side**2 != tokens or o.map_size(side * step, side * step) != (side, side):
    raise UserError(f'{source}: {tokens} positions are not those of a square image; {help_}')
  return side * step


def _name(layout, module, leaf, n=0):
  """Returns a tensor's name in block, or convolution, n."""
  return f'{layout.modules[module].format(i=n, j=n)}.{layout.leaf(module, leaf, ())[0]}'


# What a layout needs a model to be: (attribute, the words for it, whether it is so).
_Needs = tuple[tuple[str, str, Callable[[CompactViT], bool]], ...]
_NEEDS: dict[str, _Needs] = {
  VIT_FROM_SCRATCH.name: (
    ('conv_layers', '0', lambda m: not m.conv_layers),
    ('position', "'learnable'", lambda m: m.position == 'learnable'),
  ),
  COMPACT_TRANSFORMERS.name: (
    ('qkv_bias', 'False', lambda m: not m.qkv_bias),
    ('pool', "'seq' with conv_layers", lambda m: m.pool == 'seq' or not m.conv_layers),
  ),
}


def problems(layout: Layout, model: CompactViT) -> list[str]:
  """Returns what of `model` a layout has no place for, in words."""
  if layout.name not in _NEEDS:
    return [f'a CompactViT (only {" and ".join(_NEEDS)} can)']
  found = [
    f'{name}={getattr(model, name)!r} (only {words})'
    for name, words, holds in _NEEDS[layout.name]
    if not holds(model)
  ]
  found += [
    f'{name}={getattr(model, name)!r} (only {value!r})'
    for name, value in _STRUCTURE[layout.name].items()
    if getattr(model, name) != value
  ]
  if model.pool == 'mean':
    found.append("pool='mean' (only 'cls' and 'seq')")
  if not model.num_classes:
    found.append('num_classes=0 (only with a classifier)')
  return found


def differences(a: CompactViT, b: CompactViT) -> dict[str, tuple]:
  """Returns in what two models compute differently, as {name: (of a, of b)}.

  For which images they are is one where their positions are learnt.
  """
  names = [f.name for f in dataclasses.fields(CompactViT)]
  names = [n for n in names if n not in (*_NOT_COMPARED, *_OF_TRAINING)]
  pairs = {n: (getattr(a, n), getattr(b, n)) for n in names}
  if a.position == b.position != 'learnable':
    del pairs['image_size']
  return {n: pair for n, pair in pairs.items() if pair[0] != pair[1]}


def preprocessing_of(layout: Layout, model: CompactViT) -> tuple[Preprocessing, str]:
  """Returns what the images of a file of tensors go through, and a note on it.

  vit-from-scratch normalises by 0.5; SHI-Labs by the data set's numbers, which are not in the file.
  """
  if layout is VIT_FROM_SCRATCH:
    half = (0.5, 0.5, 0.5)
    return (
      Preprocessing(model.image_size, 1.0, half, half),
      f'images of {model.image_size}x{model.image_size}, mean and std 0.5, as its data.py has them',
    )
  return (
    Preprocessing(model.image_size, 1.0),
    f'images of {model.image_size}x{model.image_size}, with the mean and std of ImageNet: those of '
    'the data that it was trained on are not in the file',
  )
