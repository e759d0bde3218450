"""Blocks that compute again in the backward pass what they have not kept of the forward pass."""

import math

import jax
import numpy as np
import pytest

from cvt_flax import CvT
from cvt_flax.models.options import REMAT_POLICIES
from tests.models.torch_weights import draw, drawn_variables, quick_jit

MODEL = CvT(
  num_classes=5,
  embed_dims=(8, 12),
  depths=(1, 2),
  num_heads=(1, 3),
  patch_sizes=(3, 3),
  patch_strides=(2, 1),
  patch_paddings=(1, 1),
  mlp_ratios=(2.0, 2.0),
  cls_token=(False, True),
  drop_rates=(0.2, 0.2),
  drop_path_rates=(0.0, 0.5),
)
IMAGES = draw('images', (8, 12, 12, 3))


def loss_of(remat):
  model, variables = MODEL.clone(remat=remat), drawn_variables(MODEL)

  def loss(params):
    logits, updates = model.apply(
      {**variables, 'params': params},
      IMAGES,
      train=True,
      mutable=['batch_stats'],
      rngs={'dropout': jax.random.key(0)},
    )
    return (logits**2).sum(), (logits, updates)

  return loss, variables['params']


def kept(remat):
  """Returns the bytes that the forward pass keeps for the backward pass."""
  loss, params = loss_of(remat)
  backward = jax.eval_shape(lambda p: jax.vjp(loss, p, has_aux=True)[1], params)
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(backward))


@pytest.mark.parametrize(
  'remat', [('nothing_saveable',) * 2, ('', 'dots_with_no_batch_dims_saveable')]
)
def test_it_changes_no_number(remat):
  found = []
  for each in ((), remat):
    loss, params = loss_of(each)
    found.append(quick_jit(jax.value_and_grad(loss, has_aux=True))(params))
  plain, again = found
  assert jax.tree.structure(plain) == jax.tree.structure(again)
  (_, (_, statistics)), gradients = plain
  largest = max(np.abs(x).max() for x in jax.tree.leaves((statistics, gradients)))
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
    np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6 * largest)


def test_each_policy_keeps_less():
  everything, *others = (kept((policy, policy)) for policy in REMAT_POLICIES)
  dots, dots_without_batch, nothing = others
  print(f'kept: {everything:,} bytes; dots {dots:,}, {dots_without_batch:,}; nothing {nothing:,}')
  assert everything > dots > dots_without_batch > nothing
  assert kept(('nothing_saveable', '')) < everything
