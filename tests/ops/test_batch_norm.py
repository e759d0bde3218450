"""Batch normalisation over groups, against its definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvt_flax.ops.batch_norm import normalize, normalize_groups

EPSILON = 1e-5


def inputs(b=6, h=3, w=2, c=4):
  rng = np.random.default_rng(0)
  x = rng.normal(rng.normal(size=c), rng.uniform(0.5, 2, size=c), size=(b, h, w, c))
  return tuple(a.astype(np.float32) for a in (x, rng.normal(size=c), rng.normal(size=c)))


def by_hand(x, scale, bias, size, g):
  """Returns (y, mean, var, and the gradients of sum(g y) for x, scale and bias)."""
  y, means, variances, dx = np.empty(x.shape), [], [], np.empty(x.shape)
  dscale, dbias = 0, 0
  for first in range(0, len(x), size):
    group = slice(first, first + size)
    values = x[group].astype(np.float64)
    n = values[..., 0].size
    mean, var = values.mean((0, 1, 2)), values.var((0, 1, 2))
    sigma = np.sqrt(var + EPSILON)
    normal = (values - mean) / sigma
    y[group] = normal * scale + bias
    means.append(mean)
    variances.append(values.var((0, 1, 2), ddof=1))
    weighted = g[group] * scale
    dx[group] = (
      weighted - weighted.sum((0, 1, 2)) / n - normal * (weighted * normal).sum((0, 1, 2)) / n
    ) / sigma
    dscale += (g[group] * normal).sum((0, 1, 2))
    dbias += g[group].sum((0, 1, 2))
  return y, np.mean(means, 0), np.mean(variances, 0), dx, dscale, dbias


def close(actual, expected):
  assert actual.shape == expected.shape
  assert actual.dtype == jnp.float32
  assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize('size', [1, 2, 3, 6])
def test_values_statistics_and_gradients(size):
  x, scale, bias = inputs()
  g = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

  @jax.jit
  def ours(x, scale, bias, g):
    def f(x, scale, bias):
      y, mean, var = normalize_groups(x, scale, bias, size, EPSILON)
      return y, (mean, var)

    y, pullback, (mean, var) = jax.vjp(f, x, scale, bias, has_aux=True)
    return y, mean, var, *pullback(g)

  for actual, expected in zip(
    ours(x, scale, bias, g), by_hand(x, scale, bias, size, g), strict=True
  ):
    close(actual, expected)


def test_no_group_size_is_the_whole_batch():
  jax.tree.map(
    np.testing.assert_array_equal,
    normalize_groups(*inputs(), 0, EPSILON),
    normalize_groups(*inputs(), 6, EPSILON),
  )


def test_a_group_does_not_see_the_others():
  x, scale, bias = inputs()
  other = np.concatenate([x[:2], 10 * x[2:]])
  first, second = (normalize_groups(a, scale, bias, 2, EPSILON)[0] for a in (x, other))
  np.testing.assert_array_equal(first[:2], second[:2])


@pytest.mark.parametrize(('b', 'h', 'w', 'size'), [(2, 1, 1, 0), (4, 3, 2, 0), (4, 2, 2, 2)])
def test_running_variance_is_n_over_n_minus_1_exactly(b, h, w, size):
  # Half of the values are 1, half are -1: mean 0, biased variance 1, both without rounding.
  signs = np.resize(np.array([1, -1], np.float32), (b, h, w, 1))
  y, mean, var = normalize_groups(signs, jnp.ones(1), jnp.zeros(1), size, 0.0)
  n = (size or b) * h * w
  assert mean.item() == 0
  assert var.item() == np.float32(n / (n - 1))
  np.testing.assert_array_equal(y, signs)  # normalised by the biased variance


def test_a_large_mean_costs_no_digits():
  x, scale, bias = inputs()
  # Steps of 2^-10 stay exact at 2^12, so the shifted maps have the very same differences.
  x = np.round(x * 1024) / 1024
  expected = by_hand(x, scale, bias, 6, np.zeros_like(x))[0]
  y, _, _ = normalize_groups(x + np.float32(4096), scale, bias, 6, EPSILON)
  assert np.abs(y - expected).max() <= 1e-3 * np.abs(expected).max()


def test_bfloat16_maps_have_float32_statistics():
  x, scale, bias = inputs()
  x = jnp.asarray(x, jnp.bfloat16)
  wide = normalize_groups(x.astype(jnp.float32), scale, bias, 2, EPSILON)
  for actual, expected in zip(normalize_groups(x, scale, bias, 2, EPSILON), wide, strict=True):
    np.testing.assert_array_equal(actual, expected)
    assert actual.dtype == jnp.float32
  y, *statistics = normalize_groups(x, scale, bias, 2, EPSILON, jnp.bfloat16)
  np.testing.assert_array_equal(y, wide[0].astype(jnp.bfloat16))
  jax.tree.map(np.testing.assert_array_equal, statistics, list(wide[1:]))


def test_bfloat16_gradients_are_computed_in_float32():
  x, scale, bias = inputs()
  g = np.random.default_rng(1).normal(size=x.shape)
  x, g = (jnp.asarray(a, jnp.bfloat16) for a in (x, g))
  pullback = jax.vjp(lambda *a: normalize_groups(*a, 2, EPSILON, jnp.bfloat16)[0], x, scale, bias)[
    1
  ]
  dx, dscale, dbias = pullback(g)
  wide = (np.asarray(a, np.float32) for a in (x, scale, bias))
  _, _, _, *expected = by_hand(*wide, 2, np.asarray(g, np.float32))
  assert dx.dtype == jnp.bfloat16
  np.testing.assert_allclose(dx.astype(np.float32), expected[0], rtol=2**-8, atol=1e-5)
  close(dscale, expected[1])
  close(dbias, expected[2])


def test_statistics_pass_on_no_gradient():
  x, scale, bias = inputs()
  gradients = jax.grad(
    lambda *a: sum(jnp.sum(s**2) for s in normalize_groups(*a, 2, EPSILON)[1:]), (0, 1, 2)
  )(x, scale, bias)
  assert not any(np.any(g) for g in gradients)


def test_given_statistics():
  x, scale, bias = inputs()
  mean, var = np.float32([0.5, -1, 0, 2]), np.float32([1, 0.25, 4, 9])
  expected = (x - mean.astype(np.float64)) / np.sqrt(var + EPSILON) * scale + bias
  close(normalize(x, mean, var, scale, bias, EPSILON), expected)


def test_groups_that_do_not_divide_the_batch():
  with pytest.raises(ValueError, match='bn_group_size=4 does not divide the batch of 6 images'):
    normalize_groups(*inputs(), 4, EPSILON)


@pytest.mark.parametrize(('b', 'size'), [(1, 0), (3, 1)])
def test_a_single_value_has_no_variance(b, size):
  with pytest.raises(ValueError, match='a single value has no variance'):
    normalize_groups(*inputs(b, 1, 1), size, EPSILON)
