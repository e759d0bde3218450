"""Whether tensors are those of a model: how many, their names, shapes and kinds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from cvt_flax.errors import UserError
from cvt_flax.models.compact import CompactViT
from cvt_flax.models.cvt import CvT

Path = tuple[str, ...]  # such as ('params', 'stage0', 'patch_embed', 'proj', 'kernel')

# How many batches a batch norm of PyTorch has seen. Nothing computes with it.
COUNTER = 'num_batches_tracked'


def leaf_shapes(model: CvT | CompactViT) -> dict[Path, tuple[int, ...]]:
  """Returns {path: shape} of all parameters and statistics of `model`."""
  compact = isinstance(model, CompactViT)
  size = model.image_size if compact else 8 * math.prod(model.patch_strides)
  images = jax.ShapeDtypeStruct((1, size, size, model.in_channels), jnp.float32)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # of maps of one key, which is for whoever uses the model
    tree = jax.eval_shape(model.init, jax.random.key(0), images)
  return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree).items()}


def check_size(source: str, model: CvT | CompactViT, tensors: int) -> None:
  """Raises a UserError when there are fewer tensors than blocks, before a tree of them is made."""
  blocks = model.depth if isinstance(model, CompactViT) else sum(model.depths)
  if blocks > tensors:
    raise UserError(f'{source}: the model has {blocks} blocks, and there are {tensors} tensors')


def check(
  source: str,
  expected: Mapping[str | Path, tuple[int, ...]],
  found: Mapping[str | Path, tuple[int, ...]],
) -> None:
  """Checks that names and shapes are those that are expected; counters may be missing.

  Args:
    source: where the tensors are, for the message.
    expected: {name or path: shape} of the model.
    found: {name or path: shape} of the source.

  Raises:
    UserError: listing all that is missing, left over or of another shape.
  """
  expected, found = (
    {name if isinstance(name, str) else '/'.join(name): shape for name, shape in each.items()}
    for each in (expected, found)
  )
  missing = [n for n in expected if n not in found and not n.endswith(f'.{COUNTER}')]
  left_over = [n for n in found if n not in expected]
  misfits = [
    f'{n} {list(found[n])} instead of {list(shape)}'
    for n, shape in expected.items()
    if n in found and tuple(found[n]) != tuple(shape)
  ]
  problems = [
    f'{len(names)} {what}: {_few(names)}'
    for names, what in (
      (missing, 'missing'),
      (left_over, 'that the model does not have'),
      (misfits, 'of another shape'),
    )
    if names
  ]
  if problems:
    raise UserError(f'{source} does not fit the model; tensors {"; tensors ".join(problems)}')


def check_numbers(source: str, name: str, tensor: np.ndarray, counter: bool = False) -> None:
  """Raises a UserError when a tensor is not of floating-point numbers; a counter may be."""
  if not counter and tensor.dtype.kind in 'iu':
    raise UserError(f'{source}: {name} is of {tensor.dtype}, and no parameter is an integer')


def _few(names, most=8):
  more = f', and {len(names) - most} more' if len(names) > most else ''
  return ', '.join(names[:most]) + more
