"""Learnt positions are resized, and nothing else."""

import jax
import numpy as np
import pytest

from cvt_flax import create_model, resize_positions
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


@pytest.mark.parametrize('model', [CVIT, CVIT.clone(position='sine')], ids=['learnt', 'sine'])
def test_what_is_kept(model):
  variables = drawn_variables(model)
  size = 64 if model.position == 'sine' else 32
  other, new = resize_positions(model, variables, size)
  assert other.image_size == size
  jax.tree.map(np.testing.assert_array_equal, new, dict(variables))


def test_a_size_that_patches_do_not_divide():
  with pytest.raises(ValueError, match='34'):
    resize_positions(CVIT, drawn_variables(CVIT), 34)
