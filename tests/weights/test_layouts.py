"""The tables of names and shapes."""

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cvt_flax import create_model
from cvt_flax.errors import UserError
from cvt_flax.weights.layouts import HUGGING_FACE, LAYOUTS, OFFICIAL, VIT_PYTORCH
from cvt_flax.weights.tensor_checks import check
from tests.models.test_goldens import CONFIGS, CvT, golden
from tests.models.torch_weights import drawn_variables
from tests.weights.models import MODELS, PACKAGED, assert_same_bytes, shapes_of, state_dict


def without_counters(names):
  return {name for name in names if not name.endswith('num_batches_tracked')}


@pytest.mark.parametrize('name', CONFIGS)
def test_official_names_are_those_of_the_authors_code(name):
  names = without_counters(OFFICIAL.tensors(CvT(**CONFIGS[name])))
  assert names == set(golden(name)['names'].tolist())


# All keys, and the counters and statistics among them, of the released files.
@pytest.mark.parametrize(
  ('name', 'keys', 'buffers'), [('cvt-13', 459, 117), ('cvt-21', 731, 189), ('cvt-w24', 833, 216)]
)
@pytest.mark.parametrize('layout', [OFFICIAL, HUGGING_FACE])
def test_counts_of_the_released_weights(layout, name, keys, buffers):
  tensors = layout.tensors(create_model(name))
  assert len(tensors) == keys
  ends = ('running_mean', 'running_var', 'num_batches_tracked')
  assert sum(n.endswith(ends) for n in tensors) == buffers


@pytest.mark.parametrize(
  ('layout', 'name', 'shape'),
  [
    (OFFICIAL, 'stage2.cls_token', (1, 1, 384)),
    (OFFICIAL, 'stage1.patch_embed.proj.weight', (192, 64, 3, 3)),
    (OFFICIAL, 'stage2.blocks.9.attn.conv_proj_k.conv.weight', (384, 1, 3, 3)),
    (OFFICIAL, 'stage1.blocks.1.attn.conv_proj_v.bn.num_batches_tracked', ()),
    (OFFICIAL, 'stage0.blocks.0.mlp.fc2.weight', (64, 256)),
    (OFFICIAL, 'head.weight', (1000, 384)),
    (HUGGING_FACE, 'cvt.encoder.stages.2.cls_token', (1, 1, 384)),
    (
      HUGGING_FACE,
      'cvt.encoder.stages.0.embedding.convolution_embeddings.projection.weight',
      (64, 3, 7, 7),
    ),
    (
      HUGGING_FACE,
      'cvt.encoder.stages.1.layers.1.attention.attention.convolution_projection_query'
      '.convolution_projection.normalization.running_var',
      (192,),
    ),
    (
      HUGGING_FACE,
      'cvt.encoder.stages.2.layers.9.attention.attention.projection_value.bias',
      (384,),
    ),
    (HUGGING_FACE, 'cvt.encoder.stages.2.layers.0.attention.output.dense.weight', (384, 384)),
    (HUGGING_FACE, 'cvt.encoder.stages.0.layers.0.intermediate.dense.weight', (256, 64)),
    (HUGGING_FACE, 'cvt.encoder.stages.0.layers.0.output.dense.weight', (64, 256)),
    (HUGGING_FACE, 'layernorm.weight', (384,)),
    (HUGGING_FACE, 'classifier.bias', (1000,)),
  ],
)
def test_rows_of_the_table(layout, name, shape):
  assert layout.tensors(create_model('cvt-13'))[name].shape == shape


@pytest.mark.parametrize(
  ('name', 'shape'),
  [
    ('layers.0.0.weight', (64, 3, 7, 7)),
    ('layers.1.1.g', (1, 64, 1, 1)),
    ('layers.1.2.layers.1.0.norm.b', (1, 64, 1, 1)),
    ('layers.2.2.layers.0.0.to_q.net.2.weight', (128, 128, 1, 1)),
    ('layers.2.2.layers.0.0.to_kv.net.0.weight', (128, 1, 3, 3)),
    ('layers.2.2.layers.0.0.to_kv.net.1.running_mean', (128,)),
    ('layers.2.2.layers.0.0.to_kv.net.2.weight', (256, 128, 1, 1)),
    ('layers.0.2.layers.0.0.to_out.0.bias', (64,)),
    ('layers.0.2.layers.0.1.net.4.weight', (64, 64, 1, 1)),
    ('to_logits.2.weight', (5, 128)),
  ],
)
def test_rows_of_vit_pytorch(name, shape):
  assert VIT_PYTORCH.tensors(MODELS[VIT_PYTORCH])[name].shape == shape


@pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS)
def test_there_and_back_are_the_same_bytes(layout):
  model = MODELS[layout]
  variables = drawn_variables(model)
  state = layout.pack(model, variables)
  back = layout.unpack(model, shapes_of(state), state.__getitem__, 'the state dict')
  assert_same_bytes(back, variables)


def test_axes():
  variables = flatten_dict(drawn_variables(MODELS[OFFICIAL])['params'], sep='/')
  state = state_dict(OFFICIAL)
  linear = variables['stage1/blocks_1/mlp/fc1/kernel']
  np.testing.assert_array_equal(state['stage1.blocks.1.mlp.fc1.weight'], linear.T)
  kernel = variables['stage1/patch_embed/proj/kernel']
  found = state['stage1.patch_embed.proj.weight']
  assert found[5, 7, 1, 2] == kernel[1, 2, 7, 5]
  assert state['stage0.blocks.0.attn.conv_proj_q.bn.num_batches_tracked'].dtype == np.int64


def test_keys_come_before_values_in_vit_pytorch():
  variables = flatten_dict(drawn_variables(MODELS[VIT_PYTORCH])['params'], sep='/')
  both = state_dict(VIT_PYTORCH)['layers.2.2.layers.0.0.to_kv.net.2.weight'][:, :, 0, 0]
  np.testing.assert_array_equal(both[:128].T, variables['stage2/blocks_0/attn/proj_k/kernel'])
  np.testing.assert_array_equal(both[128:].T, variables['stage2/blocks_0/attn/proj_v/kernel'])


@pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS)
def test_counters_may_be_missing(layout):
  model, state = MODELS[layout], state_dict(layout)
  state = {name: state[name] for name in without_counters(state)}
  layout.unpack(model, shapes_of(state), state.__getitem__, 'the state dict')


@pytest.mark.parametrize('layout', PACKAGED, ids=lambda layout: layout.name)
def test_the_names_are_those_of_the_peer(layout, peer):
  """By loading them there: PyTorch wants every name and every shape."""
  torch = peer('torch')
  peer('vit_pytorch.cvt' if layout is VIT_PYTORCH else 'transformers')
  from cvt_flax.weights.parity import torch_model

  model = MODELS[layout]
  module = torch_model(model, drawn_variables(model), layout)
  if layout is OFFICIAL:  # no package has it; transformers computes it
    return
  found = {name: tuple(t.shape) for name, t in module.state_dict().items()}
  assert found == {name: t.shape for name, t in layout.tensors(model).items()}
  assert all(t.dtype in (torch.float32, torch.int64) for t in module.state_dict().values())


def test_everything_that_does_not_fit_is_in_one_message():
  expected = {'a': (1,), 'b': (2, 3), 'c': (), 'bn.num_batches_tracked': ()}
  found = {'a': (1,), 'b': (3, 2), 'x': (), 'y': ()}
  with pytest.raises(UserError) as error:
    check('w.pth', expected, found)
  assert str(error.value) == (
    'w.pth does not fit the model; tensors 1 missing: c; tensors 2 that the model does not have: '
    'x, y; tensors 1 of another shape: b [3, 2] instead of [2, 3]'
  )


def test_long_lists_are_cut():
  with pytest.raises(UserError, match=r'20 missing: 0, 1, 2, 3, 4, 5, 6, 7, and 12 more$'):
    check('w.pth', {str(n): () for n in range(20)}, {})


def test_nothing_is_read_that_does_not_fit():
  state = state_dict(OFFICIAL) | {'head.bias': np.zeros(6)}
  with pytest.raises(UserError, match=r'head\.bias \[6\] instead of \[5\]'):
    OFFICIAL.unpack(MODELS[OFFICIAL], shapes_of(state), lambda name: 1 / 0, 'w.pth')
