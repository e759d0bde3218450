"""Weights in and out, whatever they are kept in."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping

import jax
import numpy as np
from flax import traverse_util

from cvt_flax import storage
from cvt_flax.errors import UserError, nearest
from cvt_flax.models.compact import CompactViT
from cvt_flax.models.cvt import CvT
from cvt_flax.models.geometry import stage_geometry
from cvt_flax.weights import (
  architecture,
  compact,
  description,
  files,
  huggingface_config,
  layouts,
  preprocessing,
  run_folder,
)
from cvt_flax.weights.description import Description
from cvt_flax.weights.layouts import HUGGING_FACE, LAYOUTS, OFFICIAL, VIT_PYTORCH, Layout
from cvt_flax.weights.preprocessing import Preprocessing

# What weights are kept in, besides the layouts: a folder of ours, and a run folder.
FLAX, RUN = 'flax', 'run'

# Layouts that are written as .pth files; the others are folders.
IN_PTH = (OFFICIAL.name, VIT_PYTORCH.name, *compact.LAYOUTS)

_CONFIG, _PREPROCESSOR = 'config.json', 'preprocessor_config.json'
_SAFETENSORS, _BIN = 'model.safetensors', 'pytorch_model.bin'

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
    model: a name of `list_models()`, or a model, in place of what the weights say themselves.
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
    return _load_folder(_download(source[3:]), source, model, activation, progress)
  path = storage.path_of(source)
  if not path.exists() and source in list_pretrained():
    path = _TRAINED / source
  if storage.is_remote(path) and not (path / run_folder.DESCRIPTION).is_file():
    raise UserError(f'{source} holds no run: of an object store only run folders are read')
  if not path.exists():
    there = {p.name: str(p) for p in path.parent.glob('*')} | {n: n for n in list_pretrained()}
    close = nearest(path.name, there, shown=there)
    raise UserError(
      f'{path}: there is no such file or folder{close or "."} hf:NAME is for models of Hugging Face'
    )
  if path.is_file() and path.name in (_SAFETENSORS, _BIN) and (path.parent / _CONFIG).is_file():
    path = path.parent
  if path.is_dir():
    return _load_folder(path, source, model, activation, progress)
  file, heads = compact.merge_heads(files.open_tensors(path))
  layout = architecture.layout_of(file.shapes, source)
  if layout is HUGGING_FACE:
    raise UserError(f'{path} is of Hugging Face, and {_CONFIG} has to stand beside it')
  found = _override(
    lambda: architecture.read(layout, file.shapes, source, heads),
    model,
    architecture.num_classes(layout, file.shapes),
  )
  notes = []
  names = ()
  if not model and architecture.is_guess(found):
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
  found = architecture.with_activation(found, activation)
  return _read(file, layout, Description(found, names, steps), layout.name, source, notes, progress)


def classifier(
  weights: Weights, image_size: int = 0, dtype: str = ''
) -> tuple[CvT | CompactViT, Preprocessing]:
  """Returns the model that classifies colour images, and what they go through before it.

  Args:
    weights: as `load` returns them.
    image_size: height and width, in pixels, in place of the weights' own; 0 keeps theirs.
    dtype: 'float32' or 'bfloat16', to compute in; '' is the model's own.

  Raises:
    UserError: the model has no classifier, or is not for such images.
  """
  model, steps = weights.model, weights.description.preprocessing
  if not model.num_classes:
    raise UserError(f'{weights.source} has no classifier')
  if model.in_channels != 3:
    raise UserError(f'{weights.source} takes images of {model.in_channels} channels, not of 3')
  if image_size:
    steps = dataclasses.replace(steps, image_size=image_size)
  size = steps.image_size
  try:
    stages = stage_geometry(model, size, size)
  except ValueError as e:
    raise UserError(str(e)) from e
  if min(min(stage.height, stage.width) for stage in stages) < 1:
    raise UserError(f'images of {size}x{size} are too small for this model')
  check_dtype(dtype)
  return model.clone(dtype=jax.numpy.dtype(dtype)) if dtype else model, steps


def check_dtype(dtype: str) -> None:
  """Raises a UserError where `dtype` is none that `classifier` takes."""
  if dtype not in ('', 'float32', 'bfloat16'):
    raise UserError(f'dtype={dtype!r}: float32 or bfloat16 is needed')


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
    model: a name of `list_models()`, or a model, where the weights do not say it themselves.
    activation: 'quick_gelu' or 'gelu' in place of the model's own. Hugging Face computes 'gelu'.

  Raises:
    UserError: the source is damaged or does not fit; every tensor that is missing, left over or of
      another shape is in the message.
  """
  weights = load(source, model, activation)
  for note in weights.notes:
    warnings.warn(f'{source}: {note}', stacklevel=2)
  return weights.model, jax.tree.map(jax.numpy.asarray, weights.variables)


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
  write(weights, files.local_path(folder), FLAX)


def write(weights: Weights, path: pathlib.Path, kind: str) -> None:
  """Writes weights to a new folder ('flax', 'huggingface') or file (any other layout).

  Raises:
    UserError: there is something at `path`; the layout cannot hold the model; the variables are not
      those of the model.
  """
  known = weights.description
  leaves = {p: np.asarray(x) for p, x in traverse_util.flatten_dict(weights.variables).items()}
  shapes = layouts.leaf_shapes(known.model)
  layouts.check(weights.source, _joined(shapes), _joined({p: x.shape for p, x in leaves.items()}))
  check_writable(weights, path, kind)
  if kind == FLAX:
    with files.new_path(path) as folder:
      folder.mkdir()
      tensors = {name: leaves[p] for name, p in zip(_joined(shapes), shapes, strict=True)}
      files.write_safetensors(folder / _SAFETENSORS, tensors, {'format': 'flax'})
      _write_configs(folder, description.config_json(known), known)
    return
  layout = LAYOUTS[kind]
  tensors = layout.pack(known.model, weights.variables)
  with files.new_path(path) as new:
    if layout is not HUGGING_FACE:
      files.write_pytorch(new, tensors)
      return
    new.mkdir()
    files.write_safetensors(new / _SAFETENSORS, tensors, {'format': 'pt'})  # transformers asks
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
  files.check_new(path)
  if kind != FLAX:
    architecture.check_expressible(LAYOUTS[kind], weights.model)
    if weights.model.num_classes == 1:  # whoever reads it would take a softmax over one logit
      raise UserError(f'the layout {kind!r} has a logit for each class, and this model one for two')
  if kind in IN_PTH:
    files.import_torch(f'to write {path}')
  if kind == HUGGING_FACE.name:
    preprocessing.check_huggingface(weights.description.preprocessing)


def _write_configs(folder, config, known):
  files.write_json(folder / _CONFIG, config)
  files.write_json(folder / _PREPROCESSOR, preprocessing.to_json(known.preprocessing))


def _override(read, model, num_classes):
  """Returns the model that is given, by its name or as such; else what `read` returns."""
  match model:
    case '':
      return read()
    case str():
      return architecture.named(model, num_classes)
    case _:
      return model


def _load_folder(folder, source, model, activation, progress):
  if (folder / run_folder.DESCRIPTION).is_file():
    return _load_run(folder, source, model, activation)
  if (folder / run_folder.CHECKPOINTS).is_dir():
    raise UserError(
      f'{source} is a run folder without {run_folder.DESCRIPTION}: the training that made it, '
      'started again, writes that'
    )
  if not (folder / _CONFIG).is_file():
    holds = ', '.join(sorted(p.name for p in folder.iterdir())[:5]) or 'nothing'
    raise UserError(
      f'{source} holds {holds}: {_CONFIG} with {_SAFETENSORS} or {_BIN} is needed, or a run folder'
    )
  config = files.read_json(folder / _CONFIG)
  known = (folder / _PREPROCESSOR).is_file()
  steps = files.read_json(folder / _PREPROCESSOR) if known else {}
  notes = [] if known else [f'no {_PREPROCESSOR}: images of 224x224, cropped, are taken']
  where = str(folder / _CONFIG)
  if config.get('library_name') == description.LIBRARY:
    file = _tensors_of(folder, (_SAFETENSORS,))
    found = description.from_json(config, steps, where, str(folder / _PREPROCESSOR))
    classes = found.model.num_classes
    given = _override(lambda: found.model, model, classes)
    given = architecture.with_activation(given, activation)
    found = dataclasses.replace(found, model=given)
    return _read(file, None, found, FLAX, source, notes, progress)
  if config.get('model_type') != 'cvt':
    raise UserError(f"{where}: model_type={config.get('model_type')!r}: only 'cvt' can be read")
  file = _tensors_of(folder, (_SAFETENSORS, _BIN))
  classes = architecture.num_classes(HUGGING_FACE, file.shapes)
  if not classes:
    raise UserError(f'{source} has no classifier: only CvtForImageClassification can be read')
  own = config.get('activation', 'gelu')
  given = _override(lambda: huggingface_config.to_model(config, classes, where), model, classes)
  if isinstance(model, str):  # a name says nothing of it, a CvT does
    given = architecture.with_activation(given, activation or own)
  else:
    given = architecture.with_activation(given, activation)
  if given.activation == 'gelu' and not ('activation' in config or activation):
    notes.append(_GELU_NOTE)
  steps = preprocessing.from_json(steps, str(folder / _PREPROCESSOR))
  found = description.described(given, config, where, steps)
  return _read(file, HUGGING_FACE, found, HUGGING_FACE.name, source, notes, progress)


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
  given = _override(lambda: found.model, model, found.model.num_classes)
  given = architecture.with_activation(given, activation)
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
  layouts.check_size(f'{source} ({file.path.name})', known.model, len(file.shapes))
  read, done = file.read, 0
  if progress:

    def read(name):
      nonlocal done
      done += math.prod(file.shapes[name])
      progress(done, file.parameters)
      return file.read(name)

  if layout is None:
    shapes = layouts.leaf_shapes(known.model)
    layouts.check(source, _joined(shapes), file.shapes)
    leaves = {}
    for path in shapes:
      tensor = read('/'.join(path))
      layouts.check_numbers(source, '/'.join(path), tensor)
      leaves[path] = np.array(tensor, np.float32)
    variables = {'batch_stats': {}} | traverse_util.unflatten_dict(leaves)
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
  leaves = {'/'.join(p): x for p, x in traverse_util.flatten_dict(variables).items()}
  damaged = [name for name, x in leaves.items() if not np.isfinite(x).all()]
  if damaged:
    more = f', and {len(damaged) - 3} more' if len(damaged) > 3 else ''
    raise UserError(f'{source} holds values that are not finite: {", ".join(damaged[:3])}{more}')


def _joined(leaves):
  return {'/'.join(path): value for path, value in leaves.items()}


def _download(name: str) -> pathlib.Path:
  """Returns the folder of a model of Hugging Face, NAME or NAME@REVISION, fetched or cached."""
  try:
    import huggingface_hub
    from huggingface_hub import errors
  except ImportError as e:
    raise UserError(f'hf:{name} needs a package: pip install huggingface_hub') from e
  repository, _, revision = name.partition('@')
  found = None
  try:
    for file in (_CONFIG, _PREPROCESSOR, _SAFETENSORS, _BIN):
      if file == _BIN and (found / _SAFETENSORS).is_file():
        break
      try:
        path = huggingface_hub.hf_hub_download(repository, file, revision=revision or None)
        found = pathlib.Path(path).parent
      except errors.LocalEntryNotFoundError:  # not in the cache, and out of reach
        raise
      except errors.EntryNotFoundError:  # there, and without such a file
        if file == _CONFIG:
          raise
  except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as e:
    raise UserError(f'hf:{name}: {" ".join(str(e).split())[:300]}') from e
  return found
