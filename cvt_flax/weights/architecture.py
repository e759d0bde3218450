"""Which model tensors belong to: read from their shapes or a config, and told to others.

What is of one family alone is in `cvt_flax.weights.cvt` and `cvt_flax.weights.compact`.
"""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Mapping

import numpy as np

from cvt_flax.errors import UserError
from cvt_flax.models.compact import CompactViT
from cvt_flax.models.cvt import CvT
from cvt_flax.models.zoo import create_model
from cvt_flax.weights import compact, cvt
from cvt_flax.weights.layouts import LAYOUTS, Layout, Shapes

# What a model computes on, not what it computes, and what depends on the batch.
_NOT_KEPT = ('parent', 'name', 'dtype', 'bn_group_size', 'remat')
# Attributes that the files of earlier versions lack.
_ADDED = {'embed_drop_rates', 'in_channels', 'pos_embed'}

# No size, rate or count of a network that anyone has is larger.
_LARGEST = 100_000

Model = CvT | CompactViT


def attributes(model: Model) -> dict:
  """Returns the attributes of `model` as JSON values: all but those of computing."""
  values = {f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
  return {k: _plain(v) for k, v in values.items() if k not in _NOT_KEPT}


def _plain(value):
  """Returns a value of Python's own for one of NumPy's, in tuples as well."""
  if isinstance(value, tuple | list):
    return tuple(map(_plain, value))
  return value.item() if isinstance(value, np.generic) else value


def from_attributes(values: Mapping, where: str) -> Model:
  """Returns the model with the attributes that `attributes` returned.

  Args:
    values: they, as read from JSON.
    where: they were read, for the message.

  Raises:
    UserError: they are damaged or do not fit together.
  """
  # 'width' is an attribute of one of the two alone.
  family = CompactViT if isinstance(values, Mapping) and 'width' in values else CvT
  allowed = {field.name for field in dataclasses.fields(family)} - set(_NOT_KEPT)
  if not isinstance(values, Mapping) or values.keys() | (_ADDED & allowed) != allowed:
    names = ', '.join(sorted(allowed))
    raise UserError(f'{where}: the attributes of {family.__name__} are needed: {names}')
  return build(values, where, family)


def build(values: Mapping, where: str, family: type[Model] = CvT) -> Model:
  """Returns the model with attributes that a stranger gave, lists for tuples.

  The model itself takes what it is given for what its annotations say.

  Raises:
    UserError: one has another type, or they do not fit together.
  """
  types = typing.get_type_hints(family)
  values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
  for name, value in values.items():
    kind, several = types[name], isinstance(value, tuple)
    if typing.get_origin(kind) is tuple:
      fits, kind = several, typing.get_args(kind)[0]
    else:
      fits = not several
    kinds = (int, float) if kind is float else (kind,)
    elements = value if several else (value,)
    if not fits or not all(type(x) in kinds for x in elements):
      raise UserError(f'{where}: {name}={value!r}: {types[name]} is needed')
    if kind in (int, float) and not all(abs(x) <= _LARGEST for x in elements):
      raise UserError(f'{where}: {name}={value!r}: at most {_LARGEST} is taken')
  try:
    return family(**values)
  except ValueError as e:
    raise UserError(f'{where}: {e}') from e


def named(name: str, num_classes: int) -> Model:
  """Returns the model of that name, as `create_model`, with a UserError."""
  try:
    return create_model(name, num_classes)
  except ValueError as e:
    raise UserError(str(e)) from e


def with_activation(model: Model, activation: str) -> Model:
  """Returns `model` with another activation; '' leaves it."""
  try:
    return model.clone(activation=activation or model.activation)
  except ValueError as e:
    raise UserError(str(e)) from e


def layout_of(names: Shapes, source: str) -> Layout:
  """Returns the layout that tensors of these names have.

  Raises:
    UserError: it is none that is known.
  """
  for layout in LAYOUTS.values():
    if layout.marker in names:
      return layout
  known = '; '.join(f'{layout.name} has {layout.marker}' for layout in LAYOUTS.values())
  few = ', '.join(itertools.islice(names, 3))
  raise UserError(f'{source} holds no model that is known ({few}, ...): {known}')


def num_classes(layout: Layout, shapes: Shapes) -> int:
  """Returns the length of the logits; 0 where there is no classifier."""
  head = layout.modules['head']
  for leaf in ('weight', 'bias'):  # where one is missing, the other shows that it is
    if shape := shapes.get(f'{head}.{leaf}'):
      return shape[0]
  return 0


def read(layout: Layout, shapes: Shapes, source: str, heads: int = 0) -> Model:
  """Returns the model whose tensors have these names and shapes, in any layout but Hugging Face's.

  What leaves no trace in them (strides, heads, activation) is taken from what the layout's code has
  for the same shapes.

  Args:
    layout: theirs.
    shapes: {name: shape}.
    source: where they are, for messages.
    heads: of a CompactViT, where the names showed them.

  Raises:
    UserError: something cannot be known from the shapes; --model says it.
  """
  help_ = 'give its name, --model=NAME of cvt_flax.convert, or in Python model=CvT(...)'
  if layout.name in compact.LAYOUTS:
    return compact.read(layout, shapes, source, heads, help_.replace('CvT', 'CompactViT'))
  return cvt.read(layout, shapes, num_classes(layout, shapes), source, help_)


def check_expressible(layout: Layout, model: Model) -> None:
  """Checks that a layout can hold what `model` computes.

  Raises:
    UserError: listing the attributes that it has no place for.
  """
  if isinstance(model, CompactViT):
    problems = compact.problems(layout, model)
  elif layout.name in compact.LAYOUTS:
    problems = ['a CvT (only a CompactViT)']
  else:
    problems = cvt.problems(layout, model)
  if problems:
    raise UserError(f'the layout {layout.name!r} cannot hold this model: {", ".join(problems)}')


def differences(a: Model, b: Model) -> dict[str, tuple]:
  """Returns in what two models compute differently, as {name: (of a, of b)}, lists by stage.

  Not the classes, and nothing that only training sees. The models are of one class.
  """
  if isinstance(a, CompactViT):
    return compact.differences(a, b)
  return cvt.differences(a, b)


def unsaid(layout: Layout, model: Model) -> list[str]:
  """Returns what of `model` its tensors in `layout` do not show, in words.

  A file of tensors alone is read with what the layout's code has for such shapes.
  """
  shapes = {name: tensor.shape for name, tensor in layout.tensors(model).items()}
  try:
    shown = read(layout, shapes, '')
  except UserError:
    return ['strides, heads or projection']
  return [f'{name} {own}' for name, (own, _) in differences(model, shown).items()]
