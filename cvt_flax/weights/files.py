"""Tensor files: .pth and .safetensors, from strangers and for others."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from cvt_flax.errors import UserError

# A folder of weights, of Hugging Face and of ours.
CONFIG, PREPROCESSOR = 'config.json', 'preprocessor_config.json'
SAFETENSORS, BIN = 'model.safetensors', 'pytorch_model.bin'

# Where training scripts put the state dict in a checkpoint: the authors' code, timm, Lightning.
_STATE_KEYS = ('state_dict', 'model', 'model_state_dict')
# Where timm and others put averages of the parameters, which are what is evaluated.
_AVERAGE_KEYS = ('state_dict_ema', 'model_ema', 'ema')
# What DistributedDataParallel, torch.compile and Lightning put in front of every name.
_PREFIXES = ('module.', '_orig_mod.', 'model.')


@dataclasses.dataclass(frozen=True)
class TensorFile:
  """The tensors of a file. Their names and shapes are known, they are read one at a time.

  Attributes:
    path: of the file.
    shapes: {name: shape}.
    read: name -> the tensor.
    note: what a person should know of what was read; '' where there is nothing.
  """

  path: pathlib.Path
  shapes: Mapping[str, tuple[int, ...]]
  read: Callable[[str], np.ndarray]
  note: str = ''

  @property
  def parameters(self) -> int:
    return sum(int(np.prod(shape)) for shape in self.shapes.values())


def open_tensors(path: pathlib.Path) -> TensorFile:
  """Opens a file of tensors; what it is shows by its content, not by its name.

  Nothing in it is run. Sizes are compared with that of the file before memory is taken.

  Raises:
    UserError: it is neither .pth nor .safetensors, damaged, truncated, wants to run code, or holds
      something else than numbers; PyTorch is needed and not installed.
  """
  try:
    if not path.is_file():  # a pipe would be waited for
      raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    with path.open('rb') as file:
      head = file.read(16)
  except OSError as e:
    raise UserError(f'{path}: {e.strerror}') from e
  # A zip file, and what PyTorch wrote before 1.6: a pickle of protocol 2.
  if head.startswith((b'PK\x03\x04', b'\x80\x02')):
    return _open_pytorch(path, is_zip=head.startswith(b'PK'))
  if head[8:9] == b'{':
    return _open_safetensors(path)
  what = 'is empty' if not head else 'is neither a PyTorch nor a safetensors file'
  raise UserError(f'{path} {what}')


def _open_safetensors(path):
  try:
    file = safetensors.safe_open(path, framework='numpy')
    # {name: the name in the file}
    names = _without_prefixes({name: name for name in file.keys()})
    shapes = {name: tuple(file.get_slice(names[name]).get_shape()) for name in names}
  except (OSError, safetensors.SafetensorError) as e:
    raise UserError(f'{path} is damaged or truncated: {e}') from e

  def read(name):
    try:
      tensor = file.get_tensor(names[name])
    except (AttributeError, TypeError, safetensors.SafetensorError) as e:  # NumPy has no such dtype
      dtype = file.get_slice(names[name]).get_dtype()
      raise UserError(f'{path}: {name} has the dtype {dtype}, which cannot be read') from e
    return _numbers(path, name, tensor)

  return TensorFile(path, shapes, read)


def _open_pytorch(path, is_zip):
  torch = import_torch(f'to read {path}')
  if is_zip:
    _check_zip(path)
  try:
    content = torch.load(path, map_location='cpu', weights_only=True, mmap=is_zip)
  except Exception as e:  # whatever the damage leads to
    wanted = re.search(r'GLOBAL ([\w.]+)', str(e))
    if wanted:
      raise UserError(
        f'{path} is refused: it wants to run {wanted[1]} when it is read. Of PyTorch files only '
        'tensors in plain containers are read; load it in its own code, where that is trusted, '
        'and save model.state_dict()'
      ) from e
    raise UserError(f'{path} is damaged or truncated ({type(e).__name__})') from e

  state, note = _state_dict(path, content, torch.Tensor)
  state = _without_prefixes(state)
  # A tensor may claim any shape over a small storage, by strides of zero.
  if sum(t.numel() * t.element_size() for t in state.values()) > path.stat().st_size:
    raise UserError(f'{path} is refused: its tensors claim to be larger than the file')

  def read(name):
    tensor = state[name].detach()
    if tensor.layout != torch.strided or tensor.is_quantized:
      raise UserError(f'{path}: {name} is a sparse or quantized tensor')
    return _numbers(path, name, (tensor.float() if tensor.is_floating_point() else tensor).numpy())

  return TensorFile(path, {name: tuple(t.shape) for name, t in state.items()}, read, note)


def _check_zip(path):
  """Checks that a zip file does not unpack to more than itself; PyTorch does not compress."""
  try:
    with zipfile.ZipFile(path) as file:
      entries = file.infolist()
  except (OSError, zipfile.BadZipFile) as e:
    raise UserError(f'{path} is damaged or truncated ({e})') from e
  size = path.stat().st_size
  if any(e.compress_type != zipfile.ZIP_STORED for e in entries):
    raise UserError(f'{path} is refused: it is a compressed zip file, which PyTorch never writes')
  if sum(e.file_size for e in entries) > size:
    raise UserError(f'{path} is refused: its parts claim to be larger than the file')


def _state_dict(path, content, kind):
  """Returns {name: tensor} of a state dict, or of where a checkpoint has one, and a note."""

  def is_state(value):
    return (
      isinstance(value, Mapping)
      and bool(value)
      and all(isinstance(k, str) and isinstance(v, kind) for k, v in value.items())
    )

  if is_state(content):
    return dict(content), ''
  inside = content if isinstance(content, Mapping) else {}
  raw = next((dict(inside[key]) for key in _STATE_KEYS if is_state(inside.get(key))), {})
  for key in _AVERAGE_KEYS:
    if is_state(inside.get(key)):
      averages = dict(inside[key])
      averages.pop('n_averaged', None)  # which PyTorch's AveragedModel counts
      if not raw or _without_prefixes(averages).keys() == _without_prefixes(raw).keys():
        return averages, f'its averages, {key!r}, are taken'
  if raw:
    return raw, ''
  if not isinstance(content, Mapping):
    why = f'it holds a {type(content).__name__}'
  elif not content:
    why = 'it is empty'
  else:
    keys = (*_STATE_KEYS, *_AVERAGE_KEYS)
    inner = next((inside[key] for key in keys if isinstance(inside.get(key), Mapping)), content)
    wrong = [str(k) for k, v in inner.items() if not (isinstance(k, str) and isinstance(v, kind))]
    why = f'its entries {", ".join(wrong[:5])} are none'
  raise UserError(f'{path} is no state dict, whose entries are tensors: {why}')


def _without_prefixes(state):
  """Returns the state dict without what wrappers have put in front of every name."""
  for prefix in _PREFIXES:
    if state and all(name.startswith(prefix) for name in state):
      return _without_prefixes({name.removeprefix(prefix): t for name, t in state.items()})
  return state


def _numbers(path, name, array):
  """Returns the array, checked to be of numbers."""
  if array.dtype.kind in 'fiu' or array.dtype.name == 'bfloat16':
    return array
  raise UserError(f'{path}: {name} has the dtype {array.dtype}; numbers are needed')


def import_torch(purpose: str) -> Any:
  """Imports PyTorch, which nothing else here needs; its absence is an error that says for what."""
  try:
    import torch
  except ImportError as e:
    raise UserError(f'{purpose}, PyTorch is needed: pip install torch') from e
  return torch


def write_safetensors(
  path: pathlib.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
  """Writes tensors, which are made contiguous."""
  tensors = {name: np.asarray(array, order='C') for name, array in tensors.items()}
  try:
    safetensors.numpy.save_file(tensors, path, dict(metadata))
  except safetensors.SafetensorError as e:
    raise OSError(str(e)) from e
  # safetensors makes it the writer's alone; as readable as its folder is what was meant.
  path.chmod(path.parent.stat().st_mode & 0o666)


def write_pytorch(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes a state dict, as torch.save does."""
  torch = import_torch(f'to write {path}')
  state = {n: torch.from_numpy(np.array(a, order='C')) for n, a in tensors.items()}
  try:
    torch.save(state, path)
  except RuntimeError as e:  # such as a full disk
    raise OSError(str(e).partition('\n')[0]) from e


def write_json(path: pathlib.Path, value: Any) -> None:
  path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')


def read_json(path: pathlib.Path) -> dict:
  """Returns the object that a JSON file holds.

  Raises:
    UserError: there is no such file, or it holds something else.
  """
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except OSError as e:
    raise UserError(f'{path}: {e.strerror}') from e
  except (ValueError, RecursionError) as e:
    raise UserError(f'{path} is not JSON: {e}') from e
  if not isinstance(value, dict):
    raise UserError(f'{path} holds no JSON object')
  return value
