"""CvT against what the authors' code computes, recorded in golden/.

The numbers come from lib/models/cls_cvt.py of github.com/microsoft/CvT at
f851e681966390779b71380d2600b52360ff4fe1, run in float32 by PyTorch 2.13.0 on CPU, with the
weights and images of `draw` (torch_weights.py): they are drawn by name, so that a file holds
results alone. Three configurations: the official one made small, and two with other options of
that code. Images are 40x36, so that not every map is square, and some are odd.

A file holds, for parameters in PyTorch's names and layouts:
  names: of all parameters and statistics.
  eval/logits, eval/map0..2: without training; map s is the map that stage s returns.
  train/logits, train/loss: with batch statistics; the loss is the mean cross entropy.
  gradient/NAME: of that loss, of every parameter or of the smaller ones.
  stats/NAME: the running statistics after that one step.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cvt_flax import CvT
from tests.models.torch_weights import (
  assert_close,
  assert_gradients_close,
  draw,
  drawn_variables,
  official_shapes,
  quick_jit,
  to_official,
)

GOLDEN = pathlib.Path(__file__).parent / 'golden'
CLASSES = 5
LABELS = (1, 4, 0)
SIZE = (40, 36)

SMALL = dict(
  num_classes=CLASSES,
  embed_dims=(8, 12, 16),
  depths=(1, 1, 2),
  num_heads=(1, 2, 4),
  drop_path_rates=(),
)
CONFIGS = {
  'dw_bn': SMALL,
  'avg': SMALL
  | dict(projection='avg', cls_token=(True, False, True), qkv_bias=False, depths=(1, 1, 1)),
  'no_cls': SMALL
  | dict(
    depths=(1, 1, 1),
    cls_token=(),
    pool='mean',
    qkv_kernels=(5, 3, 1),
    kv_strides=(3, 2, 1),
    mlp_ratios=(2.0, 3.5, 1.0),
    patch_sizes=(5, 2, 3),
    patch_strides=(3, 2, 1),
    patch_paddings=(1, 0, 1),
  ),
}


def images():
  """Returns the images [b h w 3]; PyTorch is given them as [b 3 h w]."""
  return draw('images', (len(LABELS), 3, *SIZE)).transpose(0, 2, 3, 1)


@functools.cache
def ours(name):
  """Returns what a golden file holds, computed by our model."""
  model = CvT(**CONFIGS[name])
  variables = drawn_variables(model)
  # One of them as users compile it.
  jit = jax.jit if name == 'dw_bn' else quick_jit

  def loss_fn(params, batch_stats):
    logits, updates = model.apply(
      {'params': params, 'batch_stats': batch_stats}, images(), train=True, mutable=['batch_stats']
    )
    labels = jnp.array(LABELS)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, (logits, updates)

  @jit
  def evaluate(variables):
    maps = model.apply(variables, images(), method='stage_maps')
    return model.apply(variables, images()), maps

  eval_logits, maps = evaluate(variables)
  step = jit(jax.value_and_grad(loss_fn, has_aux=True))
  (loss, (logits, updates)), gradients = step(variables['params'], variables['batch_stats'])
  return {
    'names': np.array(sorted(official_shapes(model))),
    'eval/logits': eval_logits,
    **{f'eval/map{s}': stage_map for s, stage_map in enumerate(maps)},
    'train/logits': logits,
    'train/loss': loss,
    **{f'gradient/{k}': v for k, v in to_official({'params': gradients}).items()},
    **{f'stats/{k}': v for k, v in to_official(dict(updates)).items()},
  }


@functools.cache
def golden(name):
  with np.load(GOLDEN / f'{name}.npz') as file:
    return dict(file)


@pytest.mark.parametrize('name', CONFIGS)
def test_names(name):
  assert ours(name)['names'].tolist() == golden(name)['names'].tolist()


@pytest.mark.parametrize('key', ['eval/logits', 'train/logits', 'train/loss'])
@pytest.mark.parametrize('name', CONFIGS)
def test_results(name, key):
  assert_close(ours(name)[key], golden(name)[key])


@pytest.mark.parametrize('stage', range(3))
@pytest.mark.parametrize('name', CONFIGS)
def test_stage_maps(name, stage):
  assert_close(ours(name)[f'eval/map{stage}'], golden(name)[f'eval/map{stage}'])


@pytest.mark.parametrize('name', CONFIGS)
def test_gradients(name):
  expected = {k: v for k, v in golden(name).items() if k.startswith('gradient/')}
  assert_gradients_close({k: ours(name)[k] for k in expected}, expected)


@pytest.mark.parametrize('name', ['dw_bn', 'no_cls'])
def test_running_statistics(name):
  expected = {k: v for k, v in golden(name).items() if k.startswith('stats/')}
  assert len(expected) == 2 * 3 * sum(CONFIGS[name]['depths'])
  for key, statistic in expected.items():
    assert_close(ours(name)[key], statistic)
