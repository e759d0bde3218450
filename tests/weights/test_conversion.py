"""convert_weights and its command line: between layouts, against PyTorch, and what is refused."""

import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

from cvt_flax import CvT, command_line, convert, convert_weights, save_pretrained
from cvt_flax.data.images import prepare
from cvt_flax.errors import UserError
from cvt_flax.weights import files, parity, pretrained
from cvt_flax.weights.layouts import HUGGING_FACE, OFFICIAL, VIT_PYTORCH
from cvt_flax.weights.preprocessing import Preprocessing
from tests.models.torch_weights import assert_close, drawn_variables, quick_jit
from tests.weights.models import (
  MODELS,
  OFFICIAL_MODEL,
  PACKAGED,
  SMALL,
  assert_same_bytes,
  state_dict,
)

NAMES = ('ant', 'bee', 'cat', 'dog', 'eel')


@pytest.fixture
def ours(tmp_path):
  """Writes a folder of ours with the model of a layout, and returns its path."""

  def write(layout, image_size=64):
    model = MODELS[layout]
    steps = Preprocessing(image_size, 0.9, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    save_pretrained(tmp_path / 'ours', model, drawn_variables(model), NAMES, steps)
    return tmp_path / 'ours'

  return write


def test_hugging_face_there_and_back(ours, tmp_path):
  folder = ours(HUGGING_FACE)
  convert_weights(folder, tmp_path / 'hf', to='huggingface')
  report = convert_weights(tmp_path / 'hf', tmp_path / 'back')
  assert report == {
    'from': 'huggingface',
    'to': 'flax',
    'parameters': sum(
      np.prod(t.shape)
      for n, t in HUGGING_FACE.tensors(MODELS[HUGGING_FACE]).items()
      if t.leaves and 'running' not in n
    ),
    'num_classes': 5,
    'image_size': 64,
    'activation': 'gelu',
    'notes': [],
  }
  for name in ('model.safetensors', 'preprocessor_config.json'):
    assert (tmp_path / 'back' / name).read_bytes() == (folder / name).read_bytes()
  assert pretrained.load(tmp_path / 'back').description.class_names == NAMES


@pytest.mark.parametrize('layout', [OFFICIAL, VIT_PYTORCH], ids=lambda layout: layout.name)
def test_pth_there_and_back(layout, ours, tmp_path, peer):
  peer('torch')
  folder = ours(layout)
  report = convert_weights(folder, tmp_path / 'w.pth', to=layout.name)
  assert (report['from'], report['to']) == ('flax', layout.name)
  convert_weights(tmp_path / 'w.pth', tmp_path / 'back')
  back, whole = tmp_path / 'back', folder
  assert (back / 'model.safetensors').read_bytes() == (whole / 'model.safetensors').read_bytes()


def test_a_pth_is_official_by_default(ours, tmp_path, peer):
  torch = peer('torch')
  assert convert_weights(ours(OFFICIAL), tmp_path / 'w.pth')['to'] == 'official'
  written = torch.load(tmp_path / 'w.pth', weights_only=True)
  expected = state_dict(OFFICIAL)
  assert written.keys() == expected.keys()
  for name, tensor in written.items():
    np.testing.assert_array_equal(tensor.numpy(), expected[name])
    assert tensor.numpy().dtype == expected[name].dtype


def test_transformers_opens_the_export_and_computes_our_logits(ours, tmp_path, peer):
  torch, transformers = peer('torch'), peer('transformers')
  folder = ours(HUGGING_FACE)
  convert_weights(folder, tmp_path / 'hf', to='huggingface')
  module = transformers.CvtForImageClassification.from_pretrained(tmp_path / 'hf').eval()
  assert module.config.id2label == dict(enumerate(NAMES))
  assert module.config.label2id == {name: i for i, name in enumerate(NAMES)}
  images = parity.random_images((64, 50))
  with torch.no_grad():
    expected = module(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).logits.numpy()
  weights = pretrained.load(folder)
  assert_close(quick_jit(weights.model.apply)(weights.variables, images), expected)


@pytest.mark.parametrize('steps', [Preprocessing(56, 0.875), Preprocessing(384, 0.0)], ids=str)
def test_transformers_prepares_images_as_we_do(steps, tmp_path, peer):
  """Of a square picture: of others it rounds an odd margin of the crop down."""
  transformers = peer('transformers')
  model = MODELS[HUGGING_FACE]
  save_pretrained(tmp_path / 'ours', model, drawn_variables(model), (), steps)
  convert_weights(tmp_path / 'ours', tmp_path / 'hf', to='huggingface')
  path = pathlib.Path(sklearn.datasets.__file__).parent / 'images' / 'china.jpg'
  picture = Image.open(path).crop((0, 0, 400, 400))
  picture.save(tmp_path / 'square.png')
  processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / 'hf')
  theirs = processor(picture, return_tensors='np')['pixel_values'][0].transpose(1, 2, 0)
  pixels = prepare((tmp_path / 'square.png').read_bytes(), '', steps.image_size, steps.crop_ratio)
  np.testing.assert_allclose(theirs, (pixels / 255 - steps.mean) / steps.std, atol=1e-5)


@pytest.mark.parametrize('layout', PACKAGED, ids=lambda layout: layout.name)
def test_check_against_pytorch(layout, ours, tmp_path, peer):
  peer('torch')
  peer('vit_pytorch.cvt' if layout is VIT_PYTORCH else 'transformers')
  report = convert_weights(ours(layout), tmp_path / 'w', to=layout.name, check=True)
  assert report['logits'] <= 1e-5
  assert len(report['maps']) == 3 and max(report['maps']) <= 1e-5


def test_check_finds_a_difference(peer, monkeypatch):
  peer('torch')
  peer('transformers')
  model = MODELS[HUGGING_FACE]
  images = parity.random_images((64, 64))
  variables = drawn_variables(model)
  real = parity.torch_model

  def damaged(model, variables, layout):
    module = real(model, variables, layout)
    module.layernorm.bias.data += 0.01
    return module

  monkeypatch.setattr(parity, 'torch_model', damaged)
  found = parity.compare(model, variables, HUGGING_FACE, images)
  assert found.logits > 1e-4 and max(found.maps) <= 1e-5


def test_check_needs_a_side_of_pytorch(ours, tmp_path):
  with pytest.raises(UserError, match="neither 'flax' nor 'flax'"):
    convert_weights(ours(OFFICIAL), tmp_path / 'w', check=True)
  assert not (tmp_path / 'w').exists()


def test_quick_gelu_for_hugging_face_is_noted_with_what_it_changes(ours, tmp_path):
  folder = ours(OFFICIAL)
  (note,) = convert_weights(folder, tmp_path / 'hf', to='huggingface')['notes']
  weights = pretrained.load(folder)
  images = parity.random_images((64, 64), count=1)
  gelu = quick_jit(MODELS[HUGGING_FACE].apply)(weights.variables, images)
  own = quick_jit(weights.model.apply)(weights.variables, images)
  moved = np.abs(gelu - own).max() / np.abs(own).max()
  assert moved > 0.001
  assert f'differ by {moved:.1%} of the largest' in note
  # Our key keeps the model what it was.
  back = pretrained.load(tmp_path / 'hf')
  assert (back.model.activation, back.notes) == ('quick_gelu', ())
  assert_same_bytes(back.variables, weights.variables)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (dict(to='pytorch'), "to='pytorch': one of flax, official, .*compact-transformers is"),
    (dict(to='vit-pytorch'), "the layout 'vit-pytorch' cannot hold this model: .*shared_kv=False"),
    (dict(to='official', activation='gelu'), "activation='gelu'"),
  ],
)
def test_what_cannot_be_written(arguments, message, ours, tmp_path):
  folder = ours(OFFICIAL)
  with pytest.raises(UserError, match=message):
    convert_weights(folder, tmp_path / 'w', **arguments)
  assert [p.name for p in tmp_path.iterdir()] == ['ours']


def test_a_failure_leaves_nothing(ours, tmp_path, monkeypatch):
  folder = ours(HUGGING_FACE)

  def fails(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(files, 'write_json', fails)
  with pytest.raises(UserError, match='cannot be written: No space left'):
    convert_weights(folder, tmp_path / 'w', to='huggingface')
  assert [p.name for p in tmp_path.iterdir()] == ['ours']


@pytest.mark.parametrize('suffix', ['.pt', '.bin', '.safetensors'])
def test_suffixes_that_nothing_is_written_as(suffix, ours, tmp_path):
  with pytest.raises(UserError, match=rf'no layout is written as \{suffix}'):
    convert_weights(ours(OFFICIAL), tmp_path / f'w{suffix}')


def test_what_a_pth_does_not_say_is_noted(tmp_path, peer):
  peer('torch')
  model = OFFICIAL_MODEL.clone(kv_strides=(1, 1, 1), num_heads=(1, 1, 1))
  save_pretrained(tmp_path / 'w', model, drawn_variables(model), NAMES)
  first, second = convert_weights(tmp_path / 'w', tmp_path / 'w.PTH')['notes']
  assert 'num_heads [1, 1, 1]' in first and 'kv_stride [1, 1, 1]' in first
  assert 'patch' not in first
  assert second == 'class names and preprocessing have no place in a .pth file'


def test_a_pth_that_says_all_has_no_note(tmp_path, peer):
  peer('torch')
  save_pretrained(tmp_path / 'w', OFFICIAL_MODEL, drawn_variables(OFFICIAL_MODEL))
  assert convert_weights(tmp_path / 'w', tmp_path / 'w.pth')['notes'] == []


def test_pytorch_is_asked_for_before_anything_is_made(ours, tmp_path, monkeypatch):
  folder = ours(OFFICIAL)
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(UserError, match=r'to write .*new/w\.pth, PyTorch is needed'):
    convert_weights(folder, tmp_path / 'new' / 'w.pth')
  assert [p.name for p in tmp_path.iterdir()] == ['ours']


def run(*arguments, env):
  command = [sys.executable, '-m', 'cvt_flax.convert', *map(str, arguments)]
  return subprocess.run(command, env=env, capture_output=True, text=True)


def test_command_line(ours, tmp_path, clean_env):
  done = run(ours(HUGGING_FACE), tmp_path / 'hf', '--to=huggingface', env=clean_env)
  assert (done.returncode, done.stderr) == (0, '')
  first, last = done.stdout.splitlines()
  assert '(flax): ' in first and '5 classes, images of 64x64, gelu' in first
  assert last == f'{tmp_path / "hf"} (huggingface) written'


def bomb(path, torch):
  class RunsCode:
    def __reduce__(self):
      return (exec, ('raise SystemExit',))

  torch.save({'a': RunsCode()}, path / 'w.pth')


def truncated(path, torch):
  torch.save(
    {n: torch.from_numpy(np.array(x)) for n, x in state_dict(OFFICIAL).items()}, path / 'w'
  )
  (path / 'w.pth').write_bytes((path / 'w').read_bytes()[:-1000])


def renamed(path, torch):
  state = state_dict(OFFICIAL)
  state['stage1.blocks.0.attn.proj_Q.weight'] = state.pop('stage1.blocks.1.attn.proj_q.weight')
  files.write_pytorch(path / 'w.pth', state)


def misshapen(path, torch):
  files.write_pytorch(path / 'w.pth', state_dict(OFFICIAL) | {'norm.bias': np.zeros((2, 64), 'f')})


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (bomb, r'w\.pth is refused: it wants to run exec'),
    (truncated, r'w\.pth is damaged or truncated'),
    (renamed, r'1 missing: stage1\.blocks\.1\.attn\.proj_q\.weight; .*stage1\S+proj_Q\.weight'),
    (misshapen, r'norm\.bias \[2, 64\] instead of \[128\]'),
    (lambda path, _: (path / 'w.pth').write_text('weights'), r'is neither a PyTorch nor a safet'),
    (lambda path, _: (path / 'w.pth').mkdir(), r'w\.pth holds nothing: config\.json'),
  ],
)
def test_bad_sources_in_one_line(make, message, tmp_path, peer, monkeypatch, capsys):
  torch = peer('torch')
  make(tmp_path, torch)
  before = sorted(p.name for p in tmp_path.iterdir())
  monkeypatch.setattr(sys, 'argv', ['cvt_flax/convert.py', f'{tmp_path}/w.pth', f'{tmp_path}/out'])
  with pytest.raises(SystemExit) as end:
    command_line.run(convert.main)
  assert end.value.code == 2
  out, err = capsys.readouterr()
  assert out == '' and err.count('\n') == 1 and err.startswith('convert.py: ')
  assert re.search(message, err), err
  assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], 'the following arguments are required: SRC, DST; --help explains'),
    (['a', 'b', '--too=flax'], 'unrecognized arguments: --too=flax; --help explains'),
    (['a', 'b', '--ch'], 'unrecognized arguments: --ch; --help explains'),
    (['nowhere', 'b'], 'nowhere: there is no such file or folder'),
  ],
)
def test_bad_arguments_in_one_line(arguments, message, monkeypatch, capsys, tmp_path):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'argv', ['convert.py', *arguments])
  with pytest.raises(SystemExit) as end:
    command_line.run(convert.main)
  assert end.value.code == 2
  err = capsys.readouterr().err
  assert err.startswith(f'convert.py: {message}') and err.count('\n') == 1


def test_help_is_for_people(capsys):
  with pytest.raises(SystemExit) as end:
    convert.main(['--help'])
  assert end.value.code == 0
  out = capsys.readouterr().out
  assert 'CvT-13-224x224-IN-1k.pth' in out and '--check' in out
  assert max(map(len, out.splitlines())) <= 100


def test_big_files_show_progress(monkeypatch, capsys):
  monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
  convert._progress(10_000_000, 277_000_000)
  convert._progress(277_000_000, 277_000_000)
  err = capsys.readouterr().err
  assert err == '\r\x1b[Kread 10 of 277 M numbers\r\x1b[Kread 277 of 277 M numbers\n'


def test_an_odd_model_there_and_back(tmp_path):
  """One that no layout of PyTorch can hold is kept by ours."""
  model = CvT(
    **SMALL | dict(projection='avg', cls_token=(True, False, False), pool='mean', num_classes=0),
    final_norm=False,
    head_dim=16,
  )
  variables = drawn_variables(model)
  save_pretrained(tmp_path / 'w', model, variables)
  weights = pretrained.load(pathlib.Path(tmp_path / 'w'))
  assert weights.model == model
  assert_same_bytes(weights.variables, variables)
