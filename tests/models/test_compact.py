"""CompactViT: what it refuses, what it keeps to, what can be looked into.

Its numbers are compared with PyTorch in tests/weights/test_compact.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from benchmarks import attention_heads
from cvt_flax import CompactViT, create_model
from cvt_flax.models import compact
from cvt_flax.models.geometry import multiply_adds, stage_geometry
from tests.models.torch_weights import assert_close, draw, drawn_variables, quick_jit

TINY = dict(num_classes=5, image_size=8, width=12, depth=2, heads=3, mlp_ratio=2.0)
CONFIGS = {
  'cls': TINY | dict(pool='cls'),
  'seq': TINY | dict(pool='seq'),
  'mean': TINY | dict(pool='mean', position='sine', final_norm=True),
  'cct': TINY
  | dict(
    pool='seq',
    patch_size=3,
    conv_layers=2,
    residual_norm=True,
    final_norm=True,
    qkv_bias=False,
    activation='gelu',
  ),
}
every_config = pytest.mark.parametrize('name', CONFIGS)

# What is wrong -> what the message must say.
REFUSED = [
  (dict(num_classes=-1), r'num_classes=-1: at least 0'),
  (dict(image_size=0), r'image_size=0: at least 1'),
  (dict(image_size=30), r'images of 30x30: patch_size=4 does not divide them'),
  (dict(width=0), r'width=0: at least 1'),
  (dict(width=50), r'heads=4: they do not divide width=50'),
  (dict(width=9, heads=3, position='sine'), r"width=9: position='sine'.*even"),
  (dict(depth=0), r'depth=0: at least 1'),
  (dict(heads=0), r'heads=0: at least 1'),
  (dict(mlp_ratio=0.0), r'mlp_ratio=0\.0: .*no hidden channel'),
  (dict(patch_size=0), r'patch_size=0: at least 1'),
  (dict(conv_layers=-1), r'conv_layers=-1: at least 0'),
  (dict(pool='seqpool'), r"pool='seqpool': one of cls, seq, mean is needed"),
  (dict(position='sin'), r"position='sin': .*did you mean 'sine'\?"),
  (dict(activation='relu'), r"activation='relu': one of quick_gelu, gelu, gelu_tanh"),
  (dict(drop_rate=1.0), r'drop_rate=1\.0: a rate from 0'),
  (dict(attn_drop_rate=-0.1), r'attn_drop_rate=-0\.1: a rate from 0'),
  (dict(drop_path_rate=2.0), r'drop_path_rate=2\.0: a rate from 0'),
]


@pytest.mark.parametrize(('attributes', 'message'), REFUSED, ids=str)
def test_refused(attributes, message):
  with pytest.raises(ValueError, match=message):
    CompactViT(**attributes)


def images(size=8, count=3):
  return draw('images', (count, size, size, 3))


@functools.cache
def computed(name):
  """Returns (variables, logits, logits of the first image alone, logits and state looked into)."""
  model, x = CompactViT(**CONFIGS[name]), images()
  variables = drawn_variables(model)

  @quick_jit
  def apply(variables, x):
    state = model.apply(variables, x, mutable=['intermediates'])
    return model.apply(variables, x), model.apply(variables, x[:1]), state

  return variables, *apply(variables, x)


@every_config
def test_logits(name):
  _, logits, alone, (seen, _) = computed(name)
  assert (logits.shape, logits.dtype) == ((3, 5), jnp.float32)
  assert np.std(logits, axis=0).min() > 1e-3  # they depend on the images
  np.testing.assert_allclose(logits[:1], alone, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(logits, seen, rtol=1e-5, atol=1e-6)


@every_config
def test_what_is_sown(name):
  _, _, _, (_, state) = computed(name)
  found = {
    path: x[0].shape for path, x in traverse_util.flatten_dict(state['intermediates']).items()
  }
  n = 5 if name == 'cls' else 4
  last = 1 if name == 'cls' else n  # the class token alone asks in the last block
  expected = {
    ('blocks_0', 'attn', 'queries'): (3, n, 3, 4),
    ('blocks_0', 'attn', 'keys'): (3, n, 3, 4),
    ('blocks_1', 'attn', 'queries'): (3, last, 3, 4),
    ('blocks_1', 'attn', 'keys'): (3, n, 3, 4),
  }
  if CONFIGS[name]['pool'] == 'seq':
    expected['seq_pool', 'weights'] = (3, n)
    weights = state['intermediates']['seq_pool']['weights'][0]
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    assert weights.max() > 1.2 * weights.min()
  assert found == expected


def test_nothing_is_sown_unasked():
  model = CompactViT(**CONFIGS['seq'])
  variables = jax.eval_shape(model.init, jax.random.key(0), images())
  assert set(variables) == {'params'}
  assert jax.eval_shape(model.apply, variables, images()).shape == (3, 5)


@pytest.mark.parametrize('name', ['cls', 'seq'])
def test_merged_heads_are_heads_apart(name, monkeypatch):
  """The oracle has linear layers of its own for the queries, keys and values of every head."""
  model = CompactViT(**CONFIGS[name])
  params = drawn_variables(model)['params']
  images = draw('images', (4, 8, 8, 3))
  merged = quick_jit(model.apply)({'params': params}, images)
  with monkeypatch.context() as patch:
    patch.setattr(compact, 'Attention', attention_heads.HeadsApart)
    heads = {'params': attention_heads.apart(params, model.heads)}
    each = quick_jit(lambda v, x: model.apply(v, x))(heads, images)
  np.testing.assert_allclose(merged, each, rtol=0, atol=1e-6 * np.abs(each).max())


def test_sequence_pooling_is_the_weighted_mean():
  """By hand, from what the last block returns."""
  model = CompactViT(**CONFIGS['seq'])
  variables, logits, _, (_, state) = computed('seq')
  tokens = quick_jit(
    lambda v, x: model.apply(v, x, capture_intermediates=lambda m, _: m.name == 'blocks_1')
  )(variables, images())[1]['intermediates']['blocks_1']['__call__'][0]
  p = variables['params']
  scores = np.asarray(tokens, np.float64) @ p['seq_pool']['score']['kernel'][:, 0]
  weights = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
  assert_close(state['intermediates']['seq_pool']['weights'][0], weights)
  pooled = np.einsum('bn,bnc->bc', weights, tokens)
  assert_close(logits, pooled @ p['head']['kernel'] + p['head']['bias'])


@every_config
def test_every_parameter_has_a_gradient(name):
  """But for constants added to what a softmax is taken of: biases of keys and of the scores."""
  model = CompactViT(**CONFIGS[name])
  variables = computed(name)[0]

  def loss(variables):
    return jnp.sum(jnp.sin(model.apply(variables, images(), train=True)) * jnp.arange(1, 6))

  gradients = traverse_util.flatten_dict(quick_jit(jax.grad(loss))(variables)['params'], sep='/')
  largest = max(np.abs(g).max() for g in gradients.values())
  vanishing = {n for n, g in gradients.items() if np.abs(g).max() <= 1e-5 * largest}
  assert vanishing == ({'seq_pool/score/bias'} if model.pool == 'seq' else set())
  for n in ('blocks_0/attn/qkv/bias', 'blocks_1/attn/qkv/bias'):
    if n in gradients:
      assert np.abs(gradients[n][12:24]).max() <= 1e-5 * largest


def test_positions_that_are_learnt_are_for_one_size():
  model = CompactViT(**TINY)
  variables = drawn_variables(model)
  with pytest.raises(ValueError, match='images of 12x12: .* learnt for image_size=8'):
    model.apply(variables, images(12))
  for position in ('sine', 'none'):
    free = CompactViT(**TINY, position=position)
    logits = jax.eval_shape(free.apply, {'params': drawn_variables(free)['params']}, images(12))
    assert logits.shape == (3, 5)


def test_positions_matter():
  """Without them the mean over the tokens does not see where a patch is."""
  swapped = np.flip(images().reshape(3, 2, 4, 8, 3), axis=1).reshape(3, 8, 8, 3)
  for position, same in (('none', True), ('sine', False), ('learnable', False)):
    model = CompactViT(**TINY, pool='mean', position=position)
    variables = drawn_variables(model)
    a, b = quick_jit(model.apply)(variables, images()), quick_jit(model.apply)(variables, swapped)
    assert np.allclose(a, b, atol=1e-5) == same


@pytest.mark.parametrize('rate', ['drop_rate', 'attn_drop_rate', 'drop_path_rate'])
def test_every_dropout_acts_in_training_alone(rate):
  model = CompactViT(**CONFIGS['seq'], **{rate: 0.5})
  variables, logits, _, _ = computed('seq')
  train = quick_jit(lambda v, key: model.apply(v, images(), train=True, rngs={'dropout': key}))
  a, b, again = (train(variables, jax.random.key(i)) for i in (0, 1, 0))
  np.testing.assert_array_equal(a, again)
  assert np.abs(a - b).max() > 1e-3
  np.testing.assert_allclose(quick_jit(model.apply)(variables, images()), logits, atol=1e-6)


def test_bfloat16():
  variables, logits, _, _ = computed('cls')
  model = CompactViT(**CONFIGS['cls'], dtype=jnp.bfloat16)
  half = quick_jit(model.apply)(variables, images())
  assert half.dtype == jnp.float32
  assert_close(half, logits, 0.05)


def test_no_classes_returns_the_features():
  model = CompactViT(**TINY | dict(num_classes=0))
  features = jax.eval_shape(model.init_with_output, jax.random.key(0), images())[0]
  assert (features.shape, features.dtype) == ((3, 12), jnp.float32)


def test_initial_values():
  def initial(**attributes):
    model = CompactViT(width=64, depth=1, image_size=32, **attributes)
    return quick_jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))['params']

  def spread(x):
    return pytest.approx(float(np.std(x)), rel=0.1)

  params = initial(pool='cls')
  for kernel in (
    params['patch_embed']['proj']['kernel'],
    params['blocks_0']['mlp']['fc1']['kernel'],
  ):
    assert spread(kernel) == 0.02
  assert spread(params['pos_embed']) == 0.02
  assert not params['head']['bias'].any()
  params = initial(pool='seq', conv_layers=2, patch_size=3)
  assert spread(params['pos_embed']) == 0.2
  assert spread(params['tokenizer']['conv_1']['kernel']) == (2 / (9 * 64)) ** 0.5


def test_multiply_adds():
  # mc-ViT by hand: 64 patches of 48 numbers; 4 blocks with 12 matrices of 48x48; scores and mixing.
  blocks = 4 * (64 * 12 * 48**2 + 2 * 64**2 * 48)
  expected = 64 * 48 * 48 + blocks + 2 * 64 * 48 + 48 * 10
  assert multiply_adds(create_model('mcvit', 10), 32, 32) == expected
  # CCT-7/3x1: a convolution of every pixel, then 256 tokens; 7 blocks with 8 matrices of 256x256.
  blocks = 7 * (256 * 8 * 256**2 + 2 * 256**2 * 256)
  expected = 32**2 * 3 * 3**2 * 256 + blocks + 2 * 256 * 256 + 256 * 10
  assert multiply_adds(create_model('cct-7/3x1', 10), 32, 32) == expected


def test_tokens():
  def tokens(name, **attributes):
    model = create_model(name, **attributes)
    (stage,) = stage_geometry(model, model.image_size, model.image_size)
    return stage.height, stage.width, stage.tokens, stage.keys

  assert tokens('cvit') == (8, 8, 65, 65)
  assert tokens('mcvit') == (8, 8, 64, 64)
  assert tokens('cct-7/3x1') == (16, 16, 256, 256)
  assert tokens('cct-2/3x2') == (8, 8, 64, 64)
  # CCT-14/7x2 of the same code at 224: kernel 7, stride 2.
  assert tokens('cct-7/3x1', patch_size=7, conv_layers=2, image_size=224) == (14, 14, 196, 196)
  with pytest.raises(ValueError, match='learnt for image_size=32'):
    stage_geometry(create_model('mcvit'), 64, 64)
