"""CvT against the PyTorch models of Hugging Face and vit-pytorch, where they are installed.

Both are given random weights and statistics, and both compute the exact GELU where the authors'
code has QuickGELU. Logits, and what a training step with batch statistics derives from them, must
agree, and the multiply-adds with those that PyTorch counts.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cvt_flax import CvT
from cvt_flax.models.geometry import multiply_adds
from cvt_flax.weights.layouts import HUGGING_FACE, VIT_PYTORCH
from tests.models.torch_weights import (
  assert_close,
  assert_gradients_close,
  draw,
  from_state_dict,
  quick_jit,
)

SIZE = (37, 50)
TINY = dict(
  num_classes=5,
  embed_dims=(8, 12, 16),
  depths=(1, 1, 1),
  num_heads=(1, 3, 2),
  activation='gelu',
  drop_path_rates=(),
)


def huggingface(peer):
  """Returns (our model, theirs, the layout of its state dict)."""
  transformers = peer('transformers')
  ours = CvT(
    **TINY
    | dict(
      embed_dims=(8, 12),
      depths=(1, 2),
      num_heads=(1, 3),
      patch_sizes=(7, 3),
      patch_strides=(4, 2),
      patch_paddings=(2, 1),
      mlp_ratios=(4.0, 4.0),
      cls_token=(False, True),
    )
  )
  config = transformers.CvtConfig(
    num_labels=ours.num_classes,
    embed_dim=ours.embed_dims,
    depth=ours.depths,
    num_heads=ours.num_heads,
    patch_sizes=ours.patch_sizes,
    patch_stride=ours.patch_strides,
    patch_padding=ours.patch_paddings,
    mlp_ratio=ours.mlp_ratios,
    cls_token=ours.cls_token,
    drop_path_rate=(0.0, 0.0),
  )
  module = transformers.CvtForImageClassification(config)
  return ours, module, HUGGING_FACE


def vit_pytorch(peer):
  """Returns (our model, theirs, the layout of its state dict)."""
  ours = CvT(
    **TINY,
    patch_paddings=(3, 1, 1),
    cls_token=(),
    pool='mean',
    head_dim=64,
    attention_scale='head_dim',
    shared_kv=True,
    qkv_bias=False,
    final_norm=False,
  )
  stages = {}
  for s in range(3):
    stages |= {
      f's{s + 1}_emb_dim': ours.embed_dims[s],
      f's{s + 1}_depth': ours.depths[s],
      f's{s + 1}_heads': ours.num_heads[s],
    }
  module = peer('vit_pytorch.cvt').CvT(num_classes=ours.num_classes, **stages)
  return ours, module, VIT_PYTORCH


def randomize(torch, module):
  """Gives every parameter and statistic a value that matters."""
  with torch.no_grad():
    for name, value in module.state_dict().items():
      if value.is_floating_point():
        shape = tuple(value.shape)
        # vit-pytorch's norms: g and b, with two trailing axes.
        if name.endswith(('.g', '.b')):
          leaf = {'g': '.weight', 'b': '.bias'}[name[-1]]
          drawn = draw(name[:-2] + leaf, (value.numel(),)).reshape(shape)
        else:
          drawn = draw(name, shape)
        value.copy_(torch.tensor(drawn))


def logits_of(output):
  return getattr(output, 'logits', output)


@pytest.mark.parametrize('make', [huggingface, vit_pytorch])
def test_logits_gradients_and_statistics(make, peer):
  torch = peer('torch')
  model, module, layout = make(peer)
  randomize(torch, module)
  variables = from_state_dict(layout, model, module.state_dict())
  images = draw('images', (3, 3, *SIZE))
  x = images.transpose(0, 2, 3, 1)
  weights = np.arange(1, 6, dtype=np.float32)  # of the logits in the loss

  module.eval()
  with torch.no_grad():
    expected = logits_of(module(torch.tensor(images))).numpy()
  assert_close(quick_jit(model.apply)(variables, x), expected)

  module.train()
  logits = logits_of(module(torch.tensor(images)))
  (torch.sin(logits) * torch.tensor(weights)).sum().backward()

  @quick_jit
  def step(variables):
    def loss_fn(params):
      logits, updates = model.apply(
        {**variables, 'params': params}, x, train=True, mutable=['batch_stats']
      )
      return jnp.sum(jnp.sin(logits) * weights), (logits, updates)

    return jax.grad(loss_fn, has_aux=True)(variables['params'])

  gradients, (actual, updates) = step(variables)
  assert_close(actual, logits.detach().numpy())
  state = module.state_dict()
  expected = from_state_dict(layout, model, state)
  for path, statistic in flatten_dict(updates['batch_stats']).items():
    assert_close(statistic, flatten_dict(expected['batch_stats'])[path])
  # A state dict with gradients in the places of the parameters.
  state |= {name: p.grad for name, p in module.named_parameters()}
  expected = from_state_dict(layout, model, state)
  assert_gradients_close(flatten_dict(gradients), flatten_dict(expected['params']))


@pytest.mark.parametrize('make', [huggingface, vit_pytorch])
def test_two_groups_are_two_half_batches(make, peer):
  """As two devices of PyTorch compute them, each with the statistics of its own images."""
  torch = peer('torch')
  model, module, layout = make(peer)
  randomize(torch, module)
  variables = from_state_dict(layout, model, module.state_dict())
  images = draw('images', (4, 3, *SIZE))

  before = {name: value.clone() for name, value in module.state_dict().items()}
  logits, sums = [], {}
  module.train()
  for half in np.split(images, 2):
    module.load_state_dict(before)
    module.zero_grad()
    found = logits_of(module(torch.tensor(half)))
    torch.sin(found).sum().backward()
    logits.append(found.detach().numpy())
    for name, value in (module.state_dict() | dict(module.named_parameters())).items():
      value = value.grad if value.requires_grad else value
      sums[name] = sums.get(name, 0) + value.numpy()
  expected = from_state_dict(layout, model, {k: np.asarray(v) for k, v in sums.items()})

  grouped = model.clone(bn_group_size=2)

  @quick_jit
  def step(variables):
    def loss_fn(params):
      logits, updates = grouped.apply(
        {**variables, 'params': params},
        images.transpose(0, 2, 3, 1),
        train=True,
        mutable=['batch_stats'],
      )
      return jnp.sum(jnp.sin(logits)), (logits, updates)

    return jax.grad(loss_fn, has_aux=True)(variables['params'])

  gradients, (actual, updates) = step(variables)
  assert_close(actual, np.concatenate(logits))
  assert_gradients_close(flatten_dict(gradients), flatten_dict(expected['params']))
  for path, statistic in flatten_dict(updates['batch_stats']).items():
    assert_close(statistic, flatten_dict(expected['batch_stats'])[path] / 2)


@pytest.mark.parametrize('make', [huggingface, vit_pytorch])
def test_multiply_adds(make, peer):
  torch = peer('torch')
  model, module, _ = make(peer)
  counter = peer('torch.utils.flop_counter').FlopCounterMode(display=False)
  with torch.no_grad(), counter:
    module.eval()(torch.zeros(1, 3, *SIZE))
  assert multiply_adds(model, *SIZE) == counter.get_total_flops() // 2
