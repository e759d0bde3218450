"""load, load_pretrained, save_pretrained: weights in and out of what holds them."""

import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvt_flax import CvT, create_model, load_pretrained, load_weights, save_pretrained
from cvt_flax.errors import UserError
from cvt_flax.models.options import resolve
from cvt_flax.weights import description, files, pretrained, saving
from cvt_flax.weights.description import Description
from cvt_flax.weights.layouts import HUGGING_FACE, OFFICIAL, VIT_PYTORCH
from cvt_flax.weights.preprocessing import Preprocessing, official
from tests.models.torch_weights import assert_close, drawn_variables, quick_jit
from tests.weights.models import (
  GELU_MODEL,
  MODELS,
  OFFICIAL_MODEL,
  SMALL,
  assert_same_bytes,
  state_dict,
)

NAMES = ('ant', 'bee', 'cat', 'dog', 'eel')
STEPS = Preprocessing(32, 1.0, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


@pytest.fixture(scope='module')
def variables():
  return drawn_variables(OFFICIAL_MODEL)


@pytest.fixture
def folder(tmp_path, variables):
  """A folder of ours."""
  save_pretrained(tmp_path / 'ours', OFFICIAL_MODEL, variables, NAMES, STEPS)
  return tmp_path / 'ours'


@pytest.fixture
def huggingface(tmp_path):
  """A folder of Hugging Face, as transformers writes it: without our key."""
  weights = pretrained.Weights(
    Description(GELU_MODEL, NAMES, official(224)), drawn_variables(GELU_MODEL), 'flax', 'here'
  )
  saving.write(weights, tmp_path / 'hf', 'huggingface')
  change(tmp_path / 'hf' / 'config.json', activation=None)
  return tmp_path / 'hf'


def write_state(path, layout):
  """Writes a state dict as safetensors, for which PyTorch is not needed."""
  files.write_safetensors(path, state_dict(layout), {})
  return path


def change(path, **values):
  """Changes keys of a JSON file; None takes them away."""
  values = {k: v for k, v in (json.loads(path.read_text()) | values).items() if v is not None}
  path.write_text(json.dumps(values))


def test_our_folder_there_and_back(folder, variables):
  assert {p.name for p in folder.iterdir()} == {
    'model.safetensors',
    'config.json',
    'preprocessor_config.json',
  }
  weights = pretrained.load(folder)
  assert_same_bytes(weights.variables, variables)
  assert weights.description == Description(OFFICIAL_MODEL, NAMES, STEPS)
  assert (weights.kind, weights.notes) == ('flax', ())
  names = files.open_tensors(folder / 'model.safetensors').shapes
  assert 'params/stage2/blocks_2/attn/conv_proj_q/bn/scale' in names
  assert 'batch_stats/stage0/blocks_0/attn/conv_proj_v/bn/var' in names


def test_load_pretrained(folder, variables):
  model, found = load_pretrained(folder)
  assert model == OFFICIAL_MODEL
  assert all(isinstance(x, jax.Array) and x.dtype == jnp.float32 for x in jax.tree.leaves(found))
  assert_same_bytes(found, variables)


@pytest.mark.parametrize('layout', [OFFICIAL, VIT_PYTORCH], ids=lambda layout: layout.name)
def test_files_of_pytorch(layout, tmp_path):
  path = write_state(tmp_path / 'CvT-13-384x384-IN-1k.safetensors', layout)
  weights = pretrained.load(path)
  assert resolve(weights.model) == resolve(MODELS[layout])
  assert_same_bytes(weights.variables, drawn_variables(MODELS[layout]))
  assert weights.kind == layout.name
  assert weights.description.preprocessing == Preprocessing(384, 0.0)
  assert weights.description.class_names == ()  # five: not ImageNet's
  (note,) = weights.notes
  assert note.startswith('no model of these sizes is known: heads of 64 channels, and keys')
  assert pretrained.load(path, model=weights.model).notes == ()


def test_a_thousand_classes_are_imagenets(tmp_path):
  model = CvT(**SMALL | dict(num_classes=1000))
  state = OFFICIAL.pack(model, drawn_variables(model))
  files.write_safetensors(tmp_path / 'w', state, {})
  weights = pretrained.load(tmp_path / 'w')
  assert weights.description.class_names[:2] == (
    'tench, Tinca tinca',
    'goldfish, Carassius auratus',
  )
  assert weights.description.class_names[-1] == 'toilet tissue, toilet paper, bathroom tissue'
  assert weights.description.preprocessing == Preprocessing(224, 0.875)
  assert len(weights.notes) == 3  # its sizes, its names, its images
  with pytest.warns(UserWarning) as caught:
    load_pretrained(tmp_path / 'w')
  assert len(caught) == 3


def test_hugging_face_computes_gelu(huggingface):
  weights = pretrained.load(huggingface)
  assert weights.kind == 'huggingface'
  assert weights.model.activation == 'gelu'
  assert resolve(weights.model) == resolve(GELU_MODEL)
  assert weights.description.class_names == NAMES
  assert_same_bytes(weights.variables, drawn_variables(GELU_MODEL))
  (note,) = weights.notes
  assert 'quick_gelu' in note


def test_activation_overrides(huggingface, folder):
  weights = pretrained.load(huggingface, activation='quick_gelu')
  assert (weights.model.activation, weights.notes) == ('quick_gelu', ())
  assert pretrained.load(folder, activation='gelu').model.activation == 'gelu'
  with pytest.raises(UserError, match="activation='relu'.*quick_gelu"):
    pretrained.load(folder, activation='relu')


def test_our_key_for_the_activation(huggingface):
  change(huggingface / 'config.json', activation='quick_gelu')
  weights = pretrained.load(huggingface)
  assert (weights.model.activation, weights.notes) == ('quick_gelu', ())


@pytest.mark.parametrize('name', ['model.safetensors', 'config.json', ''])
def test_a_file_in_a_folder_of_hugging_face(name, huggingface):
  if name == 'config.json':
    with pytest.raises(UserError, match=r'config\.json is neither'):
      pretrained.load(huggingface / name)
  else:
    assert pretrained.load(huggingface / name).kind == 'huggingface'


def test_pytorch_model_bin(huggingface, peer):
  peer('torch')
  (huggingface / 'model.safetensors').unlink()
  files.write_pytorch(huggingface / 'pytorch_model.bin', state_dict(HUGGING_FACE))
  assert_same_bytes(pretrained.load(huggingface).variables, drawn_variables(GELU_MODEL))


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'best.safetensors'])
def test_the_file_that_is_named_is_the_one_that_is_read(name, huggingface, peer):
  state = state_dict(HUGGING_FACE)
  state['classifier.bias'] = state['classifier.bias'] + 1
  if name.endswith('.bin'):
    peer('torch')
    files.write_pytorch(huggingface / name, state)
  else:
    files.write_safetensors(huggingface / name, state, {})
  bias = pretrained.load(huggingface).variables['params']['head']['bias']
  weights = pretrained.load(huggingface / name)
  np.testing.assert_array_equal(weights.variables['params']['head']['bias'], bias + 1)
  assert weights.description.class_names == NAMES


def test_a_name_leaves_weights_their_activation(tmp_path):
  model = create_model('cvt-nano', 5, activation='gelu')
  save_pretrained(tmp_path / 'w', model, drawn_variables(model))
  assert pretrained.load(tmp_path / 'w', 'cvt-nano').model == model
  assert pretrained.load(tmp_path / 'w', 'cvt-nano', 'quick_gelu').model.activation == 'quick_gelu'


def test_names_of_transformers_own_making_are_none(huggingface):
  labels = {str(i): f'LABEL_{i}' for i in range(5)}
  change(huggingface / 'config.json', id2label=labels)
  assert pretrained.load(huggingface).description.class_names == ()


def test_the_model_may_be_given(tmp_path):
  # Kernels whose strides are not known.
  model = CvT(**SMALL | dict(patch_sizes=(3, 3, 3), patch_paddings=(1, 1, 1)))
  files.write_safetensors(tmp_path / 'w', OFFICIAL.pack(model, drawn_variables(model)), {})
  with pytest.raises(UserError, match='strides'):
    pretrained.load(tmp_path / 'w')
  assert pretrained.load(tmp_path / 'w', model).model == model
  with pytest.raises(UserError, match='does not fit'):
    pretrained.load(tmp_path / 'w', 'cvt-nano')
  with pytest.raises(UserError, match="'cvt-nan'.*did you mean 'cvt-nano'"):
    pretrained.load(tmp_path / 'w', 'cvt-nan')


def test_progress(folder, variables):
  calls = []
  pretrained.load(folder, progress=lambda *call: calls.append(call))
  total = sum(x.size for x in jax.tree.leaves(variables))
  assert calls[-1] == (total, total)
  assert calls == sorted(calls) and len(calls) == len(jax.tree.leaves(variables))


def test_it_computes_what_was_saved(folder, variables):
  images = np.random.default_rng(0).normal(size=(2, 48, 40, 3)).astype(np.float32)
  model, found = load_pretrained(folder)
  expected = quick_jit(OFFICIAL_MODEL.apply)(variables, images)
  assert_close(quick_jit(model.apply)(found, images), expected, 0)


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (lambda f: (f / 'model.safetensors').unlink(), r'model\.safetensors is missing'),
    (lambda f: (f / 'config.json').unlink(), r'holds model.safetensors.*config\.json.*is needed'),
    (lambda f: (f / 'config.json').write_text('{'), r'config\.json is not JSON'),
    (lambda f: change(f / 'config.json', architecture=None), r'the attributes of CvT are needed'),
    (lambda f: change(f / 'config.json', id2label={'0': 'a'}), '1 class names.*5 classes'),
    (lambda f: change(f / 'config.json', id2label={'1': 'a'}), 'numbers from 0 to 0'),
    (lambda f: change(f / 'config.json', id2label=['a']), 'id2label'),
    (lambda f: change(f / 'config.json', library_name='x'), "model_type=None: only 'cvt'"),
    (
      lambda f: change(f / 'config.json', id2label={str(i): '\ud800' for i in range(5)}),
      'printable',
    ),
    (
      lambda f: change(f / 'config.json', id2label={str(i): 'a\x1b' for i in range(5)}),
      'printable',
    ),
    (lambda f: change(f / 'preprocessor_config.json', size='big'), "size='big'"),
    (lambda f: change(f / 'preprocessor_config.json', size=0), 'image_size=0'),
    (lambda f: change(f / 'preprocessor_config.json', size={'height': 9, 'width': 9}), 'size='),
    (lambda f: change(f / 'preprocessor_config.json', size={'shortest_edge': [9]}), 'size='),
    (lambda f: change(f / 'preprocessor_config.json', squash='no'), 'squash is true or false'),
    (lambda f: change(f / 'preprocessor_config.json', rescale_factor=1 / 127.5), 'rescale_factor'),
    (lambda f: change(f / 'preprocessor_config.json', image_mean=[float('nan')] * 3), 'mean='),
    (lambda f: change(f / 'preprocessor_config.json', image_mean=0.5), 'image_mean and image_std'),
    (
      lambda f: change(f / 'preprocessor_config.json', image_processor_type='ViTImageProcessor'),
      "image_processor_type='ViTImageProcessor'",
    ),
    (lambda f: (f / 'checkpoints').mkdir(), r'a run folder without model\.json'),
    (lambda f: change(f / 'preprocessor_config.json', crop_pct=0), 'crop_pct'),
    (lambda f: change(f / 'preprocessor_config.json', image_std=[1, 1]), 'three numbers'),
    (lambda f: change(f / 'preprocessor_config.json', resample=2), 'resample=2'),
    (lambda f: change(f / 'preprocessor_config.json', do_normalize=False), 'do_normalize=False'),
  ],
)
def test_damaged_folders(damage, message, folder):
  damage(folder)
  with pytest.raises(UserError, match=message):
    pretrained.load(folder)


def test_a_config_of_another_model(folder):
  config = json.loads((folder / 'config.json').read_text())
  config['architecture']['depths'] = [1, 2, 90_000]
  (folder / 'config.json').write_text(json.dumps(config))
  with pytest.raises(UserError, match='90003 blocks, and there are 203 tensors'):
    pretrained.load(folder)


def test_no_preprocessor_config(folder):
  (folder / 'preprocessor_config.json').unlink()
  weights = pretrained.load(folder)
  assert weights.description.preprocessing == Preprocessing()
  assert 'no preprocessor_config.json' in weights.notes[0]


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      {'head.bias': None, 'head.bais': np.zeros(5)},
      r'missing: head\.bias.*does not have: head\.bais',
    ),
    ({'head.bias': np.zeros(6)}, r'head\.bias \[6\] instead of \[5\]'),
    ({'norm.weight': None}, r'missing: norm\.weight'),
  ],
)
def test_state_dicts_that_do_not_fit(change, message, tmp_path):
  state = {k: v for k, v in (state_dict(OFFICIAL) | change).items() if v is not None}
  files.write_safetensors(tmp_path / 'w', state, {})
  with pytest.raises(UserError, match=message):
    pretrained.load(tmp_path / 'w')


@pytest.mark.parametrize(
  ('dtype', 'value', 'message'),
  [
    ('int8', 1, r'head\.bias is of int8, and no parameter is an integer'),
    ('float32', np.nan, r'not finite: params/head/bias$'),
    ('float64', 1e300, r'not finite: params/head/bias$'),
  ],
)
@pytest.mark.filterwarnings('ignore:overflow')
def test_values_that_are_no_weights(dtype, value, message, tmp_path):
  state = state_dict(OFFICIAL) | {'head.bias': np.full(5, value, dtype)}
  files.write_safetensors(tmp_path / 'w', state, {})
  with pytest.raises(UserError, match=message):
    pretrained.load(tmp_path / 'w')


def test_weights_in_several_files_are_not_read(huggingface):
  (huggingface / 'model.safetensors').rename(huggingface / 'model.safetensors.index.json')
  with pytest.raises(UserError, match='is missing, and weights in several files are not read'):
    pretrained.load(huggingface)


def test_hugging_face_without_a_classifier(huggingface):
  state = {n: x for n, x in state_dict(HUGGING_FACE).items() if not n.startswith('classifier')}
  files.write_safetensors(huggingface / 'model.safetensors', state, {})
  with pytest.raises(UserError, match='no classifier: only CvtForImageClassification'):
    pretrained.load(huggingface)


def test_a_model_that_is_given_keeps_its_activation(huggingface):
  weights = pretrained.load(huggingface, OFFICIAL_MODEL)
  assert (weights.model, weights.notes) == (OFFICIAL_MODEL, ())


def test_hugging_face_without_its_config(tmp_path):
  path = write_state(tmp_path / 'w.safetensors', HUGGING_FACE)
  with pytest.raises(UserError, match=r'of Hugging Face, and config\.json has to stand beside it'):
    pretrained.load(path)


def test_nothing_there(tmp_path):
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UserError, match=r'holds nothing: config\.json with'):
    pretrained.load(tmp_path / 'empty')
  with pytest.raises(UserError, match="no such file or folder, did you mean '.*/empty'. hf:NAME"):
    pretrained.load(tmp_path / 'empti')


def test_what_is_no_place_of_weights(folder):
  with pytest.raises(UserError, match='the weights are a tuple: a path, a name, or what'):
    pretrained.load(load_pretrained(folder))


def test_all_that_is_known_goes_along(folder, tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  weights = load_weights(folder)
  known = weights.description
  save_pretrained('~/again', known.model, weights.variables, known.class_names, known.preprocessing)
  assert load_weights(tmp_path / 'again').description == known


def test_numbers_of_numpy_are_kept(tmp_path):
  model = CvT(**SMALL | dict(num_classes=np.int64(5), mlp_ratios=tuple(np.float32([1, 1.5, 1]))))
  save_pretrained(tmp_path / 'w', model, drawn_variables(OFFICIAL_MODEL))
  assert load_weights(tmp_path / 'w').model == OFFICIAL_MODEL


@pytest.mark.parametrize('name', ['\u0645\u06cc\u200c\u062e\u0648', 'a\xa0b', '\u72ac\u3000\u732b'])
def test_names_of_all_languages_are_printable(name):
  assert Description(OFFICIAL_MODEL, (name,) * 5, STEPS).class_names[0] == name


@pytest.mark.parametrize('name', ['a\nb', 'a\u2028', '\u202egnp.x', '\udcff', '\x7f'])
def test_names_that_break_a_line_are_refused(name):
  with pytest.raises(UserError, match='printable text is needed'):
    Description(OFFICIAL_MODEL, (name,) * 5, STEPS)


def test_a_folder_is_not_written_over(folder, variables):
  with pytest.raises(UserError, match='exists'):
    save_pretrained(folder, OFFICIAL_MODEL, variables)


def test_variables_of_another_model_are_not_saved(tmp_path, variables):
  with pytest.raises(
    UserError, match='the tree of variables does not fit the model; tensors 2 of another shape'
  ):
    save_pretrained(tmp_path / 'w', CvT(**SMALL | dict(num_classes=6)), variables)
  with pytest.raises(UserError, match='class name 1: printable text'):
    save_pretrained(tmp_path / 'w', OFFICIAL_MODEL, variables, (1, 2, 3, 4, 5))
  with pytest.raises(UserError, match='2 class names do not fit the 5 classes'):
    save_pretrained(tmp_path / 'w', OFFICIAL_MODEL, variables, ('a', 'b'))
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(('size', 'crop'), [(384, 0.875), (224, 0.0)])
def test_preprocessing_that_transformers_does_not_have(size, crop, tmp_path):
  known = Description(GELU_MODEL, (), Preprocessing(size, crop))
  weights = pretrained.Weights(known, drawn_variables(GELU_MODEL), 'flax', 'here')
  with pytest.raises(UserError, match=f'images of {size} pixels'):
    saving.write(weights, tmp_path / 'w', 'huggingface')


@pytest.mark.parametrize('size', [{'shortest_edge': 96}, 96])
def test_sizes_of_old_and_new_image_processors(size, huggingface):
  change(huggingface / 'preprocessor_config.json', size=size, squash=None)
  assert pretrained.load(huggingface).description.preprocessing == Preprocessing(96, 0.875)
  config = json.loads((huggingface / 'preprocessor_config.json').read_text()) | {'crop_pct': None}
  (huggingface / 'preprocessor_config.json').write_text(json.dumps(config))
  assert pretrained.load(huggingface).description.preprocessing == Preprocessing(96, 0.875)
  change(huggingface / 'preprocessor_config.json', size={'shortest_edge': 384})
  assert pretrained.load(huggingface).description.preprocessing == Preprocessing(384, 0.0)


class Hub(types.ModuleType):
  """Stands in for huggingface_hub: a folder in place of the network."""

  class errors:  # noqa: N801
    class HfHubHTTPError(OSError): ...

    class HFValidationError(ValueError): ...

    class EntryNotFoundError(HfHubHTTPError): ...

    class LocalEntryNotFoundError(EntryNotFoundError): ...

    class RepositoryNotFoundError(HfHubHTTPError): ...

  def __init__(self, folder):
    super().__init__('huggingface_hub')
    self.folder, self.fetched, self.out_of_reach = folder, [], ''
    self.known_to_lack, self.broken = (), None
    self._CACHED_NO_EXIST = object()

  def try_to_load_from_cache(self, name, file, revision):
    return self._CACHED_NO_EXIST if file in self.known_to_lack else None

  def hf_hub_download(self, name, file, revision):
    self.revision = revision
    if self.broken:
      raise self.broken
    if name != 'someone/cvt':
      raise self.errors.RepositoryNotFoundError(f'404: no {name}')
    if file == self.out_of_reach:
      raise self.errors.LocalEntryNotFoundError('not in the cache, and there is no network')
    if not (self.folder / file).is_file():
      raise self.errors.EntryNotFoundError(f'404: no {file}')
    self.fetched.append(file)
    return str(self.folder / file)


@pytest.fixture
def hub(huggingface, monkeypatch):
  hub = Hub(huggingface)
  monkeypatch.setitem(sys.modules, 'huggingface_hub', hub)
  return hub


def test_from_the_hub(hub):
  assert pretrained.load('hf:someone/cvt').kind == 'huggingface'
  assert hub.fetched == ['config.json', 'preprocessor_config.json', 'model.safetensors']
  assert hub.revision is None
  pretrained.load('hf:someone/cvt@1234abc')
  assert hub.revision == '1234abc'


def test_from_the_hub_without_safetensors(hub, peer):
  peer('torch')
  (hub.folder / 'model.safetensors').unlink()
  files.write_pytorch(hub.folder / 'pytorch_model.bin', state_dict(HUGGING_FACE))
  pretrained.load('hf:someone/cvt')
  assert hub.fetched[-1] == 'pytorch_model.bin'


def test_not_on_the_hub(hub):
  with pytest.raises(UserError, match='^hf:someone/else: 404: no someone/else'):
    pretrained.load('hf:someone/else')


@pytest.mark.parametrize('file', ['config.json', 'preprocessor_config.json', 'model.safetensors'])
def test_a_file_out_of_reach_is_not_taken_for_one_that_is_not_there(file, hub):
  hub.out_of_reach = file
  with pytest.raises(UserError, match='^hf:someone/cvt: not in the cache'):
    pretrained.load('hf:someone/cvt')


def test_the_cache_knows_what_is_not_there(hub):
  hub.out_of_reach = 'preprocessor_config.json'
  hub.known_to_lack = (hub.out_of_reach,)
  assert pretrained.load('hf:someone/cvt').kind == 'huggingface'
  hub.out_of_reach = 'config.json'
  hub.known_to_lack = (hub.out_of_reach,)
  with pytest.raises(UserError, match='^hf:someone/cvt: not in the cache'):
    pretrained.load('hf:someone/cvt')


def test_a_connection_that_breaks(hub):
  hub.broken = RuntimeError('the read\ntimed out')  # a class of its HTTP client's, no OSError
  with pytest.raises(UserError, match='^hf:someone/cvt: the read timed out$'):
    pretrained.load('hf:someone/cvt')


def test_without_huggingface_hub(monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(UserError, match='pip install huggingface_hub'):
    pretrained.load('hf:someone/cvt')


def test_imagenet_classes():
  classes = description.imagenet_classes()
  assert len(classes) == 1000 and list(classes) == sorted(classes)
  assert classes['n02123045'] == 'tabby, tabby cat'
  assert list(classes).index('n02123045') == 281


def test_same_classes():
  synsets, names = zip(*description.imagenet_classes().items(), strict=True)
  assert description.same_classes(synsets, names)
  assert description.same_classes((), NAMES) and description.same_classes(NAMES, NAMES)
  assert not description.same_classes(NAMES, NAMES[::-1])
  assert not description.same_classes(synsets[::-1], names)
