"""Weights drawn by their official names, and what else the comparisons of models share.

The official names are spelled out here a second time, so that the golden files are a test of
cvt_flax.weights.layouts too.
"""

import functools
import re
import zlib

import jax
import numpy as np
from flax import traverse_util

from cvt_flax.weights.tensor_checks import leaf_shapes

# For what is compiled once and run once: half the time to compile, the same arithmetic.
quick_jit = functools.partial(
  jax.jit,
  compiler_options={
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
  },
)

# The last part of an official name, by that of ours.
_LEAVES = {
  'kernel': 'weight',
  'scale': 'weight',
  'mean': 'running_mean',
  'var': 'running_var',
}
# Linear [in, out] -> [out, in]; convolution [h, w, in, out] -> [out, in, h, w].
_TRANSPOSED = {2: (1, 0), 4: (3, 2, 0, 1)}


def assert_close(actual, expected, tolerance=1e-5):
  """Asserts max|difference| <= tolerance max|expected|."""
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.shape == expected.shape
  assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def assert_gradients_close(actual, expected):
  """Asserts |difference| <= 1e-4 max|g of that tensor| + 1e-5 max|g of all|, for {name: g}.

  True gradients that are zero, of the bias of k for one, are thus compared with the largest.
  """
  assert actual.keys() == expected.keys()
  expected = {name: np.asarray(gradient) for name, gradient in expected.items()}
  largest = max(np.abs(gradient).max() for gradient in expected.values())
  for name, gradient in expected.items():
    assert actual[name].shape == gradient.shape, name
    difference = np.abs(actual[name] - gradient).max()
    assert difference <= 1e-4 * np.abs(gradient).max() + 1e-5 * largest, name


def draw(name, shape):
  """Returns the values of the tensor `name`: uniform, from a generator seeded with its name.

  Part of the golden files: another rule needs other files.
  """
  rng = np.random.Generator(np.random.PCG64([2021, zlib.crc32(name.encode())]))
  u = 2 * rng.random(shape) - 1
  if name.endswith('running_var'):
    u = 1 + 0.5 * u
  elif name.endswith('.weight') and len(shape) == 1:  # of a norm
    u = 1 + 0.3 * u
  elif name.endswith('.weight'):
    u = u * (3 / np.prod(shape[1:])) ** 0.5
  elif name.endswith(('.bias', 'running_mean')):
    u = 0.3 * u
  return u.astype(np.float32)  # class tokens and images stay from -1 to 1


def drawn_variables(model):
  """Returns variables for `model` by the rule of `draw`: none has its initial value."""
  leaves = {}
  for path, shape in leaf_shapes(model).items():
    drawn = draw(official_name(path), _to_torch(np.empty(shape)).shape)
    axes = np.argsort(_TRANSPOSED.get(len(shape), range(len(shape))))
    leaves[path] = drawn.transpose(axes).copy()
  return {'batch_stats': {}} | traverse_util.unflatten_dict(leaves)


def official_name(path):
  """Returns the official name of the leaf at `path`, which starts with its collection."""
  *modules, leaf = path[1:]
  modules = [re.sub(r'^blocks_(\d+)$', r'blocks.\1', module) for module in modules]
  return '.'.join([*modules, _LEAVES.get(leaf, leaf)])


def official_shapes(model):
  """Returns {official name: PyTorch's shape} of the model's parameters and statistics."""
  leaves = leaf_shapes(model).items()
  return {official_name(path): _to_torch(np.empty(shape)).shape for path, shape in leaves}


def from_state_dict(layout, model, state):
  """Returns the variables {'params', 'batch_stats'} that a state dict of a layout holds."""
  shapes = {name: tuple(value.shape) for name, value in state.items()}
  return layout.unpack(model, shapes, lambda name: np.asarray(state[name]), 'the state dict')


def to_official(tree):
  """Returns {official name: array in PyTorch's layout} of variables, or of gradients."""
  flat = traverse_util.flatten_dict(tree)
  return {official_name(path): _to_torch(np.asarray(leaf)) for path, leaf in flat.items()}


def _to_torch(x):
  return x.transpose(_TRANSPOSED.get(x.ndim, range(x.ndim)))
