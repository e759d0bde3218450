"""Learnt positions are resized, and nothing else."""

import jax
import numpy as np
import pytest
from flax.core import freeze, unfreeze

from cvt_flax import CvT, create_model, resize_positions
from tests.models.test_cvt import TINY
from tests.models.torch_weights import draw, drawn_variables, quick_jit

CVIT = create_model('cvit', 5, width=8, heads=2)  # a class token and 8x8 patches of 32x32 pixels
CCT = create_model('cct-2/3x2', 5)  # 8x8 tokens


@pytest.mark.parametrize('model', [CVIT, CCT], ids=['cvit', 'cct'])
def test_a_map_is_resized_as_a_picture(model):
  """A ramp from left to right stays one, but for its ends; the class token keeps its own."""
  variables = drawn_variables(model)
  table = np.array(variables['params']['pos_embed'])
  table[0, -64:] = np.tile(np.arange(8, dtype=np.float32), 8)[:, None]
  variables['params']['pos_embed'] = table
  other, new = resize_positions(model, variables, 64)
  assert other == model.clone(image_size=64)
  images = draw('images', (2, 64, 64, 3))
  expected = jax.eval_shape(other.init, jax.random.key(0), images)['params']
  assert jax.tree.map(np.shape, new['params']) == jax.tree.map(np.shape, expected)
  assert np.isfinite(quick_jit(other.apply)(new, images)).all()
  resized = new['params'].pop('pos_embed')[0]
  rows = np.asarray(resized[-256:]).reshape(16, 16, -1)
  places = (np.arange(16) + 0.5) / 2 - 0.5
  inner = slice(4, -4)
  np.testing.assert_allclose(
    rows[:, inner], np.broadcast_to(places[inner, None], rows[:, inner].shape), atol=1e-5
  )
  np.testing.assert_array_equal(resized[:-256], table[0, :-64])
  assert variables['params'].pop('pos_embed') is table  # not changed
  jax.tree.map(np.testing.assert_array_equal, new, dict(variables))


def test_the_same_size_changes_nothing():
  variables = drawn_variables(CVIT)
  other, new = resize_positions(CVIT, freeze(variables), 32)
  assert other == CVIT
  jax.tree.map(np.testing.assert_array_equal, unfreeze(new), dict(variables))


@pytest.mark.parametrize('model', [CvT(**TINY), CVIT.clone(position='sine')], ids=['cvt', 'sine'])
def test_what_takes_any_size_is_left_as_it_is(model):
  variables = drawn_variables(model)
  other, new = resize_positions(model, variables, 64)
  assert other is model and new == dict(variables)


def test_a_size_that_patches_do_not_divide():
  with pytest.raises(ValueError, match='34'):
    resize_positions(CVIT, drawn_variables(CVIT), 34)
