"""Weights out: save_pretrained, and every layout that is written."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import numpy as np
from flax import traverse_util

from cvt_flax import storage
from cvt_flax.errors import UserError
from cvt_flax.models.compact import CompactViT
from cvt_flax.models.cvt import CvT
from cvt_flax.weights import (
  architecture,
  compact,
  description,
  files,
  huggingface_config,
  preprocessing,
  tensor_checks,
)
from cvt_flax.weights.description import Description
from cvt_flax.weights.layouts import HUGGING_FACE, LAYOUTS, OFFICIAL, VIT_PYTORCH
from cvt_flax.weights.preprocessing import Preprocessing
from cvt_flax.weights.pretrained import FLAX, Weights

# Layouts that are written as .pth files; the others are folders.
IN_PTH = (OFFICIAL.name, VIT_PYTORCH.name, *compact.LAYOUTS)


def save_pretrained(
  folder: str | pathlib.Path,
  model: CvT | CompactViT,
  variables: Mapping,
  class_names: tuple[str, ...] = (),
  preprocessing: Preprocessing | None = None,
) -> None:
  """Writes model.safetensors, config.json and preprocessor_config.json to a new folder.

      weights = load_weights('CvT-13-384x384-IN-1k.pth')
      known = weights.description
      save_pretrained('tuned/', weights.model, tuned, known.class_names, known.preprocessing)

  Args:
    folder: to be made; the three appear in it together.
    model: the network.
    variables: {'params', 'batch_stats'}.
    class_names: what the logits stand for; () where that is not known.
    preprocessing: what images go through before; None for the authors' at 224, or at the size of a
      CompactViT.

  Raises:
    UserError: the folder exists, or the variables are not those of the model.
  """
  if preprocessing is None:
    compact_size = isinstance(model, CompactViT) and model.image_size
    preprocessing = Preprocessing(compact_size or Preprocessing.image_size)
  known = Description(model, tuple(class_names), preprocessing)
  weights = Weights(known, dict(variables), FLAX, 'the tree of variables')
  write(weights, storage.local_path(folder), FLAX)


def write(weights: Weights, path: pathlib.Path, kind: str) -> None:
  """Writes weights to a new folder ('flax', 'huggingface') or file (any other layout).

  Raises:
    UserError: there is something at `path`; the layout cannot hold the model; the variables are not
      those of the model.
  """
  known = weights.description
  leaves = {p: np.asarray(x) for p, x in traverse_util.flatten_dict(weights.variables).items()}
  shapes = tensor_checks.leaf_shapes(known.model)
  tensor_checks.check(weights.source, shapes, {p: x.shape for p, x in leaves.items()})
  check_writable(weights, path, kind)
  if kind == FLAX:
    with storage.new_path(path, folder=True) as folder:
      folder.mkdir()
      tensors = {'/'.join(p): leaves[p] for p in shapes}
      files.write_safetensors(folder / files.SAFETENSORS, tensors, {'format': 'flax'})
      _write_configs(folder, description.config_json(known), known)
    return
  layout = LAYOUTS[kind]
  tensors = layout.pack(known.model, weights.variables)
  with storage.new_path(path, folder=layout is HUGGING_FACE) as new:
    if layout is not HUGGING_FACE:
      files.write_pytorch(new, tensors)
      return
    new.mkdir()
    files.write_safetensors(new / files.SAFETENSORS, tensors, {'format': 'pt'})  # transformers asks
    names = known.class_names or tuple(f'LABEL_{i}' for i in range(known.model.num_classes))
    config = huggingface_config.from_model(known.model) | {
      'id2label': description.id2label(names),
      'label2id': {name: i for i, name in enumerate(names)},
    }
    _write_configs(new, config, known)


def check_writable(weights: Weights, path: pathlib.Path, kind: str) -> None:
  """Checks what `write` can check before it works.

  Raises:
    UserError: there is something at `path`, or the layout cannot hold the model.
  """
  storage.check_new(path, folder=kind not in IN_PTH)
  if kind != FLAX:
    architecture.check_expressible(LAYOUTS[kind], weights.model)
    if weights.model.num_classes == 1:  # whoever reads it would take a softmax over one logit
      raise UserError(f'the layout {kind!r} has a logit for each class, and this model one for two')
  if kind in IN_PTH:
    files.import_torch(f'to write {path}')
  if kind == HUGGING_FACE.name:
    preprocessing.check_huggingface(weights.description.preprocessing)


def _write_configs(folder, config, known):
  files.write_json(folder / files.CONFIG, config)
  files.write_json(folder / files.PREPROCESSOR, preprocessing.to_json(known.preprocessing))
