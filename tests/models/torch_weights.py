"""PyTorch weights as our variables, and what else the comparisons of models share.

A state dict is {name: anything numpy can read}. The names of the authors' code (called official
here) are our tree's names but for the layers' spellings below; those of Hugging Face and
vit-pytorch are first turned into the official ones.
"""

import functools
import re
import zlib

import jax
import numpy as np
from flax import traverse_util

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
  'bias': 'bias',
  'mean': 'running_mean',
  'var': 'running_var',
  'cls_token': 'cls_token',
}


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
  return from_official(model, {k: draw(k, v) for k, v in official_shapes(model).items()})


def official_name(path):
  """Returns the official name of the leaf at `path`, which starts with its collection."""
  *modules, leaf = path[1:]
  modules = [re.sub(r'^blocks_(\d+)$', r'blocks.\1', module) for module in modules]
  return '.'.join([*modules, _LEAVES[leaf]])


def official_shapes(model):
  """Returns {official name: PyTorch's shape} of the model's parameters and statistics."""
  return {
    official_name(path): _to_torch(np.empty(leaf.shape)).shape
    for path, leaf in _leaves(model).items()
  }


def from_official(model, state):
  """Returns the variables {'params', 'batch_stats'} that hold an official state dict.

  Args:
    model: the linen module they are for.
    state: {official name: array}.

  Raises:
    ValueError: when a name is missing, left over, or has another shape.
  """
  state = {k: np.asarray(v) for k, v in state.items() if not k.endswith('num_batches_tracked')}
  leaves = {official_name(path): (path, leaf) for path, leaf in _leaves(model).items()}
  if state.keys() != leaves.keys():
    raise ValueError(f'names that differ: {sorted(state.keys() ^ leaves.keys())}')
  flat = {}
  for name, (path, leaf) in leaves.items():
    flat[path] = _from_torch(state[name])
    if flat[path].shape != leaf.shape:
      raise ValueError(f'{name}: {state[name].shape} does not fit {leaf.shape}')
  return {'batch_stats': {}} | traverse_util.unflatten_dict(flat)


def to_official(tree):
  """Returns {official name: array in PyTorch's layout} of variables, or of gradients."""
  flat = traverse_util.flatten_dict(tree)
  return {official_name(path): _to_torch(np.asarray(leaf)) for path, leaf in flat.items()}


# A part of a Hugging Face name -> the official part. In this order.
_HUGGINGFACE = [
  (r'^cvt\.encoder\.stages\.(\d+)\.', r'stage\1.'),
  (r'^layernorm\.', 'norm.'),
  (r'^classifier\.', 'head.'),
  (r'\.embedding\.convolution_embeddings\.projection\.', '.patch_embed.proj.'),
  (r'\.embedding\.convolution_embeddings\.normalization\.', '.patch_embed.norm.'),
  (r'\.layers\.(\d+)\.', r'.blocks.\1.'),
  (r'\.layernorm_before\.', '.norm1.'),
  (r'\.layernorm_after\.', '.norm2.'),
  (r'\.attention\.output\.dense\.', '.attn.proj.'),
  (r'\.intermediate\.dense\.', '.mlp.fc1.'),
  (r'\.output\.dense\.', '.mlp.fc2.'),
  (r'\.attention\.attention\.', '.attn.'),
  (r'\.convolution_projection_([qkv])\w+\.convolution_projection\.', r'.conv_proj_\1.'),
  (r'\.convolution\.', '.conv.'),
  (r'\.normalization\.', '.bn.'),
  (r'\.projection_([qkv])\w+\.', r'.proj_\1.'),
]


def huggingface_to_official(state):
  """Renames the state dict of transformers' CvtForImageClassification."""
  renamed = {}
  for name, value in state.items():
    for pattern, replacement in _HUGGINGFACE:
      name = re.sub(pattern, replacement, name)
    renamed[name] = value
  return renamed


# A part of a vit-pytorch name -> the official part; s and j are replaced by their numbers.
_VIT_PYTORCH = [
  (r'^layers\.(\d+)\.0\.', r'stage\1.patch_embed.proj.'),
  (r'^layers\.(\d+)\.1\.', r'stage\1.patch_embed.norm.'),
  (r'^layers\.(\d+)\.2\.layers\.(\d+)\.', r'stage\1.blocks.\2.'),
  (r'^to_logits\.2\.', 'head.'),
  (r'\.0\.norm\.', '.norm1.'),
  (r'\.1\.net\.0\.', '.norm2.'),
  (r'\.1\.net\.1\.', '.mlp.fc1.'),
  (r'\.1\.net\.4\.', '.mlp.fc2.'),
  (r'\.0\.to_out\.0\.', '.attn.proj.'),
  (r'\.0\.to_(q|kv)\.net\.0\.', r'.attn.conv_proj_\1.conv.'),
  (r'\.0\.to_(q|kv)\.net\.1\.', r'.attn.conv_proj_\1.bn.'),
  (r'\.0\.to_(q|kv)\.net\.2\.', r'.attn.proj_\1.'),
  (r'\.g$', '.weight'),
  (r'\.b$', '.bias'),
]


def vit_pytorch_to_official(state):
  """Renames the state dict of vit_pytorch.cvt.CvT.

  Its linear layers are 1x1 convolutions, its layer norms have two trailing axes of 1, and one
  projection yields keys and values, in this order.
  """
  renamed = {}
  for name, value in state.items():
    value = np.asarray(value)
    for pattern, replacement in _VIT_PYTORCH:
      name = re.sub(pattern, replacement, name)
    if name.endswith(('.norm.weight', '.norm.bias')) or '.norm1.' in name or '.norm2.' in name:
      value = value.reshape(-1)
    elif re.search(r'\.(fc1|fc2|proj_q|proj_kv|attn\.proj)\.weight$', name):
      value = value[:, :, 0, 0]
    if '.proj_kv.' in name:
      for part, half in zip('kv', np.split(value, 2), strict=True):
        renamed[name.replace('.proj_kv.', f'.proj_{part}.')] = half
    else:
      renamed[name] = value
  return renamed


def _leaves(model):
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
  return traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0), images))


def _from_torch(x):
  # Linear [out, in] -> [in, out]; convolution [out, in, h, w] -> [h, w, in, out]. A copy: numpy
  # shares PyTorch's memory, and PyTorch writes new running statistics over the old ones.
  return x.transpose({2: (1, 0), 4: (2, 3, 1, 0)}.get(x.ndim, range(x.ndim))).copy()


def _to_torch(x):
  return x.transpose({2: (1, 0), 4: (3, 2, 0, 1)}.get(x.ndim, range(x.ndim)))
