"""Batch normalisation over groups and a linear layer after it, by their definitions in float64."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvt_flax.ops.batch_norm import project, project_groups

EPSILON = 1e-5


def inputs(b=6, h=3, w=2, c=4, features=5):
  """Returns the maps, and scale, shift, kernel and bias."""
  rng = np.random.default_rng(0)
  x = rng.normal(rng.normal(size=c), rng.uniform(0.5, 2, size=c), size=(b, h, w, c))
  shapes = c, c, (c, features), features
  return tuple(a.astype(np.float32) for a in (x, *(rng.normal(size=s) for s in shapes)))


def by_hand(x, scale, shift, kernel, bias, size, g):
  """Returns (y, mean, var, and the gradients of sum(g y) for all five), a batch norm by itself."""
  y, means, variances, dx = np.empty(g.shape), [], [], np.empty(x.shape)
  dscale, dshift, dkernel = 0, 0, 0
  for first in range(0, len(x), size):
    group = slice(first, first + size)
    values = x[group].astype(np.float64)
    n = values[..., 0].size
    mean, var = values.mean((0, 1, 2)), values.var((0, 1, 2))
    sigma = np.sqrt(var + EPSILON)
    normal = (values - mean) / sigma
    normalised = normal * scale + shift
    y[group] = normalised @ kernel + bias
    means.append(mean)
    variances.append(values.var((0, 1, 2), ddof=1))
    through = g[group] @ kernel.T.astype(np.float64)
    weighted = through * scale
    dx[group] = (
      weighted - weighted.sum((0, 1, 2)) / n - normal * (weighted * normal).sum((0, 1, 2)) / n
    ) / sigma
    dscale += (through * normal).sum((0, 1, 2))
    dshift += through.sum((0, 1, 2))
    dkernel += np.einsum('nhwc,nhwf->cf', normalised, g[group])
  statistics = np.mean(means, 0), np.mean(variances, 0)
  return y, *statistics, dx, dscale, dshift, dkernel, g.sum((0, 1, 2), np.float64)


def close(actual, expected):
  assert actual.shape == expected.shape
  assert actual.dtype == jnp.float32
  assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


def gradient_of_result(b=6, h=3, w=2, features=5):
  return np.random.default_rng(1).normal(size=(b, h, w, features)).astype(np.float32)


@pytest.mark.parametrize(('b', 'size'), [(6, 1), (6, 2), (6, 3), (6, 6), (1, 1)])
def test_values_statistics_and_gradients(b, size):
  g = gradient_of_result(b)

  @jax.jit
  def ours(g, *values):
    def f(*values):
      y, mean, var = project_groups(*values, size, EPSILON)
      return y, (mean, var)

    y, pullback, (mean, var) = jax.vjp(f, *values, has_aux=True)
    return y, mean, var, *pullback(g)

  for actual, expected in zip(ours(g, *inputs(b)), by_hand(*inputs(b), size, g), strict=True):
    close(actual, expected)


def test_no_group_size_is_the_whole_batch():
  jax.tree.map(
    np.testing.assert_array_equal,
    project_groups(*inputs(), 0, EPSILON),
    project_groups(*inputs(), 6, EPSILON),
  )


def test_the_gradient_of_one_group_transposes_no_maps():
  x, *rest = inputs()
  gradient = jax.jit(jax.grad(lambda *a: jnp.sum(project_groups(*a, 0, EPSILON)[0] ** 2), range(5)))
  compiled = re.sub('metadata={.*?}', '', gradient.lower(x, *rest).compile().as_text())
  rows = math.prod(x.shape[:3])
  assert 'dot(' in compiled and f'[4,{rows}]' not in compiled and f'[5,{rows}]' not in compiled


def test_a_group_does_not_see_the_others():
  x, *rest = inputs()
  other = np.concatenate([x[:2], 10 * x[2:]])
  first, second = (project_groups(a, *rest, 2, EPSILON)[0] for a in (x, other))
  np.testing.assert_array_equal(first[:2], second[:2])


@pytest.mark.parametrize(('b', 'h', 'w', 'size'), [(2, 1, 1, 0), (4, 3, 2, 0), (4, 2, 2, 2)])
def test_running_variance_is_n_over_n_minus_1_exactly(b, h, w, size):
  # Half of the values are 1, half are -1: mean 0, biased variance 1, both without rounding.
  signs = np.resize(np.array([1, -1], np.float32), (b, h, w, 1))
  one, zero = jnp.ones(1), jnp.zeros(1)
  y, mean, var = project_groups(signs, one, zero, one[None], zero, size, 0.0)
  n = (size or b) * h * w
  assert mean.item() == 0
  assert var.item() == np.float32(n / (n - 1))
  np.testing.assert_array_equal(y, signs)  # normalised by the biased variance


def test_a_large_mean_costs_no_digits():
  x, *rest = inputs()
  # Steps of 2^-10 stay exact at 2^12, so the shifted maps have the very same differences.
  x = np.round(x * 1024) / 1024
  expected = by_hand(x, *rest, 6, gradient_of_result())[0]
  y, _, _ = project_groups(x + np.float32(4096), *rest, 6, EPSILON)
  assert np.abs(y - expected).max() <= 1e-3 * np.abs(expected).max()


def test_bfloat16_maps_have_float32_statistics():
  x, *rest = inputs()
  x = jnp.asarray(x, jnp.bfloat16)
  wide, *expected = project_groups(x.astype(jnp.float32), *rest, 2, EPSILON)
  y, *statistics = project_groups(x, *rest, 2, EPSILON)
  jax.tree.map(close, statistics, expected)
  assert y.dtype == jnp.bfloat16
  # The kernel is rounded, and the result; c = 4 terms.
  assert np.abs(y - wide).max() <= 4 * 2**-8 * np.abs(wide).max()


@pytest.mark.parametrize('mean', [8, 64])
def test_a_large_mean_of_bfloat16_maps(mean):
  """The mean is taken away with the very kernel that it went through: only rounding x counts."""
  x, *rest = inputs(b=64)
  x = (x + np.float32(mean)).astype(jnp.bfloat16)
  y, _, var = project_groups(x, *rest, 0, EPSILON)
  wide, _, expected = project_groups(x.astype(np.float32), *rest, 0, EPSILON)
  assert np.abs(var / expected - 1).max() <= mean**2 * 2**-22
  assert np.abs(y - wide).max() <= 4 * 2**-8 * np.abs(wide).max()


def test_bfloat16_gradients_are_summed_in_float32():
  x, *rest = inputs()
  x, g = (jnp.asarray(a, jnp.bfloat16) for a in (x, gradient_of_result()))
  pullback = jax.vjp(lambda *a: project_groups(*a, 2, EPSILON)[0], x, *rest)[1]
  dx, *others = pullback(g)
  _, _, _, *expected = by_hand(np.asarray(x, np.float32), *rest, 2, np.asarray(g, np.float32))
  assert dx.dtype == jnp.bfloat16
  assert np.abs(dx - expected[0]).max() <= 4 * 2**-8 * np.abs(expected[0]).max()
  jax.tree.map(close, others, expected[1:])


def test_statistics_pass_on_no_gradient():
  gradients = jax.grad(
    lambda *a: sum(jnp.sum(s**2) for s in project_groups(*a, 2, EPSILON)[1:]), range(5)
  )(*inputs())
  assert not any(np.any(g) for g in gradients)


def test_given_statistics():
  x, scale, shift, kernel, bias = inputs()
  mean, var = np.float32([0.5, -1, 0, 2]), np.float32([1, 0.25, 4, 9])
  normalised = (x - mean.astype(np.float64)) / np.sqrt(var + EPSILON) * scale + shift
  close(project(x, mean, var, scale, shift, kernel, bias, EPSILON), normalised @ kernel + bias)


def test_groups_that_do_not_divide_the_batch():
  with pytest.raises(ValueError, match='bn_group_size=4 does not divide the batch of 6 images'):
    project_groups(*inputs(), 4, EPSILON)


@pytest.mark.parametrize(('b', 'size'), [(1, 0), (3, 1)])
def test_a_single_value_has_no_variance(b, size):
  with pytest.raises(ValueError, match='a single value has no variance'):
    project_groups(*inputs(b, 1, 1), size, EPSILON)
