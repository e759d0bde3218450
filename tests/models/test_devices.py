"""A batch spread over eight devices gives what it gives on one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cvt_flax import CvT
from tests.models.torch_weights import (
  assert_close,
  assert_gradients_close,
  draw,
  drawn_variables,
  quick_jit,
  to_official,
)

MODEL = functools.partial(
  CvT,
  num_classes=5,
  embed_dims=(12,),
  depths=(1,),
  num_heads=(3,),
  patch_sizes=(3,),
  patch_strides=(2,),
  patch_paddings=(1,),
  mlp_ratios=(2.0,),
  cls_token=(True,),
  drop_path_rates=(),
)


def placed(devices, variables, images):
  """Returns the variables on each of the first `devices` devices, the images spread over them."""
  mesh = Mesh(np.array(jax.devices()[:devices]), ('data',))
  everywhere, spread = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ('data',)))
  return jax.device_put(variables, everywhere), jax.device_put(images, spread)


def step(model, variables, images):
  def loss_fn(params):
    logits, updates = model.apply(
      {**variables, 'params': params}, images, train=True, mutable=['batch_stats']
    )
    return (jnp.sin(logits) * jnp.arange(1, 6)).sum(), (logits, updates)

  gradients, (logits, updates) = jax.grad(loss_fn, has_aux=True)(variables['params'])
  return model.apply(variables, images), logits, gradients, updates


# With two images a device, a group of 4 lies on two of them.
@pytest.mark.parametrize('group', [0, 2, 4])
def test_eight_devices_equal_one(group):
  model = MODEL(bn_group_size=group)
  variables, images = drawn_variables(model), draw('images', (16, 10, 9, 3))
  run = quick_jit(functools.partial(step, model))
  one, eight = (run(*placed(devices, variables, images)) for devices in (1, 8))
  assert len(eight[1].sharding.device_set) == 8
  for actual, expected in zip(eight[:2], one[:2], strict=True):
    assert_close(actual, expected)
  for name, statistic in to_official(dict(one[3])).items():
    assert_close(to_official(dict(eight[3]))[name], statistic)
  assert_gradients_close(to_official({'params': eight[2]}), to_official({'params': one[2]}))


@pytest.mark.parametrize(('group', 'communicates'), [(2, False), (1, False), (0, True)])
def test_groups_within_a_device_need_no_communication(group, communicates):
  model = MODEL(bn_group_size=group)

  @quick_jit
  def logits(variables, images):
    return model.apply(variables, images, train=True, mutable=['batch_stats'])[0]

  arguments = placed(8, drawn_variables(model), draw('images', (16, 10, 9, 3)))
  text = logits.lower(*arguments).compile().as_text()
  collectives = set(re.findall(r' (all-\w+|reduce-scatter|collective-\w+)\(', text))
  assert collectives == ({'all-reduce'} if communicates else set())
