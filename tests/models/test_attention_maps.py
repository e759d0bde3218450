"""Attention maps are the weights that the model attends with, and cost nothing when not wanted."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from cvt_flax import CompactViT, CvT, attention_maps
from cvt_flax.models import cvt
from cvt_flax.models.options import resolve
from tests.models.test_cvt import CONFIGS, images, variables
from tests.models.torch_weights import drawn_variables, quick_jit

# The maps of 37x30 pixels are 9x7 and 5x4; keys are every other of them, rounded up, which average
# pooling does its own way, or all of them.
KEYS = {name: [(5, 4), (3, 2)] for name in CONFIGS} | {
  'avg': [(5, 4), (3, 3)],
  'linear': [(9, 7), (5, 4)],
}


def weights_of_all_queries(model, variables, x, monkeypatch):
  """Returns [b h t s] of the last block of every stage, of what `ops.attention` is called with."""
  calls = []

  def noted(q, k, v, scale, dropout):
    calls.append((np.asarray(q, np.float64), np.asarray(k, np.float64), scale))
    return original(q, k, v, scale, dropout)

  original = cvt.attention
  with monkeypatch.context() as patch:
    patch.setattr(cvt, 'attention', noted)
    model.apply(variables, x)
  last = np.cumsum([o.depth for o in resolve(model)]) - 1
  found = []
  for q, k, scale in (calls[i] for i in last):
    scores = np.exp(scale * np.einsum('bthd,bshd->bhts', q, k))
    found.append(scores / scores.sum(-1, keepdims=True))
  return found


@pytest.mark.parametrize('name', CONFIGS)
def test_maps_are_the_weights_attended_with(name, monkeypatch):
  model = CvT(**CONFIGS[name])
  x = images(2)
  maps = quick_jit(lambda v, x: attention_maps(model, v, x))(variables(name), x)
  expected = weights_of_all_queries(model, variables(name), x, monkeypatch)
  if model.pool == 'seq':
    *maps, _ = maps  # the last is of the pooling
  stages = zip(maps, expected, resolve(model), KEYS[name], strict=True)
  for found, weights, options, (height, width) in stages:
    assert found.shape == (2, options.num_heads, height, width)
    assert found.dtype == np.float32
    if options.cls_token:
      weights = weights[:, :, -1, :-1]
    else:
      weights = weights.mean(2)
      np.testing.assert_allclose(np.sum(found, (2, 3)), 1, rtol=1e-5)
    np.testing.assert_allclose(found.reshape(weights.shape), weights, rtol=1e-4, atol=1e-6)


def test_training_is_compiled_as_if_nothing_were_sown(monkeypatch):
  model = CvT(**CONFIGS['official'])

  def step(variables, x):
    key = {'dropout': jax.random.key(0)}
    return model.apply(variables, x, train=True, mutable=['batch_stats'], rngs=key)

  with_sow = str(jax.make_jaxpr(step)(variables('official'), images()))
  monkeypatch.setattr(nn.Module, 'sow', lambda *_: False)
  assert str(jax.make_jaxpr(step)(variables('official'), images())) == with_sow


def test_initial_variables_hold_nothing_sown():
  model = CvT(**CONFIGS['official'])
  shapes = jax.eval_shape(model.init, jax.random.key(0), images(1))
  assert set(shapes) == {'params', 'batch_stats'}


def test_maps_of_a_compact_transformer_and_of_sequence_pooling():
  x = images(2)[:, :32, :24]
  for pool, sums in (('cls', None), ('mean', 1.0), ('seq', 1.0)):
    model = CompactViT(5, width=12, depth=2, heads=3, pool=pool, position='sine')
    drawn = drawn_variables(model)
    maps = attention_maps(model, drawn, x)
    assert [m.shape for m in maps] == [(2, 3, 8, 6)] + [(2, 1, 8, 6)] * (pool == 'seq')
    totals = np.concatenate([np.sum(m, (2, 3)).ravel() for m in maps])
    if sums:
      np.testing.assert_allclose(totals, sums, rtol=1e-5)
    else:
      assert totals.max() < 1  # the class token looks at itself as well
  _, state = model.apply(drawn, x, mutable=['intermediates'])
  (weights,) = state['intermediates']['seq_pool']['weights']
  np.testing.assert_array_equal(maps[1].reshape(2, -1), weights)


def test_a_cvt_with_sequence_pooling_has_a_map_of_its_weights():
  config = CONFIGS['official'] | {'pool': 'seq'}
  model = CvT(**config)
  maps = attention_maps(model, drawn_variables(model), images(1))
  assert len(maps) == len(config['depths']) + 1
  assert maps[-1].shape == (1, 1, 5, 4)
  np.testing.assert_allclose(np.sum(maps[-1]), 1, rtol=1e-5)
