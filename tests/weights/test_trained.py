"""The weights that come along: genuine ones, for tests and examples without a network."""

import jax
import numpy as np
import pytest
from PIL import Image
from skimage import data

from cvt_flax import create_model, list_pretrained, load_pretrained, predict_images
from cvt_flax.errors import UserError
from cvt_flax.weights import pretrained

NANO = 'cvt-nano-cifar10'
# Logits of NANO for `pattern()`, as they were when the weights were made.
LOGITS = (
  0.12182, -0.61954, 3.9956, -0.8119, -0.97857, -1.00637, 0.07365, -0.90609, -0.53975, -0.45614
)  # fmt: skip


def pattern():
  """A smooth picture of 32x32, normalised; nothing that the network knows."""
  y, x, c = np.meshgrid(*map(np.arange, (32, 32, 3)), indexing='ij')
  return np.sin(0.3 * x + 0.2 * y + c).astype(np.float32)[None]


def test_weights_load_by_their_name():
  assert list_pretrained() == [NANO]
  model, variables = load_pretrained(NANO)
  assert model == create_model('cvt-nano', 10)
  assert sum(x.size for x in jax.tree.leaves(variables['params'])) == 372_298
  assert pretrained.load(NANO).description.class_names[3:6] == ('cat', 'deer', 'dog')


def test_logits_are_those_of_the_day():
  model, variables = load_pretrained(NANO)
  logits = jax.jit(model.apply)(variables, pattern())
  np.testing.assert_allclose(logits[0], LOGITS, atol=1e-4)


def test_a_photograph_of_a_cat_is_a_cat(tmp_path):
  Image.fromarray(data.chelsea()).save(tmp_path / 'chelsea.png')
  (prediction,) = predict_images(NANO, [tmp_path / 'chelsea.png'], top=1)
  assert prediction.names == ('cat',)


def test_a_name_that_is_not_there():
  with pytest.raises(UserError, match=f"did you mean '{NANO}'"):
    load_pretrained('cvt-nano-cifar')
