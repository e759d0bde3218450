"""Files of tensors: what is read, what is refused, what is left behind."""

import os
import pathlib
import stat
import sys
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from cvt_flax.errors import UserError
from cvt_flax.weights import files

TENSORS = {
  'a.weight': np.arange(6, dtype=np.float32).reshape(2, 3),
  'b.num_batches_tracked': np.zeros((), np.int64),
}


class RunsCode:
  """What a pickle bomb is: unpickling it calls a function."""

  def __reduce__(self):
    return (os.mkdir, ('exploded',))


@pytest.fixture
def torch(peer):
  return peer('torch')


@pytest.fixture
def save(torch, tmp_path):
  """Saves with torch.save, and returns the path."""

  def save(value, **kwargs):
    torch.save(value, tmp_path / 'w.pth', **kwargs)
    return tmp_path / 'w.pth'

  return save


@pytest.fixture
def state(torch):
  return {name: torch.from_numpy(np.array(x)) for name, x in TENSORS.items()}


def assert_holds_tensors(file):
  assert dict(file.shapes) == {name: x.shape for name, x in TENSORS.items()}
  for name, expected in TENSORS.items():
    found = file.read(name)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_safetensors_there_and_back(tmp_path):
  files.write_safetensors(tmp_path / 'w.safetensors', TENSORS, {'format': 'pt'})
  file = files.open_tensors(tmp_path / 'w.safetensors')
  assert_holds_tensors(file)
  assert file.parameters == 7


def test_safetensors_may_be_read_by_whom_the_folder_may_be(tmp_path):
  tmp_path.chmod(0o750)
  files.write_safetensors(tmp_path / 'w.safetensors', TENSORS, {})
  assert stat.S_IMODE((tmp_path / 'w.safetensors').stat().st_mode) == 0o640


def test_transposed_tensors_are_written_as_they_are(tmp_path):
  files.write_safetensors(tmp_path / 'w', {'t': TENSORS['a.weight'].T}, {})
  np.testing.assert_array_equal(
    files.open_tensors(tmp_path / 'w').read('t'), [[0, 3], [1, 4], [2, 5]]
  )


def test_pytorch_there_and_back(torch, tmp_path):
  files.write_pytorch(tmp_path / 'w.pth', TENSORS)
  assert_holds_tensors(files.open_tensors(tmp_path / 'w.pth'))
  assert torch.load(tmp_path / 'w.pth', weights_only=True)['a.weight'].dtype == torch.float32


def test_what_a_file_is_shows_by_its_content(save, state, tmp_path):
  save(state).rename(tmp_path / 'w.ckpt')
  assert_holds_tensors(files.open_tensors(tmp_path / 'w.ckpt'))


def test_files_from_before_zip(save, state):
  assert_holds_tensors(files.open_tensors(save(state, _use_new_zipfile_serialization=False)))


@pytest.mark.parametrize('key', ['state_dict', 'model', 'model_state_dict'])
def test_checkpoints(key, save, state):
  others = {'epoch': 3, 'perf': 0.5, 'optimizer': {'state': {}, 'param_groups': []}}
  assert_holds_tensors(files.open_tensors(save(others | {key: state})))


def test_the_authors_checkpoint_has_a_model_name(save, state):
  """Their checkpoint.pth: 'model' is a string there."""
  assert_holds_tensors(files.open_tensors(save({'model': 'cls_cvt', 'state_dict': state})))


@pytest.mark.parametrize(
  'prefix', ['module.', '_orig_mod.', 'model.', 'module._orig_mod.', '_orig_mod.module.']
)
def test_prefixes_of_wrappers(prefix, save, state):
  wrapped = {prefix + name: tensor for name, tensor in state.items()}
  assert_holds_tensors(files.open_tensors(save(wrapped)))


@pytest.mark.parametrize('prefix', ['module.', 'model.', 'module._orig_mod.'])
def test_prefixes_in_safetensors(prefix, tmp_path):
  wrapped = {prefix + name: tensor for name, tensor in TENSORS.items()}
  files.write_safetensors(tmp_path / 'w.safetensors', wrapped, {})
  assert_holds_tensors(files.open_tensors(tmp_path / 'w.safetensors'))


@pytest.mark.parametrize('key', ['state_dict_ema', 'model_ema', 'ema'])
def test_averages_are_taken_and_told(key, save, state, torch):
  raw = {name: 0 * tensor for name, tensor in state.items()}
  for others in ({'state_dict': raw, 'model': 'cvt'}, {}):
    averaged = {f'module.{name}': tensor for name, tensor in state.items()}
    for averages in (state, averaged | {'n_averaged': torch.tensor(3)}):
      file = files.open_tensors(save(others | {key: averages}))
      assert_holds_tensors(file)
      assert file.note == f'its averages, {key!r}, are taken'


def test_averages_of_other_tensors_are_left(save, state):
  file = files.open_tensors(save({'model_ema': {'step': state['a.weight']}, 'model': state}))
  assert_holds_tensors(file)
  assert not file.note


def test_a_prefix_of_some_is_part_of_their_names(save, state):
  state['module.c'] = state['a.weight']
  assert set(files.open_tensors(save(state)).shapes) == {*TENSORS, 'module.c'}


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float64'])
def test_other_floats_of_pytorch(dtype, torch, save):
  path = save({'x': torch.tensor([0.5, -2.0], dtype=getattr(torch, dtype))})
  found = files.open_tensors(path).read('x')
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found, [0.5, -2])


def test_bfloat16_of_safetensors(tmp_path):
  import ml_dtypes

  safetensors.numpy.save_file({'x': np.array([0.5, -2], ml_dtypes.bfloat16)}, tmp_path / 'w')
  found = files.open_tensors(tmp_path / 'w').read('x')
  np.testing.assert_array_equal(found.astype(np.float32), [0.5, -2])


def test_booleans_are_refused(tmp_path):
  safetensors.numpy.save_file({'x': np.array([True])}, tmp_path / 'w')
  with pytest.raises(UserError, match='x has the dtype bool'):
    files.open_tensors(tmp_path / 'w').read('x')


def test_sparse_tensors_are_refused(torch, save):
  file = files.open_tensors(save({'x': torch.eye(3).to_sparse()}))
  with pytest.raises(UserError, match='x is a sparse'):
    file.read('x')


@pytest.mark.parametrize('zipped', [True, False])
def test_a_pickle_bomb_is_refused(zipped, save, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  path = save({'a': RunsCode()}, _use_new_zipfile_serialization=zipped)
  with pytest.raises(UserError, match=r'w\.pth is refused: it wants to run posix\.mkdir'):
    files.open_tensors(path)
  assert not pathlib.Path('exploded').exists()


def test_a_tensor_larger_than_its_file_is_refused(torch, save):
  path = save({'x': torch.zeros(1).expand(10**12)})
  with pytest.raises(UserError, match='claim to be larger than the file'):
    files.open_tensors(path)


def test_a_compressed_zip_is_refused(save, state, tmp_path):
  path = save(state)
  with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / 'z.pth', 'w') as new:
    for name in old.namelist():
      new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED)
  with pytest.raises(UserError, match='compressed'):
    files.open_tensors(tmp_path / 'z.pth')


@pytest.mark.parametrize('share', [0.3, 0.9, 0.99])
@pytest.mark.parametrize('kind', ['safetensors', 'zip', 'old'])
def test_truncated_files(kind, share, tmp_path, request):
  path = tmp_path / 'w'
  if kind == 'safetensors':
    files.write_safetensors(path, TENSORS, {})
  else:
    save, state = request.getfixturevalue('save'), request.getfixturevalue('state')
    path = save(state, _use_new_zipfile_serialization=kind == 'zip')
  whole = path.read_bytes()
  path.write_bytes(whole[: int(len(whole) * share)])
  with pytest.raises(UserError, match=f'{path.name} is damaged or truncated'):
    files.open_tensors(path)


def test_a_header_that_claims_more_than_there_is(tmp_path):
  (tmp_path / 'w').write_bytes((2**60).to_bytes(8, 'little') + b'{"x": 1}')
  with pytest.raises(UserError, match='damaged or truncated'):
    files.open_tensors(tmp_path / 'w')


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'', 'is empty'),
    (b'these are no weights\n', 'is neither'),
    (b'\x89PNG\r\n\x1a\n', 'is neither'),
  ],
)
def test_other_files(content, message, tmp_path):
  (tmp_path / 'w.pth').write_bytes(content)
  with pytest.raises(UserError, match=rf'w\.pth {message}'):
    files.open_tensors(tmp_path / 'w.pth')


def test_a_zip_file_of_something_else(torch, tmp_path):
  with zipfile.ZipFile(tmp_path / 'w.pth', 'w') as file:
    file.writestr('readme.txt', 'hello')
  with pytest.raises(UserError, match='damaged or truncated'):
    files.open_tensors(tmp_path / 'w.pth')


@pytest.mark.parametrize(
  ('value', 'message'),
  [
    ([1, 2], 'it holds a list'),
    ({}, 'it is empty'),
    ({'epoch': 1, 'lr': 0.1}, 'its entries epoch, lr are none'),
    ({1: 2}, 'its entries 1 are none'),
    ({'state_dict': {'a': 1}}, 'its entries a are none'),
  ],
)
def test_no_state_dict(value, message, save):
  with pytest.raises(UserError, match=f'is no state dict.*{message}'):
    files.open_tensors(save(value))


def test_a_tensor_without_a_name(torch, save):
  with pytest.raises(UserError, match='its entries 1 are none'):
    files.open_tensors(save({1: torch.zeros(1)}))


def test_a_dtype_that_numpy_does_not_have(torch, tmp_path):
  import safetensors.torch

  safetensors.torch.save_file({'x': torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / 'w')
  with pytest.raises(UserError, match='x has the dtype F8_E4M3'):
    files.open_tensors(tmp_path / 'w').read('x')


def test_a_pipe_is_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / 'w')
  with pytest.raises(UserError, match='No such file'):
    files.open_tensors(tmp_path / 'w')


def test_missing_files(tmp_path):
  with pytest.raises(UserError, match='No such file'):
    files.open_tensors(tmp_path / 'w.pth')


def test_pytorch_is_named_where_it_is_needed_and_missing(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  (tmp_path / 'w.pth').write_bytes(b'PK\x03\x04' + bytes(100))
  with pytest.raises(UserError, match=r'to read .*w\.pth, PyTorch is needed: pip install torch'):
    files.open_tensors(tmp_path / 'w.pth')


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'{', 'is not JSON'),
    (b'\xff\xfe', 'is not JSON'),
    (b'[1]', 'no JSON object'),
    (None, 'No such'),
  ],
)
def test_json(content, message, tmp_path):
  if content is not None:
    (tmp_path / 'c.json').write_bytes(content)
  with pytest.raises(UserError, match=rf'c\.json.*{message}'):
    files.read_json(tmp_path / 'c.json')


def test_a_file_without_tensors(tmp_path):
  (tmp_path / 'w').write_bytes((2).to_bytes(8, 'little') + b'{}')
  assert files.open_tensors(tmp_path / 'w').shapes == {}
