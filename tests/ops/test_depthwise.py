"""The two forms of the depthwise convolution: equal, and each on its platform."""

import functools
import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvt_flax.ops.depthwise import convolved, depthwise_conv, shifted, shifted_gradient

# (height, width), channels, kernel, stride, padding: every value of each, in drawn combinations.
GRID = itertools.product(
  [(7, 7), (8, 8), (5, 8), (10, 3)], range(1, 8), [1, 3, 5], [1, 2, 3], [0, 1, 2]
)
FITTING = [case for case in GRID if min(case[0]) + 2 * case[4] >= case[2]]
CASES = [
  *random.Random(0).sample(FITTING, 16),
  ((8, 8), 4, 3, 1, 1),  # the queries' of CvT
  ((7, 8), 4, 3, 2, 1),  # the keys' and values'
  ((6, 6), 2, 1, 3, 2),  # windows that see nothing but padding, pixels that no window sees
  ((3, 3), 1, 3, 1, 0),  # a single window
]


def inputs(size, channels, kernel, dtype=np.float32):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, *size, channels)).astype(dtype)
  return x, rng.normal(size=(kernel, kernel, 1, channels)).astype(dtype)


def by_hand(x, kernel, stride, padding):
  """The definition, in float64: a window and a sum for each pixel of the result."""
  x = np.pad(x.astype(np.float64), ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
  size = len(kernel)
  rows, columns = ((n - size) // stride + 1 for n in x.shape[1:3])
  y = np.empty((len(x), rows, columns, x.shape[-1]))
  for i, j in itertools.product(range(rows), range(columns)):
    window = x[:, i * stride : i * stride + size, j * stride : j * stride + size]
    y[:, i, j] = (window * kernel[:, :, 0]).sum((1, 2))
  return y


def close(actual, expected):
  assert actual.shape == expected.shape
  assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


def test_cases_cover_every_value():
  for drawn, all_values in zip(zip(*CASES, strict=True), zip(*FITTING, strict=True), strict=True):
    assert set(drawn) >= set(all_values)


@pytest.mark.parametrize('batch', [1, 2])
@pytest.mark.parametrize(('size', 'channels', 'kernel', 'stride', 'padding'), CASES)
def test_forms_agree(size, channels, kernel, stride, padding, batch):
  x, k = inputs(size, channels, kernel)
  x = x[:batch]
  expected = by_hand(x, k, stride, padding)
  g = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
  geometry = dict(stride=stride, padding=padding)

  @jax.jit
  def both(x, k, g):
    y, pullback = jax.vjp(functools.partial(convolved, **geometry), x, k)
    return (
      (y, *pullback(g)),
      (shifted(x, k, **geometry), *shifted_gradient(x, k, g, **geometry)),
    )

  convolution, shifts = both(x, k, g)
  close(shifts[0], expected)
  for actual, reference in zip(shifts, convolution, strict=True):
    close(actual, reference)


@pytest.mark.parametrize('stride', [1, 2])
def test_public_op_differentiates_as_the_convolution(stride):
  x, k = inputs((6, 7), 3, 3)

  def loss(f):
    return lambda x, k: jnp.sum(jnp.sin(f(x, k)))

  public = loss(lambda x, k: depthwise_conv(x, k, stride, 1))
  plain = loss(functools.partial(convolved, stride=stride, padding=1))
  actual = jax.jit(jax.value_and_grad(public, (0, 1)))(x, k)
  expected = jax.jit(jax.value_and_grad(plain, (0, 1)))(x, k)
  jax.tree.map(close, actual, expected)
  jax.tree.map(close, jax.grad(public, (0, 1))(x, k), expected[1])  # without jit too


def test_public_op_keeps_bfloat16():
  x, k = (jnp.asarray(a, jnp.bfloat16) for a in inputs((6, 6), 4, 3))
  y, pullback = jax.vjp(lambda x, k: depthwise_conv(x, k, 1, 1), x, k)
  assert {a.dtype for a in (y, *pullback(y))} == {jnp.dtype(jnp.bfloat16)}
  expected = by_hand(np.asarray(x, np.float32), np.asarray(k, np.float32), 1, 1)
  assert np.abs(y - expected).max() <= 0.02 * np.abs(expected).max()


def forward(x, k):
  return depthwise_conv(x, k, 1, 1)


def gradient(x, k):
  return jax.grad(lambda x, k: jnp.sum(jnp.square(forward(x, k))), (0, 1))(x, k)


@pytest.mark.parametrize('f', [forward, gradient])
def test_compiled_for_cpu_has_no_convolution(f):
  def convolves(f):
    text = jax.jit(f).lower(*inputs((6, 6), 4, 3)).compile().as_text()
    return ' convolution(' in text

  assert not convolves(f)
  assert convolves(functools.partial(convolved, stride=1, padding=1))


@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
@pytest.mark.parametrize('f', [forward, gradient])
def test_lowered_for_an_accelerator_is_a_convolution(f, platform):
  # This machine has none: what counts is the platform that is compiled for.
  lowered = jax.jit(f).trace(*inputs((6, 6), 4, 3)).lower(lowering_platforms=(platform,))
  assert 'stablehlo.convolution' in lowered.as_text()
