"""One logit for two classes, as one logit a class."""

import jax
import numpy as np
import optax

from cvt_flax.ops.logits import class_logits, num_classes

Z = np.array([[-200.0], [-3.0], [0.0], [0.5], [200.0]], np.float32)


def test_the_softmax_is_the_sigmoid():
  shares = jax.nn.softmax(class_logits(Z))
  np.testing.assert_allclose(shares[:, 1:], jax.nn.sigmoid(Z), rtol=1e-6)
  np.testing.assert_allclose(shares[:, :1], jax.nn.sigmoid(-Z), rtol=1e-6)


def test_the_cross_entropy_is_the_binary_one_and_so_is_its_gradient():
  targets = np.array([[1.0, 0.0], [0.0, 1.0], [0.3, 0.7], [0.5, 0.5], [0.0, 1.0]], np.float32)

  def ours(z):
    return optax.softmax_cross_entropy(class_logits(z), targets).sum()

  def binary(z):
    return optax.sigmoid_binary_cross_entropy(z[:, 0], targets[:, 1]).sum()

  (a, da), (b, db) = (jax.value_and_grad(f)(Z) for f in (ours, binary))
  np.testing.assert_allclose(a, b, rtol=1e-6)
  np.testing.assert_allclose(da, db, rtol=1e-6, atol=1e-7)


def test_other_logits_are_left_alone():
  logits = np.arange(6.0).reshape(2, 3)
  assert class_logits(logits) is logits
  assert [num_classes(n) for n in (0, 1, 2, 3)] == [0, 2, 2, 3]
