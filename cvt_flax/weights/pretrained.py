"""Weights in, whatever they are kept in."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import warnings
from collections.abc import Callable

import jax
import numpy as np
from flax import traverse_util

from cvt_flax import storage
from cvt_flax.errors import UserError, nearest
from cvt_flax.models.compact import CompactViT
from cvt_flax.models.cvt import CvT
from cvt_flax.weights import (
  architecture,
  compact,
  cvt,
  description,
  files,
  hub,
  huggingface_config,
  layouts,
  preprocessing,
  run_folder,
  tensor_checks,
)
from cvt_flax.weights.description import Description
from cvt_flax.weights.files import BIN, CONFIG, PREPROCESSOR, SAFETENSORS
from cvt_flax.weights.layouts import HUGGING_FACE, Layout
from cvt_flax.weights.preprocessing import Preprocessing

# What weights are kept in, besides the layouts: a folder of ours, and a run folder.
FLAX, RUN = 'flax', 'run'

# Weights that come along, each a folder of `save_pretrained` and a README.
_TRAINED = pathlib.Path(__file__).parent / 'trained'

_GELU_NOTE = (
  "the activation is 'gelu', as transformers computes it. microsoft/cvt-* were trained with "
  "'quick_gelu', which differs by up to 0.0203 at every hidden channel: activation=quick_gelu "
  'gives what the authors computed'
)

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Weights:
  """Weights and all that is known of them.

  Attributes:
    description: architecture, class names, preprocessing.
    variables: {'params', 'batch_stats'} of numpy float32 arrays.
    kind: what they were kept in: the name of a layout, 'flax' or 'run'.
    source: where they came from, in words.
    notes: what a person should know of how they were read.
  """

  description: Description
  variables: dict
  kind: str
  source: str
  notes: tuple[str, ...] = ()

  @property
  def model(self) -> CvT | CompactViT:
    return self.description.model

  @property
  def parameters(self) -> int:
    """The number of parameters, without running statistics."""
    return sum(x.size for x in jax.tree.leaves(self.variables['params']))


def load(
  source: str | pathlib.Path,
  model: str | CvT | CompactViT = '',
  activation: str = '',
  progress: Progress | None = None,
) -> Weights:
  """Reads weights from anything that holds them, with all that they say of themselves.

      weights = load_weights('CvT-13-384x384-IN-1k.pth')
      weights.model, weights.variables, weights.description.preprocessing

  It is `cvt_flax.load_weights`; `load_pretrained` returns of it the model and the variables.

  Args:
    source: a .pth or .safetensors file of the authors' code, of vit-pytorch, of SHI-Labs' compact
      transformers or of vit-from-scratch, a folder of Hugging Face or of `save_pretrained`,
      'hf:NAME' or 'hf:NAME@REVISION' (through huggingface_hub), a run folder: its best checkpoint,
      or a name of `list_pretrained()`.
    model: a name of `list_models()`, or a model, in place of what the weights say themselves. A
      name leaves them their number of classes and their activation.
    activation: 'quick_gelu' or 'gelu' in place of the model's own.
    progress: called as progress(done, total) in parameters.

  Raises:
    UserError: the source is damaged, or not what it should be, or does not fit the model.
  """
  if not isinstance(source, str | os.PathLike):
    raise UserError(
      f'the weights are a {type(source).__name__}: a path, a name, or what load_weights returned '
      'is needed'
    )
  source = str(source)
  if not source:
    raise UserError('the weights: a file, a folder or hf:NAME is needed')
  if source.startswith('hf:'):
    return _load_folder(hub.download(source[3:]), source, model, activation, progress)
  path = storage.path_of(source)
  if not path.exists() and source in list_pretrained():
    path = _TRAINED / source
  if storage.is_remote(path) and not (path / run_folder.DESCRIPTION).is_file():
    raise UserError(f'{source} holds no run: of an object store only run folders are read')
  if not path.exists():
    there = {p.name: str(p) for p in path.parent.glob('*')} | {n: n for n in list_pretrained()}
    close = nearest(path.name, there, shown=there)
    raise UserError(
      f'{path}: there is no such file or folder{close or "."} hf:NAME is for models of Hugging '
      f'Face, and {", ".join(list_pretrained())} comes along'
    )
  if path.is_dir():
    return _load_folder(path, source, model, activation, progress)
  described = (path.parent / CONFIG).is_file()
  if described and path.name in (SAFETENSORS, BIN):
    return _load_folder(path.parent, source, model, activation, progress, path.name)
  file, heads = compact.merge_heads(files.open_tensors(path))
  layout = architecture.layout_of(file.shapes, source)
  if layout is HUGGING_FACE and described:
    return _load_folder(path.parent, source, model, activation, progress, path.name)
  if layout is HUGGING_FACE:
    raise UserError(f'{path} is of Hugging Face, and {CONFIG} has to stand beside it')
  found = _chosen(
    lambda: architecture.read(layout, file.shapes, source, heads),
    model,
    architecture.num_classes(layout, file.shapes),
    layout.activation,
    activation,
  )
  notes = []
  names = ()
  if not model and isinstance(found, CvT) and cvt.is_guess(found):
    notes.append(
      'no model of these sizes is known: heads of 64 channels, and keys and values with stride 2, '
      'are taken; model=... says otherwise'
    )
  if found.num_classes == 1000:
    names = tuple(description.imagenet_classes().values())
    notes.append('1000 classes and no names: they are taken for those of ImageNet-1k')
  if isinstance(found, CompactViT):
    if heads and found.heads != heads:
      raise UserError(f'{source} has {heads} heads, the model {found.heads}')
    steps, note = compact.preprocessing_of(layout, found)
    notes.append(note)
  else:
    steps = preprocessing.from_file_name(path)
    if steps is None:
      steps = Preprocessing()
      notes.append('no image size in the name of the file: 224x224 is taken')
  return _read(file, layout, Description(found, names, steps), layout.name, source, notes, progress)


def list_pretrained() -> list[str]:
  """Returns the names of the weights that come along, which `load_pretrained` takes."""
  return sorted(folder.name for folder in _TRAINED.iterdir())


def load_pretrained(
  source: str | pathlib.Path, model: str | CvT | CompactViT = '', activation: str = ''
) -> tuple[CvT | CompactViT, dict]:
  """Returns a model and its variables {'params', 'batch_stats'}, jax float32 arrays.

      model, variables = load_pretrained('CvT-13-224x224-IN-1k.pth')
      logits = model.apply(variables, images)

  Args:
    source: a .pth or .safetensors file of the authors' code, of vit-pytorch, of SHI-Labs' compact
      transformers or of vit-from-scratch, a folder of Hugging Face or of `save_pretrained`,
      'hf:NAME' or 'hf:NAME@REVISION' (downloaded by huggingface_hub), a run folder: its best
      checkpoint, or a name of `list_pretrained()`.
    model: a name of `list_models()`, or a model, in place of what the weights say themselves. A
      name leaves them their number of classes and their activation.
    activation: 'quick_gelu' or 'gelu' in place of the model's own. Hugging Face computes 'gelu'.

  Raises:
    UserError: the source is damaged or does not fit; every tensor that is missing, left over or of
      another shape is in the message.
  """
  weights = load(source, model, activation)
  for note in weights.notes:
    warnings.warn(f'{source}: {note}', stacklevel=2)
  return weights.model, jax.tree.map(jax.numpy.asarray, weights.variables)


def _chosen(
  read: Callable[[], CvT | CompactViT],
  model: str | CvT | CompactViT,
  num_classes: int,
  own_activation: str,
  activation: str,
) -> CvT | CompactViT:
  """Returns the model of weights.

  Args:
    read: returns what they say themselves.
    model: what is given in its place, a name or the model; or ''.
    num_classes: of the weights, which a name does not say.
    own_activation: of the weights, which a name does not say.
    activation: what is given in its place; or ''.
  """
  match model:
    case '':
      found = read()
    case str():
      named = architecture.named(model, num_classes)
      found = architecture.with_activation(named, own_activation)
    case _:
      found = model
  return architecture.with_activation(found, activation)


def _load_folder(folder, source, model, activation, progress, tensors=''):
  """Reads a folder; `tensors` is the file in it, where one was given."""
  if (folder / run_folder.DESCRIPTION).is_file():
    return _load_run(folder, source, model, activation)
  if (folder / run_folder.CHECKPOINTS).is_dir():
    raise UserError(
      f'{source} is a run folder without {run_folder.DESCRIPTION}: the training that made it, '
      'started again, writes that'
    )
  if not (folder / CONFIG).is_file():
    holds = ', '.join(sorted(p.name for p in folder.iterdir())[:5]) or 'nothing'
    raise UserError(
      f'{source} holds {holds}: {CONFIG} with {SAFETENSORS} or {BIN} is needed, or a run folder'
    )
  config = files.read_json(folder / CONFIG)
  known = (folder / PREPROCESSOR).is_file()
  steps = files.read_json(folder / PREPROCESSOR) if known else {}
  notes = [] if known else [f'no {PREPROCESSOR}: images of 224x224, cropped, are taken']
  where = str(folder / CONFIG)
  if config.get('library_name') == description.LIBRARY:
    file = _tensors_of(folder, (tensors or SAFETENSORS,))
    found = description.from_json(config, steps, where, str(folder / PREPROCESSOR))
    found = dataclasses.replace(found, model=_replaced(found.model, model, activation))
    return _read(file, None, found, FLAX, source, notes, progress)
  if config.get('model_type') != 'cvt':
    raise UserError(f"{where}: model_type={config.get('model_type')!r}: only 'cvt' can be read")
  file = _tensors_of(folder, (tensors,) if tensors else (SAFETENSORS, BIN))
  classes = architecture.num_classes(HUGGING_FACE, file.shapes)
  if not classes:
    raise UserError(f'{source} has no classifier: only CvtForImageClassification can be read')
  own = config.get('activation', 'gelu')
  given = _chosen(
    lambda: huggingface_config.to_model(config, classes, where), model, classes, own, activation
  )
  if given.activation == 'gelu' and not ('activation' in config or activation):
    notes.append(_GELU_NOTE)
  steps = preprocessing.from_json(steps, str(folder / PREPROCESSOR))
  found = description.described(given, config, where, steps)
  return _read(file, HUGGING_FACE, found, HUGGING_FACE.name, source, notes, progress)


def _replaced(own, model, activation):
  """Returns `_chosen` of weights that are kept with their model."""
  return _chosen(lambda: own, model, own.num_classes, own.activation, activation)


def _tensors_of(folder, names):
  for name in names:
    if (folder / name).is_file():
      return files.open_tensors(folder / name)
  parts = ', and weights in several files are not read' if any(folder.glob('*.index.json')) else ''
  raise UserError(f'{folder}: {" or ".join(names)} is missing{parts}')


def _load_run(folder, source, model, activation):
  path = folder / run_folder.DESCRIPTION
  config = files.read_json(path)
  found = description.from_json(config, config.get('preprocessor'), str(path), str(path))
  given = _replaced(found.model, model, activation)
  variables, step, averaged = run_folder.restore_best(folder, given, source)
  variables = jax.tree.map(np.asarray, variables)
  _check_finite(source, variables)
  note = f'the checkpoint of step {step}, its {"averaged " if averaged else ""}parameters'
  return Weights(dataclasses.replace(found, model=given), variables, RUN, source, (note,))


def _read(
  file: files.TensorFile,
  layout: Layout | None,
  known: Description,
  kind: str,
  source: str,
  notes: list[str],
  progress: Progress | None,
) -> Weights:
  """Reads all tensors of a file into the variables of a model; without a layout, into our own."""
  tensor_checks.check_size(f'{source} ({file.path.name})', known.model, len(file.shapes))
  read, done = file.read, 0
  if progress:

    def read(name):
      nonlocal done
      done += math.prod(file.shapes[name])
      progress(done, file.parameters)
      return file.read(name)

  if layout is None:
    variables = layouts.unpack_own(known.model, file.shapes, read, source)
  else:
    # Any activation: it does not show in tensors.
    architecture.check_expressible(
      layout, architecture.with_activation(known.model, layout.activation)
    )
    variables = layout.unpack(known.model, file.shapes, read, source)
  _check_finite(source, variables)
  notes = (*notes, file.note) if file.note else tuple(notes)
  return Weights(known, variables, kind, source, notes)


def _check_finite(source, variables):
  leaves = traverse_util.flatten_dict(variables, sep='/')
  damaged = [name for name, x in leaves.items() if not np.isfinite(x).all()]
  if damaged:
    more = f', and {len(damaged) - 3} more' if len(damaged) > 3 else ''
    raise UserError(f'{source} holds values that are not finite: {", ".join(damaged[:3])}{more}')
