"""Weights as a classifier of colour images, and one compiled once, for any number of them."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Float, UInt8

from cvt_flax.errors import UserError
from cvt_flax.models.compact import CompactViT
from cvt_flax.models.cvt import CvT
from cvt_flax.models.fold import fold
from cvt_flax.models.geometry import stage_geometry
from cvt_flax.models.positions import resize_positions
from cvt_flax.ops.logits import class_logits, num_classes
from cvt_flax.ops.pixels import normalize_pixels
from cvt_flax.weights import pretrained
from cvt_flax.weights.preprocessing import Preprocessing


def compile_predict(
  weights: str | pathlib.Path | pretrained.Weights,
  batch_sizes: Sequence[int] = (1, 8, 64),
  image_size: int = 0,
  dtype: str = '',
) -> Callable[[UInt8[np.ndarray, 'n h w 3']], Float[np.ndarray, 'n classes']]:
  """Returns a function that classifies images, compiled here and never again.

      predict = compile_predict('cvt-13/', dtype='bfloat16')
      probabilities = predict(pixels)  # uint8 [n 224 224 3], for any n

  Batch norms are folded (`cvt_flax.fold`). There is one program for each of `batch_sizes`, and
  images are padded to one of these or divided among several: fewer than twice as many are computed
  as there are, unless there are less than the smallest. Several threads may call it at once.

  Args:
    weights: what `load_pretrained` takes, or what `load_weights` returned.
    batch_sizes: images of a batch; one program is compiled for each.
    image_size: height and width in place of the weights' own; 0 keeps theirs.
    dtype: 'float32' or 'bfloat16', to compute in; '' is the model's own.

  Returns:
    A function from uint8 images [n h w 3], resized and cropped as the weights' preprocessing says,
    to the probabilities of all classes, float32 [n classes].

  Raises:
    UserError: the weights cannot be read, or the model has no classifier or is not for colour
      images; of the function: images of another shape or dtype.
  """
  sizes = sorted(set(batch_sizes))
  if not sizes or sizes[0] < 1:
    raise UserError(f'batch_sizes={tuple(batch_sizes)}: numbers of images from 1 on are needed')
  if not isinstance(weights, pretrained.Weights):
    weights = pretrained.load(weights)
  model, variables, steps = classifier(weights, image_size, dtype)
  model, variables = fold(model, variables)
  variables = jax.device_put(variables)
  image = (steps.image_size, steps.image_size, 3)

  @jax.jit
  def classify(variables, pixels):
    logits = model.apply(variables, normalize_pixels(pixels, steps.mean, steps.std))
    return jax.nn.softmax(class_logits(logits))

  programs = {
    n: classify.lower(variables, jax.ShapeDtypeStruct((n, *image), np.uint8)).compile()
    for n in sizes
  }

  def predict(images):
    images = np.asarray(images)
    if images.shape[1:] != image or images.dtype != np.uint8:
      raise UserError(
        f'images {list(images.shape)} of {images.dtype}: uint8 images '
        f'[n {" ".join(map(str, image))}] are needed'
      )
    computed, start = [], 0
    while start < len(images):
      size = batch_size(sizes, len(images) - start)
      part = images[start : start + size]
      padding = [(0, size - len(part)), (0, 0), (0, 0), (0, 0)]
      computed.append((programs[size](variables, np.pad(part, padding)), len(part)))
      start += size
    # All batches are under way before the first one is waited for.
    rows = [np.asarray(probabilities)[:count] for probabilities, count in computed]
    return np.concatenate([np.zeros((0, num_classes(model.num_classes)), np.float32), *rows])

  return predict


def batch_size(sizes: Sequence[int], count: int) -> int:
  """Returns which of the sizes, in rising order, the next batch of `count` images has.

  The smallest that holds them if they fill more than half of it, otherwise the largest that they
  fill.
  """
  holds = next((size for size in sizes if size >= count), sizes[-1])
  if 2 * count > holds:
    return holds
  return max((size for size in sizes if size <= count), default=holds)


def classifier(
  weights: pretrained.Weights, image_size: int = 0, dtype: str = ''
) -> tuple[CvT | CompactViT, dict, Preprocessing]:
  """Returns the model that classifies colour images, its variables, and what images go through.

  Of a CompactViT positions are resized for the images (`cvt_flax.resize_positions`).

  Args:
    weights: as `load` returns them.
    image_size: height and width, in pixels, in place of the weights' own; 0 keeps theirs.
    dtype: 'float32' or 'bfloat16', to compute in; '' is the model's own.

  Raises:
    UserError: the model has no classifier, or is not for such images.
  """
  model, variables = weights.model, weights.variables
  steps = weights.description.preprocessing
  if not model.num_classes:
    raise UserError(f'{weights.source} has no classifier')
  if model.in_channels != 3:
    raise UserError(f'{weights.source} takes images of {model.in_channels} channels, not of 3')
  if image_size:
    steps = dataclasses.replace(steps, image_size=image_size)
  size = steps.image_size
  try:
    if image_size:
      model, variables = resize_positions(model, variables, size)
    stages = stage_geometry(model, size, size)
  except ValueError as e:
    raise UserError(str(e)) from e
  if min(min(stage.height, stage.width) for stage in stages) < 1:
    raise UserError(f'images of {size}x{size} are too small for this model')
  check_dtype(dtype)
  return model.clone(dtype=jax.numpy.dtype(dtype)) if dtype else model, variables, steps


def check_dtype(dtype: str) -> None:
  """Raises a UserError where `dtype` is none that `classifier` takes."""
  if dtype not in ('', 'float32', 'bfloat16'):
    raise UserError(f'dtype={dtype!r}: float32 or bfloat16 is needed')
