"""CvT against the PyTorch models, digit by digit, with random weights and statistics.

    git clone https://github.com/microsoft/CvT ../CvT
    python benchmarks/parity.py --authors=../CvT

Computes logits and stage maps of every model and size in float32, and one training step of CvT-13,
and prints how far the two are apart: max|difference| / max|value|, and for gradients the part of
what is allowed, |difference| / (1e-4 max|g of that tensor| + 1e-5 max|g of all|). Writes the same
to benchmarks/results/. Without --authors, Hugging Face and vit-pytorch alone are compared.
"""

# ruff: noqa: E402  (the environment is set before JAX and transformers are imported)

import importlib.util
import os
import pathlib
import sys
import types

os.environ.setdefault('HF_HUB_OFFLINE', '1')  # nothing is downloaded: weights are random
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Nothing here needs torchvision, and one built for another PyTorch takes transformers down, and
# vit-pytorch, but for the module that is compared.
sys.modules['torchvision'] = None
_found = importlib.util.find_spec('vit_pytorch').submodule_search_locations
sys.modules['vit_pytorch'] = types.ModuleType('vit_pytorch')
sys.modules['vit_pytorch'].__path__ = list(_found)

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax.traverse_util import flatten_dict

from benchmarks import authors, common
from cvt_flax import CvT, create_model
from cvt_flax.weights import parity
from cvt_flax.weights.layouts import HUGGING_FACE, OFFICIAL, VIT_PYTORCH
from tests.models.torch_weights import drawn_variables

# Official sizes, and one that is neither square nor even.
SIZES = ((224, 224), (384, 384), (251, 187))
PACKAGES = ('jax', 'jaxlib', 'flax', 'numpy', 'torch', 'transformers', 'vit-pytorch')


def main():
  parser = common.parser(__doc__)
  parser.add_argument('--authors', help='a checkout of github.com/microsoft/CvT')
  parser.add_argument('--models', default='cvt-13,cvt-21,cvt-w24', help='cvt-13,cvt-21,cvt-w24')
  arguments = parser.parse_args()
  if arguments.quick:
    arguments.models = 'cvt-13'
  jax.config.update('jax_default_matmul_precision', 'highest')

  rows = []
  for name in arguments.models.split(','):
    for peer, model, layout in peers(arguments, name):
      variables = drawn_variables(model)
      module, run = torch_side(arguments, peer, model, variables, layout)
      ours = jax.jit(lambda v, x, m=model: (m.apply(v, x), m.apply(v, x, method='stage_maps')))
      for size in SIZES[-1:] if arguments.quick else SIZES:
        images = parity.random_images(size)
        logits, maps = run(module, images)
        our_logits, our_maps = jax.device_get(ours(variables, images))
        apart = {'logits': parity.difference(our_logits, logits)}
        apart |= {
          f'map {s}': parity.difference(a, e)
          for s, (a, e) in enumerate(zip(our_maps, maps, strict=True))
        }
        rows.append({'peer': peer, 'model': name, 'size': list(size)} | apart)
        show(rows[-1])
      if name == 'cvt-13' and not arguments.quick:
        for groups in (1, 2):
          apart = training_step(module, model, variables, layout, groups)
          rows.append({'peer': peer, 'model': name, 'training step, groups': groups} | apart)
          show(rows[-1])
      del module
  record = {'models': arguments.models, **common.hardware(), 'rows': rows}
  common.write(arguments, 'parity', PACKAGES, None, record)  # others change no digit


def peers(arguments, name):
  """Yields (peer, our model, its layout)."""
  attributes = dict(drop_path_rates=())
  if arguments.authors:
    yield 'authors', create_model(name, **attributes), OFFICIAL
  yield 'Hugging Face', create_model(name, activation='gelu', **attributes), HUGGING_FACE
  named = create_model(name)
  yield (
    'vit-pytorch',
    CvT(
      embed_dims=named.embed_dims,
      depths=named.depths,
      num_heads=named.num_heads,
      patch_paddings=(3, 1, 1),
      cls_token=(),
      pool='mean',
      head_dim=64,
      attention_scale='head_dim',
      shared_kv=True,
      qkv_bias=False,
      final_norm=False,
      activation='gelu',
      **attributes,
    ),
    VIT_PYTORCH,
  )


def torch_side(arguments, peer, model, variables, layout):
  """Returns (their module, a function (module, images) -> logits and stage maps)."""
  if peer == 'authors':
    return authors.build(arguments.authors, model, variables), authors.run
  return (
    parity.torch_model(model, variables, layout),
    lambda module, images: parity.run_torch(module, layout, images),
  )


def training_step(module, model, variables, layout, groups):
  """Compares loss, logits, gradients and running statistics of a step of 4 images at 224.

  With two groups PyTorch computes two half-batches, each from the same running statistics, as two
  of its devices would: losses, gradients and new statistics are the means over them.
  """
  images = parity.random_images((224, 224), count=4, seed=1)
  labels = np.random.default_rng(1).integers(model.num_classes, size=4)
  before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
  losses, logits, sums = [], [], {}
  for x, y in zip(np.split(images, groups), np.split(labels, groups), strict=True):
    module.load_state_dict(before)
    module.train()
    module.zero_grad()
    output = module(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    output = getattr(output, 'logits', output)
    loss = torch.nn.functional.cross_entropy(output, torch.from_numpy(y))
    loss.backward()
    losses.append(loss.item())
    logits.append(output.detach().numpy())
    state = module.state_dict() | {n: p.grad for n, p in module.named_parameters()}
    for name, tensor in state.items():
      sums[name] = sums.get(name, 0) + tensor.detach().numpy() / groups
  module.load_state_dict(before)
  module.eval()
  shapes = {name: np.shape(value) for name, value in sums.items()}
  expected = layout.unpack(model, shapes, sums.__getitem__, 'PyTorch')

  grouped = model.clone(bn_group_size=len(images) // groups)

  @jax.jit
  def step(variables):
    def loss_fn(params):
      logits, updates = grouped.apply(
        {**variables, 'params': params}, images, train=True, mutable=['batch_stats']
      )
      loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels)).mean()
      return loss, (logits, updates)

    return jax.value_and_grad(loss_fn, has_aux=True)(variables['params'])

  (loss, (our_logits, updates)), gradients = jax.device_get(step(variables))
  gradients, wanted = flatten_dict(gradients), flatten_dict(expected['params'])
  largest = max(np.abs(g).max() for g in wanted.values())
  statistics = flatten_dict(expected['batch_stats'])
  return {
    'loss': abs(float(loss) - np.mean(losses)) / np.mean(losses),
    'logits': parity.difference(our_logits, np.concatenate(logits)),
    'gradients, part of what is allowed': max(
      float(np.abs(gradients[p] - g).max() / (1e-4 * np.abs(g).max() + 1e-5 * largest))
      for p, g in wanted.items()
    ),
    'statistics': max(
      parity.difference(s, statistics[p]) for p, s in flatten_dict(updates['batch_stats']).items()
    ),
  }


def show(row):
  words = [f'{k} {v:.1e}' if isinstance(v, float) else f'{v}' for k, v in row.items()]
  print('  '.join(words), flush=True)


if __name__ == '__main__':
  main()
