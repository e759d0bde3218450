"""Weights from one layout to another."""

from __future__ import annotations

import pathlib

from cvt_flax import storage
from cvt_flax.errors import UserError, nearest
from cvt_flax.models.compact import CompactViT
from cvt_flax.models.cvt import CvT
from cvt_flax.weights import architecture, parity, pretrained, saving
from cvt_flax.weights.layouts import HUGGING_FACE, LAYOUTS, OFFICIAL, Layout
from cvt_flax.weights.preprocessing import Preprocessing
from cvt_flax.weights.pretrained import FLAX, Progress, Weights

KINDS = (FLAX, *LAYOUTS)


def convert_weights(
  source: str | pathlib.Path,
  destination: str | pathlib.Path,
  to: str = '',
  model: str | CvT | CompactViT = '',
  activation: str = '',
  check: bool = False,
  progress: Progress | None = None,
) -> dict:
  """Converts weights between PyTorch's layouts and ours.

  Args:
    source: as for `load_pretrained`.
    destination: a new folder ('flax', 'huggingface') or .pth file (any other).
    to: 'flax', 'official', 'huggingface', 'vit-pytorch', or for a CompactViT 'vit-from-scratch' or
      'compact-transformers'; '' is 'official' for a destination whose name ends with .pth, else
      'flax'.
    model: as for `load_pretrained`.
    activation: 'quick_gelu' or 'gelu' in place of the model's own.
    check: whether to compare logits and stage maps with PyTorch on random images, before anything
      is written.
    progress: called as progress(done, total) in parameters while the source is read.

  Returns:
    {'from', 'to', 'parameters', 'num_classes', 'image_size', 'activation', 'notes'}; and with
    `check` 'logits' and 'maps', max|difference| / max|value| of each.

  Raises:
    UserError: the source is damaged or does not fit, the destination exists or cannot hold the
      model, or PyTorch is needed and not installed. Nothing is left behind.
  """
  destination = storage.local_path(destination)
  to = to or _by_suffix(destination)
  if to not in KINDS:
    raise UserError(f'to={to!r}: one of {", ".join(KINDS)} is needed{nearest(to, KINDS)}')
  weights = pretrained.load(source, model, activation, progress)
  compared = _compared(weights, to) if check else None
  saving.check_writable(weights, destination, to)
  notes = list(weights.notes)
  if to in saving.IN_PTH:
    notes += _left_behind(weights, LAYOUTS[to])
  if to == HUGGING_FACE.name and weights.model.activation == 'quick_gelu':
    notes.append(_export_note(weights))
  report = {
    'from': weights.kind,
    'to': to,
    'parameters': weights.parameters,
    'num_classes': weights.model.num_classes,
    'image_size': weights.description.preprocessing.image_size,
    'activation': weights.model.activation,
    'notes': notes,
  }
  if compared:
    report |= _check(weights, compared)
  saving.write(weights, destination, to)
  return report


def _by_suffix(destination):
  match destination.suffix.lower():
    case '.pth':
      return OFFICIAL.name
    case '.pt' | '.bin' | '.ckpt' | '.safetensors' as suffix:
      raise UserError(f'{destination}: no layout is written as {suffix}: .pth, or a folder, is')
    case _:
      return FLAX


def _left_behind(weights: Weights, layout: Layout) -> list[str]:
  """Returns notes on what a file of tensors alone does not say."""
  notes = []
  if unsaid := architecture.unsaid(layout, weights.model):
    notes.append(
      f'a .pth file does not say {", ".join(unsaid)}: who reads it has to be given the model'
    )
  known = weights.description
  if known.class_names or known.preprocessing != Preprocessing():
    notes.append('class names and preprocessing have no place in a .pth file')
  return notes


def _export_note(weights: Weights) -> str:
  size = min(weights.description.preprocessing.image_size, 224)
  images = parity.random_images((size, size), count=1, channels=weights.model.in_channels)
  moved = parity.activation_difference(weights.model, weights.variables, images)
  return (
    "transformers computes 'gelu' whatever config.json says, and these weights are of a model with "
    f"'quick_gelu': on a random image its logits differ by {moved:.1%} of the largest"
  )


def _compared(weights: Weights, to: str) -> Layout:
  """Returns the layout that is read or written, whichever is PyTorch's."""
  layout = LAYOUTS.get(to) or LAYOUTS.get(weights.kind)
  if layout is None:
    raise UserError(f'check: neither {weights.kind!r} nor {to!r} is of PyTorch')
  parity.check_comparable(layout)
  return layout


def _check(weights: Weights, layout: Layout) -> dict:
  """Returns how far PyTorch's logits and maps are from ours."""
  size = weights.description.preprocessing.image_size
  images = parity.random_images((size, size), channels=weights.model.in_channels)
  found = parity.compare(weights.model, weights.variables, layout, images)
  return {'logits': found.logits, 'maps': found.maps}
