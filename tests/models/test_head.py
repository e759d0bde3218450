"""A head is replaced, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cvt_flax import CvT, create_model, load_pretrained, replace_head, save_pretrained
from tests.models.test_cvt import TINY
from tests.models.torch_weights import draw, drawn_variables, quick_jit

MODELS = {
  'cvt': CvT(**TINY),
  'mcvit': create_model('mcvit', 5, image_size=16, width=8, heads=2),
}


def images(model):
  size = getattr(model, 'image_size', 32)
  return draw('images', (2, size, size, 3))


def kinds(variables):
  return {path: (x.shape, x.dtype) for path, x in flatten_dict(variables).items()}


@pytest.mark.parametrize('model', MODELS.values(), ids=MODELS)
def test_other_classes(model):
  variables = drawn_variables(model)
  before = jax.tree.map(np.array, variables)
  other, new = replace_head(model, variables, 7)
  assert other == model.clone(num_classes=7)
  expected = jax.eval_shape(other.init, jax.random.key(0), images(model))
  assert kinds(new) == kinds(expected)
  np.testing.assert_array_equal(quick_jit(other.apply)(new, images(model)), np.zeros((2, 7)))
  new['params'].pop('head')
  jax.tree.map(np.testing.assert_array_equal, variables, before)  # they have theirs still
  before['params'].pop('head')
  jax.tree.map(np.testing.assert_array_equal, new, before)


@pytest.mark.parametrize('model', MODELS.values(), ids=MODELS)
def test_no_head_gives_features(model):
  variables = drawn_variables(model)
  body, rest = replace_head(model, variables, 0)
  features = quick_jit(body.apply)(rest, images(model))
  head = variables['params']['head']
  logits = quick_jit(model.apply)(variables, images(model))
  np.testing.assert_allclose(features @ head['kernel'] + head['bias'], logits, 1e-5, 1e-5)
  again, new = replace_head(body, rest, 3)
  assert again.apply(new, images(model)).shape == (2, 3)


def test_the_first_gradients_go_to_the_head_alone():
  model, variables = replace_head(MODELS['mcvit'], drawn_variables(MODELS['mcvit']), 4)

  def loss(params):
    logits = model.apply({'params': params}, images(model))
    return -jnp.mean(jax.nn.log_softmax(logits)[:, 1])

  value, gradients = jax.jit(jax.value_and_grad(loss))(variables['params'])
  np.testing.assert_allclose(value, np.log(4), 1e-6)
  moved = {name for name, tree in gradients.items() if any(map(np.any, jax.tree.leaves(tree)))}
  assert moved == {'head'}


def test_it_is_saved_and_read(tmp_path):
  model, variables = replace_head(*load_pretrained('cvt-nano-cifar10'), num_classes=2)
  save_pretrained(tmp_path / 'w', model, variables, ('cat', 'dog'))
  read, same = load_pretrained(tmp_path / 'w')
  assert read == model
  jax.tree.map(np.testing.assert_array_equal, same, variables)


def test_a_negative_number():
  with pytest.raises(ValueError, match='num_classes'):
    replace_head(MODELS['mcvit'], drawn_variables(MODELS['mcvit']), -1)
