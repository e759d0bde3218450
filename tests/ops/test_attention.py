"""Attention, against the formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import einsum

from cvt_flax.ops.attention import at_once, attention, image_by_image


def inputs(b=2, t=5, s=7, h=3, d=4):
  rng = np.random.default_rng(0)
  return [rng.normal(size=(b, n, h, d)).astype(np.float32) for n in (t, s, s)]


def softmax(scores):
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True)


def by_hand(q, k, v, scale, g, mask=1.0):
  """Returns the result and the gradients of sum(g result) for q, k and v; mask on the weights."""
  q, k, v, g = (x.astype(np.float64) for x in (q, k, v, g))
  p = softmax(scale * einsum(q, k, 'b t h d, b s h d -> b h t s'))
  result = einsum(p * mask, v, 'b h t s, b s h d -> b t h d')
  dp = einsum(g, v, 'b t h d, b s h d -> b h t s') * mask
  dscores = p * (dp - (dp * p).sum(-1, keepdims=True))
  return (
    result,
    scale * einsum(dscores, k, 'b h t s, b s h d -> b t h d'),
    scale * einsum(dscores, q, 'b h t s, b t h d -> b s h d'),
    einsum(p * mask, g, 'b h t s, b t h d -> b s h d'),
  )


def close(actual, expected):
  assert actual.shape == expected.shape
  assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize('dropped', [False, True])
@pytest.mark.parametrize('scale', [0.125, 3.0])
@pytest.mark.parametrize('sizes', [dict(), dict(b=1, t=1, s=2, h=1, d=1), dict(t=9, s=3)])
def test_value_and_gradients(sizes, scale, dropped):
  q, k, v = inputs(**sizes)
  rng = np.random.default_rng(1)
  g = rng.normal(size=q.shape).astype(np.float32)
  b, t, h, _ = q.shape
  # Dropout with rate 1/4: zeros, and what is left larger.
  mask = (rng.random((b, h, t, k.shape[1])) < 0.75) / np.float32(0.75) if dropped else 1.0

  @jax.jit
  def ours(q, k, v):
    dropout = (lambda weights: weights * mask) if dropped else None
    result, pullback = jax.vjp(lambda *x: attention(*x, scale, dropout), q, k, v)
    return result, *pullback(g)

  for actual, expected in zip(ours(q, k, v), by_hand(q, k, v, scale, g, mask), strict=True):
    close(actual, expected)


@pytest.mark.parametrize('sizes', [dict(b=5), dict(b=1, t=1, s=2, h=1, d=1), dict(b=5, t=9, s=3)])
def test_image_by_image(sizes):
  q, k, v = inputs(**sizes)
  g = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)

  @jax.jit
  def ours(q, k, v):
    result, pullback = jax.vjp(lambda *x: image_by_image(*x, scale=0.5), q, k, v)
    return result, *pullback(g)

  for actual, expected in zip(ours(q, k, v), by_hand(q, k, v, 0.5, g), strict=True):
    close(actual, expected)


def test_large_images_on_cpu_are_computed_one_by_one():
  b, t, s = 2, 700, 500
  q, k, v = inputs(b, t, s)
  step = jax.jit(jax.grad(lambda *x: attention(*x, 0.5).sum(), (0, 1, 2)))
  compiled = step.lower(q, k, v).compile().as_text()
  assert f'[1,3,{t},{s}]' in compiled and f'[{b},3,{t},{s}]' not in compiled
  for_tpu = step.trace(q, k, v).lower(lowering_platforms=('tpu',)).as_text()
  assert 'while' not in for_tpu and f'{b}x3x{t}x{s}' in for_tpu
  for actual, expected in zip(
    step(q, k, v),
    jax.grad(lambda *x: at_once(*x, scale=0.5).sum(), (0, 1, 2))(q, k, v),
    strict=True,
  ):
    assert np.abs(actual - expected).max() <= 1e-5 * np.abs(expected).max() + 1e-6


def test_dropout_keeps_the_expectation():
  q, k, v = inputs()

  b, t, h, _ = q.shape
  masks = np.random.default_rng(1).random((2000, b, h, t, k.shape[1])) < 0.75

  @jax.jit
  @jax.vmap
  def draw(mask):
    return attention(q, k, v, 0.5, lambda weights: weights * mask / 0.75)

  draws = draw(masks)
  error = np.std(draws, axis=0) / 2000**0.5
  assert np.all(np.abs(np.mean(draws, axis=0) - attention(q, k, v, 0.5)) <= 5 * error)


def test_a_single_key_has_all_the_weight():
  q, k, v = inputs(s=1)
  np.testing.assert_allclose(attention(q, k, v, 1.0), np.broadcast_to(v, q.shape), rtol=1e-6)


def test_large_scores_do_not_overflow():
  q, k, v = inputs()
  result, pullback = jax.vjp(lambda *x: attention(*x, 1e4), q, k, v)
  best = np.argmax(einsum(q, k, 'b t h d, b s h d -> b t h s'), axis=-1)
  expected = np.take_along_axis(v, best[..., None], axis=1)
  np.testing.assert_allclose(result, expected, rtol=1e-5)
  assert all(np.isfinite(x).all() for x in pullback(result))


def test_bfloat16_inputs_have_float32_scores():
  # The scores are 256 and 257. bfloat16 has no 257; taking 256 for it makes the weights equal.
  q = jnp.full((1, 1, 1, 2), 1, jnp.bfloat16)
  k = jnp.array([[256, 0], [256, 1]], jnp.bfloat16).reshape(1, 2, 1, 2)
  v = jnp.array([[0, 1], [1, 1]], jnp.bfloat16).reshape(1, 2, 1, 2)
  result = attention(q, k, v, 1.0)
  assert result.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    result[0, 0, 0].astype(jnp.float32), [1 / (1 + np.exp(-1)), 1], rtol=2**-8
  )
