"""A linear layer's product and its gradient, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvt_flax.ops.linear import apart, apart_in_tiles, in_tiles, linear, merged


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


def test_hessian_vector_products():
  """Forward over reverse mode, which takes no custom gradient inside of the gradient."""
  x, kernel, v = inputs((2, 9))[0], *(inputs((2, 9))[1] * scale for scale in (1, 0.5))

  def loss(kernel):
    return jnp.sum(jnp.sin(linear(x, kernel)))

  def plain(kernel):
    return jnp.sum(jnp.sin(x @ kernel))

  def product(f):
    return jax.jvp(jax.grad(f), (kernel,), (v,))[1]

  close(product(loss), product(plain))


ROWS = [(), (1,), (6,), (2, 9), (9, 9), (2, 16), (2, 3, 4)]


@pytest.mark.parametrize('rows', ROWS)
def test_the_product_in_tiles(rows):
  x, kernel, _ = inputs(rows)
  close(in_tiles(x, kernel), x.astype(np.float64) @ kernel)


@pytest.mark.parametrize('form', [merged, apart, apart_in_tiles])
@pytest.mark.parametrize('rows', ROWS)
def test_all_forms_of_the_gradient(rows, form):
  x, _, g = inputs(rows)
  close(form(x, g), kernel_gradient(x, g))


@pytest.mark.parametrize('form', [merged, apart, apart_in_tiles])
def test_gradients_of_bfloat16_are_summed_in_float32(form):
  x, g = (jnp.ones((4, 129, 2), jnp.bfloat16),) * 2
  np.testing.assert_array_equal(form(x, g), np.full((2, 2), 4 * 129, np.float32))


def test_an_odd_number_of_tokens_is_turned_on_tpu_alone():
  x, kernel, _ = inputs((2, 9))
  product = jax.jit(linear).trace(x, kernel)
  for platform, turned in {'cpu': False, 'tpu': True, 'cuda': False}.items():
    text = product.lower(lowering_platforms=(platform,)).as_text()
    assert ('tensor<9x2x7xf32>' in text) == turned, platform


def test_rows_are_merged_on_cpu_alone():
  x, kernel, g = inputs((2, 9))
  step = jax.jit(lambda x, kernel, g: jax.vjp(linear, x, kernel)[1](g)).trace(x, kernel, g)
  texts = {p: step.lower(lowering_platforms=(p,)).as_text() for p in ('cpu', 'tpu', 'cuda')}
  assert {p: 'tensor<18x5xf32>' in text for p, text in texts.items()} == {
    'cpu': True,
    'tpu': False,
    'cuda': False,
  }
