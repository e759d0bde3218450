"""Layer normalisation, in value and gradient, against its definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvt_flax.ops.layer_norm import layer_norm

EPSILON = 1e-5


def by_hand(x, scale, bias, g):
  """Returns y and the gradients of sum(g y) for x, scale and bias, by the chain of its steps."""
  x, g = x.astype(np.float64), g.astype(np.float64)
  n = x.shape[-1]
  centred = x - x.mean(-1, keepdims=True)
  var = np.square(centred).mean(-1, keepdims=True)
  sigma = np.sqrt(var + EPSILON)
  normal = centred / sigma
  dnormal = g * scale
  dvar = (dnormal * centred).sum(-1, keepdims=True) * -0.5 * sigma**-3
  dcentred = dnormal / sigma + dvar * 2 * centred / n
  dx = dcentred - dcentred.mean(-1, keepdims=True)
  rows = tuple(range(x.ndim - 1))
  return normal * scale + bias, dx, (g * normal).sum(rows), g.sum(rows)


def inputs(shape, dtype=np.float32):
  rng = np.random.default_rng(0)
  x = rng.normal(3, 2, shape).astype(dtype)
  scale, bias = rng.normal(size=(2, shape[-1])).astype(np.float32)
  return x, scale, bias, rng.normal(size=shape).astype(np.float32)


@jax.jit
def ours(x, scale, bias, g):
  y, pullback = jax.vjp(lambda *a: layer_norm(*a, EPSILON, g.dtype), x, scale, bias)
  return y, *pullback(g)


@pytest.mark.parametrize('shape', [(2, 9, 48), (1, 1, 5), (3, 4, 5, 7), (6, 3), (8, 384)])
def test_values_and_gradients(shape):
  values = inputs(shape)
  for actual, expected in zip(ours(*values), by_hand(*values), strict=True):
    assert (actual.shape, actual.dtype) == (expected.shape, jnp.float32)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_a_row_without_variance():
  """A constant row is its bias, and its gradient is finite."""
  x, scale, bias, g = inputs((2, 6))
  x[0] = 5
  y, dx, *_ = ours(x, scale, bias, g)
  np.testing.assert_allclose(y[0], bias, atol=1e-6)
  np.testing.assert_allclose(dx, by_hand(x, scale, bias, g)[1], rtol=1e-4, atol=1e-4)


def test_dtypes():
  """All is computed in float32, whatever comes and goes; rows and their gradient share a dtype."""
  x, scale, bias, g = inputs((4, 16))
  x, g = jnp.asarray(x, jnp.bfloat16), jnp.asarray(g, jnp.bfloat16)
  actual = ours(x, scale, bias, g)
  assert [a.dtype for a in actual] == [jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32]
  expected = by_hand(np.asarray(x, np.float32), scale, bias, np.asarray(g, np.float32))
  for a, e, digits in zip(actual, expected, (2**-8, 2**-8, 1e-5, 1e-5), strict=True):
    np.testing.assert_allclose(a.astype(np.float32), e, rtol=digits, atol=1e-5 * np.abs(e).max())


@pytest.mark.parametrize('mean', [8, 64])
def test_a_large_mean_of_bfloat16_rows(mean):
  """The variance is the difference of two means, which is exact enough for what x still says."""
  x, scale, bias, _ = inputs((64, 48))
  x = jnp.asarray(x + np.float32(mean), jnp.bfloat16)
  y = layer_norm(x, scale, bias, EPSILON)
  expected = by_hand(np.asarray(x, np.float32), scale, bias, np.zeros(x.shape))[0]
  np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-3)
