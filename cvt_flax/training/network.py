"""The network of a config: how many logits, and whether it can be trained on such images."""

import dataclasses

import jax.numpy as jnp

from cvt_flax.errors import UserError
from cvt_flax.models.compact import CompactViT
from cvt_flax.models.cvt import CvT
from cvt_flax.models.geometry import stage_geometry
from cvt_flax.models.zoo import create_model, is_compact
from cvt_flax.training.config import ModelConfig, TrainConfig


def build_model(config: ModelConfig, num_classes: int, image_size: int = 0) -> CvT | CompactViT:
  """Returns the configured model; what the config leaves empty is the named model's.

  Args:
    config: of the model.
    num_classes: length of the logits.
    image_size: of the images, for a CompactViT; 0 is the named model's.
  """
  attributes = dataclasses.asdict(config)
  name, dtype = attributes.pop('name'), attributes.pop('dtype')
  given = {k: v for k, v in attributes.items() if v not in ('', (), 0)}
  if image_size and is_compact(name):
    given['image_size'] = image_size
  try:
    return create_model(name, num_classes, dtype=jnp.dtype(dtype), **given)
  except ValueError as e:
    raise UserError(f'model: {e}') from e


def num_logits(config: TrainConfig, classes: int) -> int:
  """Returns how many logits the loss wants; checks what it has by class.

  Raises:
    UserError: there are weights of other classes, or the loss is not for so many.
  """
  if config.class_weights and len(config.class_weights) != classes:
    raise UserError(
      f'class_weights={config.class_weights}: one for each of the {classes} classes of '
      f'{config.source} is needed'
    )
  if config.loss == 'softmax':
    return classes
  if classes != 2:
    raise UserError(f"loss='binary': {config.source} has {classes} classes, and it is for two")
  return 1


def check_attention(model: CvT | CompactViT, image_size: int):
  """Refuses to train a model with a stage whose attention sees a single key, and warns of two."""
  for s, stage in enumerate(stage_geometry(model, image_size, image_size)):
    if min(stage.height, stage.width) < 1:
      raise UserError(f'image_size={image_size}: too small, stage {s} of the model has no pixel')
    if stage.keys == 1:
      if isinstance(model, CompactViT):
        raise UserError(
          f'image_size={image_size} leaves the model a single token, so its attention does '
          'nothing: set a smaller model.patch_size, or larger images'
        )
      raise UserError(
        f'image_size={image_size} leaves stage {s} of the model a single key, so its attention '
        'does nothing: set model.kv_strides to 1 there, smaller model.patch_strides, or larger '
        'images'
      )
    if stage.keys == 2 and isinstance(model, CvT):
      print(
        f'WARNING: image_size={image_size} leaves stage {s} of the model two keys, which is little '
        'to attend to: cvt-13-small-images and cvt-small are for small images'
      )
