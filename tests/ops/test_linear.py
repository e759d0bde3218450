"""A linear layer's product and its gradient, against NumPy in float64."""

import jax
import numpy as np
import pytest

from cvt_flax.ops.linear import apart, linear, merged


def inputs(rows, c=5, features=7):
  rng = np.random.default_rng(0)
  shapes = (*rows, c), (c, features), (*rows, features)
  return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def kernel_gradient(x, g):
  x, g = (a.astype(np.float64).reshape(-1, a.shape[-1]) for a in (x, g))
  return x.T @ g


def close(actual, expected):
  assert actual.shape == expected.shape
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('rows', [(), (1,), (6,), (2, 9), (2, 3, 4)])
def test_value_and_gradients(rows):
  x, kernel, g = inputs(rows)

  @jax.jit
  def ours(x, kernel, g):
    y, pullback = jax.vjp(linear, x, kernel)
    return y, *pullback(g)

  y, dx, dkernel = ours(x, kernel, g)
  close(y, x.astype(np.float64) @ kernel)
  close(dx, g.astype(np.float64) @ kernel.T)
  close(dkernel, kernel_gradient(x, g))


@pytest.mark.parametrize('form', [merged, apart])
@pytest.mark.parametrize('rows', [(), (1,), (6,), (2, 9), (2, 3, 4)])
def test_both_forms_of_the_gradient(rows, form):
  x, _, g = inputs(rows)
  close(form(x, g), kernel_gradient(x, g))


def test_rows_are_merged_on_cpu_alone():
  x, kernel, g = inputs((2, 9))
  step = jax.jit(lambda x, kernel, g: jax.vjp(linear, x, kernel)[1](g)).trace(x, kernel, g)
  texts = {p: step.lower(lowering_platforms=(p,)).as_text() for p in ('cpu', 'tpu', 'cuda')}
  assert {p: 'tensor<18x5xf32>' in text for p, text in texts.items()} == {
    'cpu': True,
    'tpu': False,
    'cuda': False,
  }
