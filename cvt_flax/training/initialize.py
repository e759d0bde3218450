"""init_from: a run, or an evaluation, that starts from weights."""

from __future__ import annotations

import dataclasses

import numpy as np
from flax import traverse_util

from cvt_flax import storage
from cvt_flax.errors import UserError
from cvt_flax.models.compact import CompactViT
from cvt_flax.models.cvt import CvT
from cvt_flax.models.positions import resize_positions
from cvt_flax.models.zoo import create_model, list_models
from cvt_flax.ops.logits import num_classes
from cvt_flax.training import experiment
from cvt_flax.training.config import ModelConfig, differences, flags
from cvt_flax.weights import architecture, pretrained, tensor_checks
from cvt_flax.weights.description import same_classes
from cvt_flax.weights.preprocessing import Preprocessing

_HEAD = 'head'
# By which attributes of a CompactViT an image becomes tokens.
_OF_TOKENS = ('patch_size', 'conv_layers', 'position')


def initial_variables(
  source: str,
  config: ModelConfig,
  model: CvT | CompactViT,
  class_names: tuple[str, ...],
  preprocessing: Preprocessing,
  new_head: bool,
) -> dict:
  """Reads what `model` takes of weights, and prints what that is.

  Args:
    source: config.init_from.
    config: of the model.
    model: of the run.
    class_names: of the data.
    preprocessing: of the run.
    new_head: whether the head may start anew where the weights have other classes, as it may for
      training.

  Returns:
    {path: array} of parameters and statistics: all of the model's, or all but its head's.

  Raises:
    UserError: the weights cannot be read or do not fit the model; where the head may not start
      anew, they are of other classes, or of a network that computes something else.
  """
  try:
    read = pretrained.load(source)
  except UserError as e:
    raise UserError(f'init_from: {e}') from e
  for note in read.notes:
    print(f'{source}: {note}')
  weights = _for_size(read, model)
  names, classes = weights.description.class_names, weights.model.num_classes
  same = classes == model.num_classes and same_classes(names, class_names)
  if not same and not new_head:
    if same_classes(names, class_names) and 1 in (classes, model.num_classes):
      raise UserError(
        f'{source} has a head of {classes} logits, this config one of {model.num_classes}: another '
        'loss is needed'
      )
    raise UserError(
      f'{source} has {classes} classes ({", ".join(names[:3]) or "without names"}), the data '
      f'{len(class_names)} ({", ".join(class_names[:3])}): the same classes are needed'
    )
  shapes = tensor_checks.leaf_shapes(model)
  leaves = traverse_util.flatten_dict(weights.variables)
  if not same:
    leaves, body = _without_head(leaves), _without_head(shapes)
  else:
    body = shapes
  found = {path: x.shape for path, x in leaves.items()}
  theirs, ours = _name(weights.model), _name(model)
  if found != body and theirs and ours:
    raise UserError(
      f'init_from={source} is of {theirs}, and this config of {ours}: --config.model.name={theirs} '
      'is needed'
    )
  try:
    tensor_checks.check(f'init_from={source}', body, found)
  except UserError as e:
    raise UserError(f'{e}{_trained_with(weights, source, config)}') from e
  anew = '; the head starts anew, '
  if same_classes(names, class_names):
    anew += f'with {model.num_classes} logits in place of {classes}'
  else:
    anew += f'for {len(class_names)} classes in place of {num_classes(classes)} others'
  print(
    f'from {source} ({weights.kind}): {len(leaves)} of {len(shapes)} tensors{"" if same else anew}'
  )
  if weights.model != read.model:
    old, new = read.model.image_size, weights.model.image_size
    print(f'its positions, for images of {old}x{old}, are resized for {new}x{new}')
  changed = architecture.differences(weights.model, model)
  # The activation may be chosen: the same weights are used with both.
  if not new_head and changed.keys() - {'activation'}:
    raise UserError(f'{source} is of another network than this config: {_arrows(changed)}')
  warning = 'WARNING: ' if changed.keys() - {'activation'} else ''
  steps, own = (
    dataclasses.asdict(weights.description.preprocessing),
    dataclasses.asdict(preprocessing),
  )
  of_images = {name: (steps[name], own[name]) for name in own if steps[name] != own[name]}
  if changed or of_images:
    arrows = _arrows(changed | of_images)
    print(f'{warning}not as the weights say, but as this config does: {arrows}')
  if of_images:
    print(f"images as the weights' own: {flags({k: steps[k] for k in of_images})}")
  return leaves


def _name(model):
  """Returns the name of a model; '' where it differs from all that have one."""
  for name in list_models():
    named = create_model(name)
    same_class = type(named) is type(model)
    if same_class and architecture.differences(named, model).keys() <= {'activation'}:
      return name
  return ''


def _trained_with(weights, source, config):
  """Returns, for a run, the flags that make of this model's config its own; else ''."""
  if weights.kind != pretrained.RUN:
    return ''
  try:
    saved = experiment.read(storage.path_of(source)).config
  except (UserError, AttributeError):  # damaged, of another version, or not there
    return ''
  found = differences(dataclasses.replace(saved, model=config), saved)
  theirs = {k: value for k, (_, value) in found.items() if k not in experiment.OF_COMPUTING}
  return f'; it was trained with {flags(theirs)}' if theirs else ''


def _for_size(weights, model):
  """Returns weights with positions for the images of `model`, where its tokens are made alike."""
  theirs = weights.model
  if not isinstance(model, CompactViT) or not isinstance(theirs, CompactViT):
    return weights
  alike = all(getattr(model, name) == getattr(theirs, name) for name in _OF_TOKENS)
  if not alike or model.image_size == theirs.image_size:
    return weights
  resized, variables = resize_positions(theirs, weights.variables, model.image_size)
  description = dataclasses.replace(weights.description, model=resized)
  return dataclasses.replace(weights, description=description, variables=variables)


def _arrows(changed):
  return ', '.join(f'{name} {theirs} -> {ours}' for name, (theirs, ours) in changed.items())


def replace_leaves(tree: dict, leaves: dict[tuple[str, ...], np.ndarray]) -> dict:
  """Returns the tree with some leaves replaced."""
  flat = traverse_util.flatten_dict(tree, keep_empty_nodes=True)
  return traverse_util.unflatten_dict(flat | leaves)


def _without_head(leaves):
  return {path: leaf for path, leaf in leaves.items() if path[1] != _HEAD}
