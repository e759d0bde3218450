"""Small models for the tests of weights, and state dicts of them."""

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from cvt_flax import CompactViT, CvT, create_model
from cvt_flax.weights.layouts import (
  COMPACT_TRANSFORMERS,
  HUGGING_FACE,
  OFFICIAL,
  VIT_FROM_SCRATCH,
  VIT_PYTORCH,
)
from tests.models.torch_weights import drawn_variables

# Heads of 64 channels and the official kernels, so that all can be read from the tensors.
SMALL = dict(
  num_classes=5,
  embed_dims=(64, 64, 128),
  depths=(1, 2, 3),
  num_heads=(1, 1, 2),
  mlp_ratios=(1.0, 1.5, 1.0),
  qkv_kernels=(3, 3, 3),
  kv_strides=(2, 2, 2),
  drop_path_rates=(0.0, 0.0, 0.0),
)
OFFICIAL_MODEL = CvT(**SMALL)
GELU_MODEL = CvT(**SMALL, activation='gelu')
VIT_PYTORCH_MODEL = CvT(
  **SMALL | dict(mlp_ratios=(1.0, 2.0, 1.0)),
  activation='gelu',
  patch_paddings=(3, 1, 1),
  cls_token=(False, False, False),
  pool='mean',
  head_dim=64,
  attention_scale='head_dim',
  shared_kv=True,
  qkv_bias=False,
  embed_drop_rates=(0.0, 0.0, 0.0),
  final_norm=False,
)
# {layout: a model that it can hold}
MODELS = {
  OFFICIAL: OFFICIAL_MODEL,
  HUGGING_FACE: GELU_MODEL,
  VIT_PYTORCH: VIT_PYTORCH_MODEL,
  VIT_FROM_SCRATCH: CompactViT(num_classes=5, image_size=16, depth=2, mlp_ratio=2.0),
  COMPACT_TRANSFORMERS: create_model('cct-2/3x2', 5, image_size=16, mlp_ratio=0.5),
}
# The layouts whose code is in a package that can be compared with.
PACKAGED = (OFFICIAL, HUGGING_FACE, VIT_PYTORCH)


def state_dict(layout):
  """Returns {name: array} of the layout's model, with drawn values."""
  model = MODELS[layout]
  return layout.pack(model, drawn_variables(model))


def shapes_of(state):
  return {name: np.shape(value) for name, value in state.items()}


def assert_same_bytes(actual, expected):
  """Asserts that two trees of variables have the same names, shapes and bits."""
  actual, expected = flatten_dict(jax.device_get(actual)), flatten_dict(jax.device_get(expected))
  assert actual.keys() == expected.keys()
  for path, leaf in expected.items():
    assert actual[path].shape == leaf.shape and actual[path].dtype == leaf.dtype, path
    assert actual[path].tobytes() == leaf.tobytes(), path
