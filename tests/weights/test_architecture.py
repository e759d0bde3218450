"""Which model weights belong to."""

import json

import pytest

from cvt_flax import CvT, create_model
from cvt_flax.errors import UserError
from cvt_flax.models.options import resolve
from cvt_flax.weights import architecture, huggingface_config
from cvt_flax.weights.layouts import COMPACT_TRANSFORMERS as CCT
from cvt_flax.weights.layouts import HUGGING_FACE, LAYOUTS, OFFICIAL, VIT_PYTORCH
from tests.weights.models import (
  GELU_MODEL,
  MODELS,
  OFFICIAL_MODEL,
  SMALL,
  VIT_PYTORCH_MODEL,
  shapes_of,
  state_dict,
)


def read(layout, model):
  shapes = {name: tensor.shape for name, tensor in layout.tensors(model).items()}
  return architecture.read(layout, shapes, 'w.pth')


@pytest.mark.parametrize('name', ['cvt-13', 'cvt-21', 'cvt-w24'])
def test_named_models_are_read_from_their_tensors(name):
  model = create_model(name, 7)
  found = read(OFFICIAL, model)
  assert resolve(found) == resolve(model)
  assert (found.num_classes, found.pool, found.final_norm) == (7, 'cls', True)


@pytest.mark.parametrize(
  'attributes',
  [
    dict(num_classes=0),
    dict(cls_token=(False, False, False), pool='mean'),
    dict(cls_token=(True, False, True)),
    dict(qkv_bias=False),
    dict(qkv_kernels=(3, 5, 1)),
    dict(in_channels=4),
  ],
  ids=str,
)
def test_other_models_are_read_from_their_tensors(attributes):
  model = CvT(**SMALL | attributes)
  found = read(OFFICIAL, model)
  assert resolve(found) == resolve(model)
  assert architecture.differences(found, model) == {}
  assert (found.num_classes, found.in_channels) == (model.num_classes, model.in_channels)


def test_vit_pytorch_is_read_from_its_tensors():
  found = read(VIT_PYTORCH, VIT_PYTORCH_MODEL)
  assert architecture.attributes(found) | {'q_strides': ()} == (
    architecture.attributes(VIT_PYTORCH_MODEL)
  )


@pytest.mark.parametrize(
  ('attributes', 'message'),
  [
    (dict(patch_sizes=(3, 3, 3), patch_paddings=(1, 1, 1)), r'kernels of \(3, 3, 3\).*strides'),
    (dict(embed_dims=(32, 64, 128)), r'\(32, 64, 128\) channels.*not heads of 64'),
    (dict(projection='avg'), "'avg' or 'linear'.*--model=NAME"),
    (
      dict(projection='linear', qkv_kernels=(), kv_strides=()),
      "'avg' or 'linear'.*--model=NAME",
    ),
  ],
)
def test_what_does_not_show_is_asked_for(attributes, message):
  with pytest.raises(UserError, match=f'^w.pth.*{message}'):
    read(OFFICIAL, CvT(**SMALL | attributes))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'stage0.blocks.0.mlp.fc1.weight': None}, 'stage 0 has no block'),
    ({'stage1.blocks.0.attn.proj_q.weight': None}, r'stage1\S+proj_q.weight is missing'),
    ({'stage1.patch_embed.proj.weight': (64,)}, r'stage1\S+ has the shape \[64\]'),
  ],
)
def test_damaged_tensors(change, message):
  shapes = shapes_of(state_dict(OFFICIAL)) | change
  shapes = {name: shape for name, shape in shapes.items() if shape is not None}
  with pytest.raises(UserError, match=message):
    architecture.read(OFFICIAL, shapes, 'w.pth')


@pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_are_known_by_their_names(layout):
  assert architecture.layout_of(shapes_of(state_dict(layout)), 'w.pth') is layout


def test_unknown_names():
  names = {'conv1.weight': (), 'conv1.bias': (), 'fc.weight': (), 'fc.bias': ()}
  with pytest.raises(
    UserError, match=r'w.pth holds no model .* \(conv1.weight, conv1.bias, fc.weight'
  ):
    architecture.layout_of(names, 'w.pth')


@pytest.mark.parametrize('model', [create_model('cvt-13'), create_model('cvt-nano', 3), GELU_MODEL])
def test_hugging_face_config_there_and_back(model):
  config = json.loads(json.dumps(huggingface_config.from_model(model)))
  found = huggingface_config.to_model(config, model.num_classes, 'config.json')
  assert resolve(found) == resolve(model)
  assert (found.num_classes, found.pool) == (model.num_classes, model.pool)


def test_hugging_face_channels():
  config = huggingface_config.from_model(create_model('cvt-13', in_channels=4))
  assert huggingface_config.to_model(config, 1000, 'config.json').in_channels == 4
  with pytest.raises(UserError, match="in_channels='RGB'"):
    huggingface_config.to_model({'num_channels': 'RGB'}, 1000, 'config.json')


def test_hugging_face_config_is_what_transformers_means(peer):
  transformers = peer('transformers')
  config = huggingface_config.from_model(create_model('cvt-13'))
  ours = {k: v for k, v in config.items() if k in transformers.CvtConfig().to_dict()}
  theirs = transformers.CvtConfig(architectures=['CvtForImageClassification']).to_dict()
  theirs = json.loads(json.dumps(theirs))
  # Two are ours alone, and dtype is not set before there are weights.
  assert config.keys() - theirs.keys() == {'activation'}
  assert {k: theirs[k] for k in ours} | {'dtype': 'float32'} == ours


def test_hugging_face_defaults():
  """A config that transformers wrote lacks what is at its default."""
  found = huggingface_config.to_model({'model_type': 'cvt'}, 1000, 'config.json')
  assert resolve(found) == resolve(create_model('cvt-13', activation='gelu'))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'depth': 3}, 'a list with a value for every stage'),
    ({'depth': [1, 2]}, 'depths has 2 entries'),
    ({'depth': ['1', 2, 10]}, 'config.json'),
    ({'depth': [1.0, 2.0, 10.0]}, r'depths=\(1.0, 2.0, 10.0\)'),
    ({'patch_sizes': [7, 3, 10**9]}, 'patch_sizes.*at most'),
    ({'mlp_ratio': [4.0, 4.0, float('nan')]}, 'mlp_ratios.*at most'),
    ({'num_heads': [True, 3, 6]}, 'num_heads'),
    ({'qkv_bias': ['yes'] * 3}, "qkv_bias='yes'"),
    ({'cls_token': [0, 0, 1]}, 'cls_token'),
    ({'num_heads': [5, 3, 6]}, '5 heads do not divide'),
    ({'activation': 'relu'}, "activation='relu'"),
    ({'stride_q': [2, 1, 1]}, r'stride_q=\[2, 1, 1\]: only \[1, 1, 1\]'),
    ({'padding_kv': [0, 1, 1]}, 'padding_kv'),
    ({'kernel_qkv': [5, 3, 3]}, 'padding_q'),
    ({'qkv_bias': [True, False, True]}, 'qkv_bias'),
    ({'qkv_projection_method': ['avg'] * 3}, 'qkv_projection_method'),
    ({'embed_dim': []}, 'config.json'),
  ],
)
def test_hugging_face_configs_that_cannot_be_read(change, message):
  with pytest.raises(UserError, match=message):
    huggingface_config.to_model(change, 1000, 'config.json')


@pytest.mark.parametrize(
  ('layout', 'attributes', 'message'),
  [
    (OFFICIAL, dict(activation='gelu'), r"activation='gelu' \(only 'quick_gelu'\)"),
    (OFFICIAL, dict(head_dim=32), 'head_dim=32'),
    (OFFICIAL, dict(attention_scale='head_dim'), 'attention_scale'),
    (OFFICIAL, dict(shared_kv=True), 'shared_kv'),
    (OFFICIAL, dict(out_bias=False), 'out_bias'),
    (OFFICIAL, dict(mlp_bias=False), 'mlp_bias'),
    (OFFICIAL, dict(final_norm=False), 'final_norm'),
    (OFFICIAL, dict(pool='mean'), r"pool='mean' \(only 'cls'\)"),
    (OFFICIAL, dict(pool='seq'), r"pool='seq' \(only 'cls'\)"),
    (HUGGING_FACE, dict(pool='seq'), r"pool='seq' \(only 'cls'\)"),
    (HUGGING_FACE, dict(activation='gelu_tanh'), "activation='gelu_tanh'"),
    (HUGGING_FACE, dict(projection='avg'), 'projection'),
    (HUGGING_FACE, dict(cls_token=(True, False, True)), 'cls_token.*only in the last stage'),
    (OFFICIAL, dict(pos_embed=(56, 0, 0)), 'pos_embed'),
    (VIT_PYTORCH, dict(pos_embed=(56, 0, 0)), 'pos_embed'),
    (HUGGING_FACE, dict(num_classes=0), 'num_classes=0'),
    (HUGGING_FACE, dict(depths=(1, 1, 3)), r'depths=\(1, 1, 3\)'),
    (VIT_PYTORCH, dict(shared_kv=False), 'shared_kv'),
    (VIT_PYTORCH, dict(qkv_bias=True), 'qkv_bias'),
    (VIT_PYTORCH, dict(out_bias=False), 'out_bias'),
    (VIT_PYTORCH, dict(mlp_bias=False), 'mlp_bias'),
    (VIT_PYTORCH, dict(head_dim=32), 'head_dim'),
    (VIT_PYTORCH, dict(attention_scale='embed_dim', num_heads=(1, 2, 2)), 'attention_scale'),
    (VIT_PYTORCH, dict(patch_paddings=(2, 1, 1)), 'patch_paddings'),
    (VIT_PYTORCH, dict(mlp_ratios=(1.5, 2.0, 1.0)), 'mlp_ratios'),
    (VIT_PYTORCH, dict(activation='quick_gelu'), 'activation'),
    (VIT_PYTORCH, dict(final_norm=True), 'final_norm'),
    (VIT_PYTORCH, dict(cls_token=(True, False, False)), 'cls_token'),
    (VIT_PYTORCH, dict(num_classes=0), 'num_classes'),
  ],
)
def test_what_a_layout_cannot_hold(layout, attributes, message):
  model = MODELS[layout].clone(**attributes)
  with pytest.raises(UserError, match=f"'{layout.name}' cannot hold this model: .*{message}"):
    architecture.check_expressible(layout, model)


@pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS)
def test_what_a_layout_can_hold(layout):
  architecture.check_expressible(layout, MODELS[layout])


@pytest.mark.parametrize(
  'model', [VIT_PYTORCH_MODEL, OFFICIAL_MODEL.clone(pool='seq'), MODELS[CCT]]
)
def test_attributes_there_and_back(model):
  values = json.loads(json.dumps(architecture.attributes(model)))
  assert architecture.from_attributes(values, 'config.json') == model


def test_attributes_of_earlier_versions():
  values = architecture.attributes(OFFICIAL_MODEL)
  del values['embed_drop_rates'], values['in_channels']
  assert architecture.from_attributes(values, 'config.json') == OFFICIAL_MODEL


@pytest.mark.parametrize(
  'damage',
  [
    lambda v: v | {'head_dim': 1.5},
    lambda v: v | {'cls_token': ['a', 'b', 'c']},
    lambda v: v | {'final_norm': {}},
    lambda v: v | {'embed_dims': 64},
    lambda v: None,
    lambda v: v | {'x': 1},
    lambda v: v | {'depths': [1, 2]},
    lambda v: {},
  ],
)
def test_damaged_attributes(damage):
  values = damage(architecture.attributes(OFFICIAL_MODEL))
  with pytest.raises(UserError, match=r'^config\.json'):
    architecture.from_attributes(values, 'config.json')
