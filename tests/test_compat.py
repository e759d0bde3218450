"""cvt_flax.compat.CvT against vit_pytorch.cvt.CvT, and as conceptofmind's Flax port is used."""

import functools
import inspect
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

import cvt_flax
from cvt_flax import compat, convert_weights, create_model, load_pretrained
from cvt_flax.weights.layouts import VIT_PYTORCH
from cvt_flax.weights.tensor_checks import leaf_shapes
from tests.models.test_peers import randomize
from tests.models.torch_weights import (
  assert_close,
  draw,
  drawn_variables,
  from_state_dict,
  quick_jit,
)

# What vit-pytorch is built with; the rest is at its default.
TINY = dict(
  num_classes=5, s1_emb_dim=8, s2_emb_dim=12, s3_emb_dim=16, s2_heads=1, s3_heads=2, s3_depth=1
)
CASES = {
  'defaults': TINY,
  'all others': dict(
    num_classes=3,
    s1_emb_dim=12,
    s1_emb_kernel=4,  # even: the map is a pixel larger than the images by their stride
    s1_emb_stride=3,
    s1_proj_kernel=1,
    s1_kv_proj_stride=3,
    s1_heads=2,
    s1_depth=2,
    s1_mlp_mult=1,
    s2_emb_dim=8,
    s2_emb_kernel=2,
    s2_emb_stride=1,
    s2_proj_kernel=5,
    s2_kv_proj_stride=1,
    s2_heads=1,
    s2_depth=1,
    s2_mlp_mult=3,
    s3_emb_dim=4,
    s3_emb_kernel=5,
    s3_emb_stride=3,
    s3_proj_kernel=3,
    s3_kv_proj_stride=1,
    s3_heads=3,
    s3_depth=1,
    s3_mlp_mult=2,
    dropout=0.0,
    channels=1,
  ),
}
SIZE = (37, 50)

every_case = pytest.mark.parametrize('keywords', CASES.values(), ids=CASES)


def theirs(peer, keywords):
  """vit-pytorch's module, with random weights and statistics."""
  module = peer('vit_pytorch.cvt').CvT(**keywords)
  randomize(peer('torch'), module)
  return module


def pictures(model, count=3):
  return draw('images', (count, *SIZE, model.in_channels))


def step(model, variables, images, **rngs):
  """Returns (logits, updated statistics) with train=True."""
  return model.apply(variables, images, train=True, mutable=['batch_stats'], rngs=rngs)


@every_case
def test_logits_and_statistics_are_vit_pytorchs(keywords, peer):
  torch = peer('torch')
  module, model = theirs(peer, keywords), compat.CvT(**keywords)
  variables = from_state_dict(VIT_PYTORCH, model, module.state_dict())
  images = pictures(model)
  x = torch.tensor(images.transpose(0, 3, 1, 2))
  evaluated, (trained, updates) = quick_jit(
    lambda v: (model.apply(v, images), step(model, v, images))
  )(variables)
  with torch.no_grad():
    assert_close(evaluated, module.eval()(x).numpy())
    assert_close(trained, module.train()(x).numpy())
  after = from_state_dict(VIT_PYTORCH, model, module.state_dict())['batch_stats']
  jax.tree.map(assert_close, updates['batch_stats'], after)


def test_every_dropout_is_where_vit_pytorch_has_it(peer, monkeypatch):
  """With dropouts that scale by a number of their rate in place of drawing."""
  torch = peer('torch')

  def scale(self, x):
    return x * (1 + self.p)

  def our_scale(self, x):
    return x if self.deterministic else x * (1 + self.rate)

  monkeypatch.setattr(torch.nn.Dropout, 'forward', scale)
  monkeypatch.setattr(nn.Dropout, '__call__', our_scale)
  keywords = TINY | dict(dropout=0.3)
  module, model = theirs(peer, keywords), compat.CvT(**keywords)
  variables = from_state_dict(VIT_PYTORCH, model, module.state_dict())
  images = pictures(model)
  logits, _ = quick_jit(functools.partial(step, model))(variables, images)
  with torch.no_grad():
    x = torch.tensor(images.transpose(0, 3, 1, 2))
    assert_close(logits, module.train()(x).numpy())


def test_keywords_and_defaults_are_vit_pytorchs(peer):
  expected = inspect.signature(peer('vit_pytorch.cvt').CvT).parameters
  ours = inspect.signature(compat.CvT).parameters
  assert {k: ours[k].default for k in expected} == {k: p.default for k, p in expected.items()}
  assert ours.keys() - expected.keys() == {'name', 'unknown'}


@pytest.mark.parametrize(('heads', 'parameters'), [(6, 19_936_296), (4, 17_970_216)])
def test_parameters_are_as_many(heads, parameters, peer):
  shapes = leaf_shapes(compat.CvT(num_classes=1000, s3_heads=heads))
  assert sum(math.prod(s) for path, s in shapes.items() if path[0] == 'params') == parameters
  with peer('torch').device('meta'):
    module = peer('vit_pytorch.cvt').CvT(num_classes=1000, s3_heads=heads)
  assert sum(p.numel() for p in module.parameters()) == parameters


# Weights


@pytest.mark.parametrize('channels', [3, 1])
def test_a_file_of_vit_pytorch_is_the_same_model(channels, peer, tmp_path):
  """What the file does not show, strides and heads, is at vit-pytorch's defaults here."""
  keywords = TINY | dict(channels=channels)
  module, model = theirs(peer, keywords), compat.CvT(**keywords)
  peer('torch').save(module.state_dict(), tmp_path / 'w.pth')
  with (
    pytest.warns(UserWarning, match='no image size'),
    pytest.warns(UserWarning, match='no model of these sizes is known'),
  ):
    found, variables = load_pretrained(tmp_path / 'w.pth')
  assert found == model
  expected = from_state_dict(VIT_PYTORCH, model, module.state_dict())
  jax.tree.map(np.testing.assert_array_equal, variables, expected)


def test_weights_of_other_keywords_go_out_and_back(peer, tmp_path):
  torch = peer('torch')
  module, model = theirs(peer, CASES['all others']), compat.CvT(**CASES['all others'])
  file = tmp_path / 'w-64x64.pth'  # the size at which it is checked
  torch.save(module.state_dict(), file)
  convert_weights(file, tmp_path / 'flax', model=model, check=True)
  shapes = {'/'.join(path): shape for path, shape in leaf_shapes(model).items()}
  written = load_file(tmp_path / 'flax' / 'model.safetensors')
  assert {name: tensor.shape for name, tensor in written.items()} == shapes
  assert load_pretrained(tmp_path / 'flax')[0] == model
  convert_weights(tmp_path / 'flax', tmp_path / 'back.pth', to='vit-pytorch')
  back = torch.load(tmp_path / 'back.pth', weights_only=True)
  for name, tensor in module.state_dict().items():
    if not name.endswith('num_batches_tracked'):
      assert torch.equal(back[name], tensor), name


# The Flax port


def test_the_ports_usage():
  """The calls of its README, with fewer channels and blocks; jax.tree for the names gone from JAX.

  The whole dict of collections is called params there, and apply returns a pair.
  """
  key = jax.random.PRNGKey(0)
  img = jax.random.normal(key, (1, 64, 64, 3))
  v = compat.CvT(
    num_classes=10,
    s1_emb_dim=8,
    s1_emb_kernel=7,
    s1_emb_stride=4,
    s1_proj_kernel=3,
    s1_kv_proj_stride=2,
    s1_heads=1,
    s1_depth=1,
    s1_mlp_mult=4,
    s2_emb_dim=8,
    s2_emb_kernel=3,
    s2_emb_stride=2,
    s2_proj_kernel=3,
    s2_kv_proj_stride=2,
    s2_heads=3,
    s2_depth=1,
    s2_mlp_mult=4,
    s3_emb_dim=8,
    s3_emb_kernel=3,
    s3_emb_stride=2,
    s3_proj_kernel=3,
    s3_kv_proj_stride=2,
    s3_heads=4,
    s3_depth=1,
    s3_mlp_mult=4,
    dropout=0.0,
  )
  init_rngs = {
    'params': jax.random.PRNGKey(1),
    'dropout': jax.random.PRNGKey(2),
    'emb_dropout': jax.random.PRNGKey(3),  # which nothing draws from
  }
  params = quick_jit(v.init)(init_rngs, img)
  output = quick_jit(functools.partial(v.apply, mutable=['batch_stats']))(
    params, img, rngs=init_rngs
  )
  logits, updates = output
  assert (logits.shape, logits.dtype) == ((1, 10), jnp.float32)
  assert params.keys() == {'params', 'batch_stats'}
  assert updates.keys() == {'batch_stats'}
  n_params = sum(jax.tree.leaves(jax.tree.map(lambda x: np.prod(x.shape), params)))
  assert n_params == sum(map(math.prod, leaf_shapes(v).values()))


def test_training_and_evaluation():
  """In the port every call trained: statistics of the batch, and dropout."""
  model = compat.CvT(**TINY | dict(dropout=0.5))
  images, variables = pictures(model), drawn_variables(model)

  @quick_jit
  def run(images, seed):
    evaluated = model.apply(variables, images, mutable=['batch_stats'])
    return evaluated, step(model, variables, images, dropout=jax.random.PRNGKey(seed))

  (logits, same), (trained, updates) = run(images, 1)
  jax.tree.map(np.testing.assert_array_equal, same['batch_stats'], variables['batch_stats'])
  (among_others, _), (trained_among_others, _) = run(np.concatenate([images[:1], -images[1:]]), 1)
  np.testing.assert_allclose(among_others[0], logits[0], rtol=1e-5)
  assert np.abs(trained_among_others[0] - trained[0]).max() > 1e-3
  before = traverse_util.flatten_dict(variables['batch_stats'])
  for path, statistic in traverse_util.flatten_dict(updates['batch_stats']).items():
    assert np.all(statistic != before[path]), path
  np.testing.assert_array_equal(run(images, 1)[1][0], trained)
  assert np.abs(run(images, 2)[1][0] - trained).max() > 1e-3


def test_a_model_in_a_model():
  class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
      return compat.CvT(**TINY, name='a')(x) + compat.CvT(**TINY)(x)

  shapes = jax.eval_shape(Two().init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
  assert shapes['params'].keys() == {'a', 'CvT_0'}


# What is refused


@pytest.mark.parametrize(
  ('keywords', 'error', 'message'),
  [
    (dict(s1_embed_dim=64), TypeError, "no keyword 's1_embed_dim', did you mean 's1_emb_dim'"),
    (dict(s4_depth=1), TypeError, r"no keyword 's4_depth', did you mean 's\d_depth'"),
    (dict(embed_dims=(1, 2, 3)), TypeError, "no keyword 'embed_dims'"),
    # An even one fails in vit-pytorch too, when it is called.
    (dict(s2_proj_kernel=4), ValueError, r's2_proj_kernel, s3_proj_kernel=\(3, 4, 3\): only odd'),
    (dict(s3_depth=0), ValueError, r's3_depth=\(1, 2, 0\): at least 1'),
    (dict(dropout=1.5), ValueError, r'^dropout=\(1.5, 1.5, 1.5\): rates from 0'),
    (dict(channels=0), ValueError, '^channels=0: at least 1'),
    (dict(num_classes=-1), ValueError, '^num_classes=-1: at least 0'),
  ],
)
def test_refusals(keywords, error, message):
  with pytest.raises(error, match=message):
    compat.CvT(**dict(num_classes=5) | keywords)


@pytest.mark.parametrize('shape', [(1, 3, 64, 64), (1, 64, 64, 1)])
def test_images_of_other_channels(shape):
  with pytest.raises(ValueError, match=r'in_channels=3: images \[b h w 3\].*are \[1, '):
    jax.eval_shape(compat.CvT(**TINY).init, jax.random.key(0), jnp.zeros(shape))


def test_the_main_models_say_where_stage_keywords_are():
  with pytest.raises(TypeError, match=r"'s1_emb_dim': .* cvt_flax\.compat\.CvT"):
    cvt_flax.CvT(num_classes=5, s1_emb_dim=64)
  with pytest.raises(ValueError, match=r"'s1_emb_dim': .* cvt_flax\.compat\.CvT"):
    create_model('cvt-13', s1_emb_dim=64)
  with pytest.raises(TypeError, match="no attribute 'embed_dim', did you mean 'embed_dims'"):
    cvt_flax.CvT(embed_dim=64)


def test_the_main_model_is_the_dataclass_that_linen_makes():
  class Wider(cvt_flax.CvT):
    extra: int = 0

  model = cvt_flax.CvT(num_classes=5)
  parameters = inspect.signature(cvt_flax.CvT).parameters
  assert [*parameters] == [*inspect.signature(cvt_flax.CvT.__init__).parameters][1:]
  assert [*parameters] == [*cvt_flax.CvT.__dataclass_fields__]
  assert parameters['num_classes'].default == 1000
  assert model.clone(pool='mean', cls_token=()) == cvt_flax.CvT(5, pool='mean', cls_token=())
  assert 'num_classes = 5' in repr(model)
  assert (Wider(5, extra=2).num_classes, Wider(extra=2).extra) == (5, 2)
