"""Weights of compact vision transformers, against plain PyTorch with the same names."""

import numpy as np
import pytest

from cvt_flax import CompactViT, convert_weights, create_model, load_pretrained, save_pretrained
from cvt_flax.errors import UserError
from cvt_flax.models.compact import sine_embedding
from cvt_flax.weights import architecture, files, pretrained
from cvt_flax.weights.layouts import COMPACT_TRANSFORMERS, OFFICIAL, VIT_FROM_SCRATCH
from cvt_flax.weights.preprocessing import Preprocessing
from tests.models.torch_weights import assert_close, draw, drawn_variables, quick_jit
from tests.weights.models import MODELS, OFFICIAL_MODEL, assert_same_bytes, shapes_of, state_dict

IMAGES = np.random.default_rng(0).standard_normal((2, 16, 16, 3), np.float32)
FROM_SCRATCH = MODELS[VIT_FROM_SCRATCH]
CCT = MODELS[COMPACT_TRANSFORMERS]


@pytest.fixture
def module(peer):
  """module(name, ...) is a PyTorch model of tests/weights/torch_compact.py with drawn values."""
  torch = peer('torch')
  from tests.weights import torch_compact

  def make(name, *arguments, **keywords):
    model = getattr(torch_compact, name)(*arguments, **keywords).eval()
    for name, value in model.named_parameters():
      drawn = draw(name, tuple(value.shape))
      if 'norm' in name and name.endswith('.weight'):
        drawn = 1 + 0.3 * drawn
      value.data = torch.from_numpy(drawn)
    return model

  return make


def logits_of(module):
  import torch

  with torch.no_grad():
    return module(torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())).numpy()


def written(path, state):
  files.write_safetensors(path, {n: np.ascontiguousarray(x) for n, x in state.items()}, {})
  return path


def arrays(module):
  return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize('apart', [False, True], ids=['merged', 'apart'])
@pytest.mark.parametrize('pool', ['cls', 'seq'])
def test_vit_from_scratch(pool, apart, module, tmp_path):
  theirs = module('FromScratch', pool == 'seq', apart)
  weights = pretrained.load(written(tmp_path / 'w', arrays(theirs)))
  assert weights.model == FROM_SCRATCH.clone(pool=pool)
  half = (0.5, 0.5, 0.5)
  assert weights.description.preprocessing == Preprocessing(16, 1.0, half, half)
  assert weights.kind == 'vit-from-scratch' and 'data.py' in weights.notes[0]
  assert_close(quick_jit(weights.model.apply)(weights.variables, IMAGES), logits_of(theirs))


@pytest.mark.parametrize(
  ('convs', 'pool', 'position'),
  [(2, 'seq', 'learnable'), (1, 'seq', 'none'), (0, 'seq', 'learnable'), (0, 'cls', 'learnable')],
)
def test_compact_transformers(convs, pool, position, module, tmp_path):
  """CCT with two convolutions and with one, CVT, ViT-Lite."""
  theirs = module('CompactTransformer', convs, pool, position, tokens=64 if convs == 1 else 16)
  weights = pretrained.load(written(tmp_path / 'w', arrays(theirs)))
  # Without positions the tensors do not show the size of the images, nor does it matter.
  assert weights.model.clone(image_size=16) == CCT.clone(
    conv_layers=convs, pool=pool, position=position, patch_size=3 if convs else 4
  )
  assert weights.model.image_size == (32 if position == 'none' else 16)
  assert_close(quick_jit(weights.model.apply)(weights.variables, IMAGES), logits_of(theirs))


def test_sines_are_a_tensor_of_pytorch(module, tmp_path, peer):
  model = CCT.clone(position='sine')
  variables = drawn_variables(model)
  state = COMPACT_TRANSFORMERS.pack(model, variables)
  np.testing.assert_array_equal(state['classifier.positional_emb'][0], sine_embedding(16, 128))
  theirs = module('CompactTransformer', 2, 'seq', 'sine')
  torch = peer('torch')
  theirs.load_state_dict({n: torch.tensor(np.array(x)) for n, x in state.items()}, strict=True)
  assert_close(quick_jit(model.apply)(variables, IMAGES), logits_of(theirs))
  # The tensors do not say that they are sines: read as learnt, they compute the same.
  path = written(tmp_path / 'w', state)
  assert pretrained.load(path).model.position == 'learnable'
  assert_same_bytes(pretrained.load(path, model).variables, variables)
  assert 'position sine' in architecture.unsaid(COMPACT_TRANSFORMERS, model)


def test_learnt_positions_are_not_taken_for_sines(tmp_path):
  model = CCT.clone(position='learnable')
  path = written(tmp_path / 'w', COMPACT_TRANSFORMERS.pack(model, drawn_variables(model)))
  with pytest.raises(UserError, match=r"positional_emb holds learnt positions.*'learnable'"):
    pretrained.load(path, model.clone(position='sine'))


@pytest.mark.parametrize('name', ['cct-2/3x2', 'cct-7/3x1'])
def test_named_models_are_read_from_their_tensors(name):
  model = create_model(name, 7)
  shapes = {n: t.shape for n, t in COMPACT_TRANSFORMERS.tensors(model).items()}
  assert architecture.read(COMPACT_TRANSFORMERS, shapes, 'w.pth') == model


def test_counts_of_the_tensors():
  # Of a block: two norms, qkv without bias, three linear layers.
  assert len(COMPACT_TRANSFORMERS.tensors(create_model('cct-7/3x1', 10))) == 7 * 11 + 1 + 1 + 2 * 3
  assert len(VIT_FROM_SCRATCH.tensors(create_model('cvit', 10))) == 4 * 12 + 2 + 2 + 2


def test_heads_of_other_widths_are_asked_for(tmp_path):
  model = FROM_SCRATCH.clone(width=32, heads=2)
  path = written(tmp_path / 'w', VIT_FROM_SCRATCH.pack(model, drawn_variables(model)))
  with pytest.raises(UserError, match='heads of 32 channels do not show.*--model=NAME'):
    pretrained.load(path)
  assert pretrained.load(path, model).model == model


def test_heads_that_are_apart_show_their_number(module, tmp_path):
  path = written(tmp_path / 'w', arrays(module('FromScratch', True, True, width=32, heads=2)))
  assert pretrained.load(path).model.heads == 2
  with pytest.raises(UserError, match='has 2 heads, the model 4'):
    pretrained.load(path, FROM_SCRATCH.clone(width=32, pool='seq'))


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    ('encoder.blocks.0.attention.heads.1.key.weight', 'heads are missing'),
    ('encoder.blocks.1.mlp.dense_1.weight', 'that the model does not have: encoder.blocks.1'),
    ('classifier.bias', 'missing: classifier.bias'),
    ('embedding.position_embeddings', "position='none'"),
  ],
)
def test_damaged_files(damage, message, module, tmp_path):
  state = arrays(module('FromScratch', True, True))
  del state[damage]
  with pytest.raises(UserError, match=message):
    pretrained.load(written(tmp_path / 'w', state))


@pytest.mark.parametrize(
  ('layout', 'model', 'message'),
  [
    (OFFICIAL, CCT, r'a CompactViT \(only vit-from-scratch and compact-transformers can\)'),
    (VIT_FROM_SCRATCH, OFFICIAL_MODEL, r'a CvT \(only a CompactViT\)'),
    (VIT_FROM_SCRATCH, FROM_SCRATCH.clone(pool='mean'), "pool='mean'"),
    (VIT_FROM_SCRATCH, FROM_SCRATCH.clone(final_norm=True), 'final_norm=True'),
    (VIT_FROM_SCRATCH, FROM_SCRATCH.clone(position='sine'), "position='sine'"),
    (VIT_FROM_SCRATCH, FROM_SCRATCH.clone(conv_layers=1), 'conv_layers=1'),
    (VIT_FROM_SCRATCH, FROM_SCRATCH.clone(num_classes=0), 'num_classes=0'),
    (COMPACT_TRANSFORMERS, CCT.clone(residual_norm=False), 'residual_norm=False'),
    (COMPACT_TRANSFORMERS, CCT.clone(qkv_bias=True), 'qkv_bias=True'),
    (COMPACT_TRANSFORMERS, CCT.clone(activation='gelu_tanh'), "activation='gelu_tanh'"),
    (COMPACT_TRANSFORMERS, CCT.clone(pool='cls'), "pool='cls'"),
  ],
)
def test_what_a_layout_cannot_hold(layout, model, message):
  with pytest.raises(UserError, match=f"'{layout.name}' cannot hold this model: .*{message}"):
    architecture.check_expressible(layout, model)


@pytest.mark.parametrize('layout', [VIT_FROM_SCRATCH, COMPACT_TRANSFORMERS], ids=lambda x: x.name)
def test_convert_there_and_back(layout, tmp_path, peer):
  peer('torch')
  source = written(tmp_path / 'w', state_dict(layout))
  report = convert_weights(source, tmp_path / 'ours')
  assert (report['from'], report['to'], report['image_size']) == (layout.name, 'flax', 16)
  convert_weights(tmp_path / 'ours', tmp_path / 'back.pth', to=layout.name)
  model, variables = load_pretrained(tmp_path / 'ours')
  assert model == MODELS[layout]
  assert_same_bytes(pretrained.load(tmp_path / 'back.pth').variables, variables)
  with pytest.raises(UserError, match=f'{layout.name} is in no package'):
    convert_weights(source, tmp_path / 'checked', check=True)


def test_our_folder_there_and_back(tmp_path):
  model = CompactViT(num_classes=3, image_size=16, depth=1, pool='mean', position='sine')
  variables = drawn_variables(model)
  save_pretrained(tmp_path / 'ours', model, variables)
  found, back = load_pretrained(tmp_path / 'ours')
  assert found == model
  assert_same_bytes(back, variables)
  assert pretrained.load(tmp_path / 'ours').description.preprocessing.image_size == 16


@pytest.mark.parametrize(
  'damage',
  [
    lambda v: v | {'width': 48.5},
    lambda v: v | {'embed_dims': [48]},
    lambda v: v | {'pool': 'max'},
    lambda v: v | {'heads': 10**9},
    lambda v: {'width': 48},
  ],
)
def test_damaged_attributes(damage):
  values = damage(architecture.attributes(CCT))
  with pytest.raises(UserError, match=r'^config\.json'):
    architecture.from_attributes(values, 'config.json')


def test_differences():
  other = CCT.clone(heads=4, drop_path_rate=0.3, num_classes=9)
  assert architecture.differences(CCT, other) == {'heads': (2, 4)}


def test_shapes_of_a_state_dict_are_those_of_the_model():
  for layout in (VIT_FROM_SCRATCH, COMPACT_TRANSFORMERS):
    assert shapes_of(state_dict(layout)) == {
      n: t.shape for n, t in layout.tensors(MODELS[layout]).items()
    }
