"""Attention over images: what its colours say."""

import dataclasses

import jax
import matplotlib
import numpy as np
import pytest

from cvt_flax import create_model
from cvt_flax.ops.pixels import normalize_pixels
from cvt_flax.report import pictures
from cvt_flax.weights import pretrained
from cvt_flax.weights.description import Description
from cvt_flax.weights.preprocessing import Preprocessing
from tests.models.torch_weights import drawn_variables

KEYS = 4
GREY = np.full((32, 32, 3), 128, np.uint8)


def over(heat, pixels=GREY):
  return pictures.tiles(pixels, [np.asarray(heat, np.float32)])[1].astype(int)


def uniform():
  return np.ones((KEYS, KEYS), np.float32)


def peaked(times):
  """One key with so many times the uniform share, the others with the rest alike."""
  heat = np.full((KEYS, KEYS), (KEYS**2 - times) / (KEYS**2 - 1), np.float32)
  heat[1, 2] = times
  return heat


def test_uniform_attention_is_the_picture_evenly_darker():
  pixels = np.random.default_rng(0).integers(0, 256, (160, 160, 3), np.uint8)
  pixels[...] = pixels[..., :1]  # grey
  found = over(uniform(), pixels)
  assert np.abs(found - 0.4 * pixels).max() <= 3
  assert np.ptp(over(uniform())) <= 3  # no hue
  assert pictures.largest(uniform()) == 'largest 1.0×'


@pytest.mark.parametrize('times', [1.5, 2.0, 15.0])
def test_a_peak_is_brightest_where_it_is(times):
  brightness = over(peaked(times)).sum(-1)
  row, column = np.unravel_index(brightness.argmax(), brightness.shape)
  side = brightness.shape[0] // KEYS
  assert (row // side, column // side) == (1, 2)
  assert pictures.largest(peaked(times)) == f'largest {times:.1f}×'
  full = 0.4 * 128 * 3 + 0.6 * 255 * sum(matplotlib.colormaps['inferno'](1.0)[:3])
  assert (brightness.max() > 0.95 * full) == (times >= 2)


def test_next_to_uniform_attention_looks_next_to_even():
  assert np.abs(over(peaked(1.02)) - over(uniform())).max() < 10
  assert np.abs(over(peaked(1.5)) - over(uniform())).max() > 50


def test_uniform_is_one_with_the_class_tokens_own_key_too():
  weights = pretrained.load('cvt-nano-cifar10')
  zeros = jax.tree.map(np.zeros_like, weights.variables)  # all scores are alike
  found = pictures.attended(
    dataclasses.replace(weights, variables=zeros), np.zeros((1, 32, 32, 3), np.uint8)
  )
  assert [(a.stage, a.size) for a in found][1:] == [
    ('stage 2', '4×4 keys'),
    ('stage 3', '4×4 keys'),
  ]
  assert [a.of for a in found][1:] == ['mean of all queries', 'class token']
  for attention in found:
    assert not attention.single
    np.testing.assert_allclose(attention.maps, np.ones_like(attention.maps), rtol=1e-5)


def test_sequence_pooling_is_shown_too():
  model = create_model('mcvit', 10)
  zeros = jax.tree.map(np.zeros_like, drawn_variables(model))  # all tokens weigh the same
  weights = pretrained.Weights(Description(model, (), Preprocessing(32)), zeros, 'flax', 'zeros')
  found = pictures.attended(weights, np.zeros((2, 32, 32, 3), np.uint8))
  assert [(a.stage, a.size, a.of) for a in found] == [
    ('stage 1', '8×8 keys', 'mean of all queries'),
    ('pooling', '8×8 keys', 'weight of each token'),
  ]
  for attention in found:
    np.testing.assert_allclose(attention.maps, np.ones((2, 8, 8)), rtol=1e-5)
  # And where they do not: the token with the highest score is where the picture is brightest.
  variables = drawn_variables(model)
  images = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
  _, pooling = pictures.attended(dataclasses.replace(weights, variables=variables), images)
  steps = weights.description.preprocessing
  batch = normalize_pixels(images, steps.mean, steps.std)
  _, sown = model.apply(variables, batch, mutable=['intermediates'])
  (expected,) = jax.tree.leaves(sown['intermediates']['seq_pool'])
  np.testing.assert_allclose(pooling.maps.ravel(), 64 * np.ravel(expected), rtol=1e-4)


def test_no_attention_is_no_division_by_zero():
  with np.errstate(all='raise'):
    assert np.array_equal(over(np.zeros((KEYS, KEYS))), over(uniform()))
