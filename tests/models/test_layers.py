"""The layers: against PyTorch's where it is installed, and by their definitions."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cvt_flax.models.layers import (
  ACTIVATIONS,
  BatchNorm,
  Dense,
  DepthwiseConv,
  DropPath,
  LayerNorm,
  dense_init,
  uniform_init,
)


def batches(count, shape=(4, 3, 5, 6)):
  rng = np.random.default_rng(0)
  return [rng.normal(2.0, 3.0, shape).astype(np.float32) for _ in range(count)]


def close(actual, expected, tolerance=1e-5):
  assert actual.shape == expected.shape
  assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize('rows', [(), (4,), (2, 3), (2, 3, 5), (0, 3)])
def test_dense_is_flax_s(rows):
  x = np.random.default_rng(0).normal(size=(*rows, 6)).astype(np.float32)
  ours = Dense(7)
  variables = ours.init(jax.random.key(0), x)
  expected = nn.Dense(7, kernel_init=dense_init)
  assert jax.tree.all(jax.tree.map(np.array_equal, variables, expected.init(jax.random.key(0), x)))
  actual, expected = ours.apply(variables, x), expected.apply(variables, x)
  assert actual.shape == expected.shape
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_dense_kernel_transposes_nothing():
  ours, x = Dense(7), np.ones((2, 3, 6), np.float32)
  variables = ours.init(jax.random.key(0), x)
  gradient = jax.jit(jax.grad(lambda v: jnp.sum(ours.apply(v, x) ** 2)))
  compiled = gradient.lower(variables).compile().as_text()
  assert 'dot(' in compiled and 'transpose(' not in re.sub('metadata={.*?}', '', compiled)


# A linear layer that changes nothing.
SAME = jnp.eye(6), jnp.zeros(6)


def test_batch_norm_against_pytorch(peer):
  torch = peer('torch')
  theirs = torch.nn.BatchNorm2d(6)
  rng = np.random.default_rng(1)
  scale, bias = (rng.normal(size=6).astype(np.float32) for _ in range(2))
  theirs.load_state_dict(
    theirs.state_dict() | {'weight': torch.tensor(scale), 'bias': torch.tensor(bias)}
  )
  ours = BatchNorm()
  variables = ours.init(jax.random.key(0), batches(1)[0], *SAME, False)
  variables = {**variables, 'params': {'scale': scale, 'bias': bias}}
  train = jax.jit(lambda v, x: ours.apply(v, x, *SAME, True, mutable=['batch_stats']))

  def compare(actual, x):
    expected = theirs(torch.tensor(x.transpose(0, 3, 1, 2)))
    close(actual, expected.detach().numpy().transpose(0, 2, 3, 1))

  for x in batches(4):
    y, updates = train(variables, x)
    variables |= updates
    compare(y, x)
    close(variables['batch_stats']['mean'], theirs.running_mean.numpy())
    close(variables['batch_stats']['var'], theirs.running_var.numpy())
  theirs.eval()
  compare(ours.apply(variables, x, *SAME, False), x)


def test_running_statistics_move_by_a_tenth():
  ours = BatchNorm()
  x, second = batches(2)
  variables = ours.init(jax.random.key(0), x, *SAME, True)
  np.testing.assert_array_equal(variables['batch_stats']['mean'], np.zeros(6))
  np.testing.assert_array_equal(variables['batch_stats']['var'], np.ones(6))
  mean, var = 0.0, 1.0
  for batch in (x, second):
    _, updates = ours.apply(variables, batch, *SAME, True, mutable=['batch_stats'])
    variables |= updates
    mean = 0.9 * mean + 0.1 * batch.mean((0, 1, 2), np.float64)
    var = 0.9 * var + 0.1 * batch.var((0, 1, 2), np.float64, ddof=1)
    close(variables['batch_stats']['mean'], mean)
    close(variables['batch_stats']['var'], var)


def test_running_statistics_are_the_mean_over_groups():
  (x,) = batches(1)
  ours = BatchNorm(group_size=2)
  variables = ours.init(jax.random.key(0), x, *SAME, False)
  _, updates = ours.apply(variables, x, *SAME, True, mutable=['batch_stats'])
  var = np.mean([x[:2].var((0, 1, 2), ddof=1), x[2:].var((0, 1, 2), ddof=1)], 0)
  close(updates['batch_stats']['var'], 0.9 + 0.1 * var)


def test_batch_norm_statistics_stay_float32():
  ours = BatchNorm()
  x = batches(1)[0].astype(jnp.bfloat16)
  variables = ours.init(jax.random.key(0), x, *SAME, False)
  y, updates = ours.apply(variables, x, *SAME, True, mutable=['batch_stats'])
  assert y.dtype == ours.apply(variables, x, *SAME, False).dtype == jnp.bfloat16
  assert {a.dtype for a in jax.tree.leaves((variables, updates))} == {jnp.dtype(jnp.float32)}


def test_layer_norm():
  (x,) = batches(1)
  x += 1000  # a mean that the difference of two squares would drown in
  layer = LayerNorm()
  y = layer.apply(layer.init(jax.random.key(0), x), x)
  values = x.astype(np.float64)
  expected = (values - values.mean(-1, keepdims=True)) / np.sqrt(
    values.var(-1, keepdims=True) + 1e-5
  )
  close(y, expected, 1e-4)


def test_layer_norm_epsilon():
  x = np.float32([[0, 2e-3]])  # with a variance of 1e-6, below epsilon
  layer = LayerNorm()
  y = layer.apply(layer.init(jax.random.key(0), x), x)
  np.testing.assert_allclose(y, np.float32([[-1e-3, 1e-3]]) / np.sqrt(1e-6 + 1e-5), rtol=1e-5)


def test_depthwise_conv_is_a_grouped_convolution():
  (x,) = batches(1, (2, 7, 6, 4))
  layer = DepthwiseConv(3, 2, 1)
  variables = layer.init(jax.random.key(0), x)
  kernel = variables['params']['kernel']
  assert (kernel.shape, kernel.dtype) == ((3, 3, 1, 4), jnp.float32)
  assert 0.25 < np.abs(kernel).max() <= 1 / 3
  expected = lax.conv_general_dilated(
    x, kernel, (2, 2), [(1, 1), (1, 1)], None, None, ('NHWC', 'HWIO', 'NHWC'), 4
  )
  close(layer.apply(variables, x), expected)


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_activations_against_pytorch(name, peer):
  torch = peer('torch')
  x = torch.linspace(-6, 6, 101)
  expected = {
    'quick_gelu': x * torch.sigmoid(1.702 * x),
    'gelu': torch.nn.GELU()(x),
    'gelu_tanh': torch.nn.GELU(approximate='tanh')(x),
  }[name]
  np.testing.assert_allclose(ACTIVATIONS[name](x.numpy()), expected.numpy(), rtol=1e-5, atol=1e-6)


def test_the_two_gelus_differ_as_much_as_they_should():
  x = np.float32([-2.2704, 2.2704])
  difference = np.abs(ACTIVATIONS['gelu'](x) - ACTIVATIONS['quick_gelu'](x))
  np.testing.assert_allclose(difference, 0.02033, atol=1e-5)


def test_drop_path_drops_whole_images_and_keeps_the_expectation():
  x = np.random.default_rng(0).uniform(1, 2, (4000, 2, 3)).astype(np.float32)
  y = DropPath(0.25).apply({}, x, True, rngs={'dropout': jax.random.key(0)})
  kept = np.any(y != 0, axis=(1, 2))
  np.testing.assert_array_equal(y[~kept], 0)
  np.testing.assert_allclose(y[kept], x[kept] / 0.75, rtol=1e-6)
  assert abs(kept.mean() - 0.75) < 4 * (0.75 * 0.25 / 4000) ** 0.5


@pytest.mark.parametrize(('rate', 'train'), [(0.25, False), (0.0, True)])
def test_drop_path_off(rate, train):
  (x,) = batches(1, (4, 2, 3))
  np.testing.assert_array_equal(DropPath(rate).apply({}, x, train), x)  # and asks for no key


@pytest.mark.parametrize('fan_in', [9, 147, 1728])
def test_uniform_init(fan_in):
  values = uniform_init(fan_in)(jax.random.key(0), (100, 100))
  bound = fan_in**-0.5
  assert 0.999 * bound < np.abs(values).max() <= bound
  assert abs(np.std(values) / (bound / 3**0.5) - 1) < 0.02


def test_dense_init_is_not_cut_at_two_standard_deviations():
  values = dense_init(jax.random.key(0), (200, 200), jnp.float32)
  assert abs(np.std(values) / 0.02 - 1) < 4 / (2 * values.size) ** 0.5
  share = np.mean(np.abs(values) > 0.04)
  assert abs(share - 0.0455) < 0.005  # what a normal distribution has there
