"""The same weights in PyTorch and here, on the same images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from cvt_flax.errors import UserError
from cvt_flax.models.cvt import CvT
from cvt_flax.models.options import resolve
from cvt_flax.weights import architecture, huggingface_config
from cvt_flax.weights.compact import LAYOUTS as COMPACT_LAYOUTS
from cvt_flax.weights.files import import_torch
from cvt_flax.weights.layouts import HUGGING_FACE, OFFICIAL, VIT_PYTORCH, Layout


@dataclasses.dataclass(frozen=True)
class Parity:
  """How far two models are apart: max|difference| / max|value|.

  Attributes:
    logits: of all logits.
    maps: of every stage's map.
  """

  logits: float
  maps: tuple[float, ...]


def random_images(
  size: tuple[int, int], count: int = 2, seed: int = 0, channels: int = 3
) -> np.ndarray:
  """Returns normal noise [count h w channels], float32."""
  shape = (count, *size, channels)
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


def compare(model: CvT, variables: dict, layout: Layout, images: np.ndarray) -> Parity:
  """Computes logits and stage maps in PyTorch and here.

  The authors' network has no package; transformers' is used for it, with QuickGELU in place of its
  GELU where the model has that.

  Args:
    model: the network.
    variables: {'params', 'batch_stats'}.
    layout: in which PyTorch is given them.
    images: [b h w in_channels], normalised.

  Raises:
    UserError: PyTorch, transformers or vit-pytorch are needed and not installed, or do not have
      such a model.
  """
  logits, maps = run_torch(torch_model(model, variables, layout), layout, images)
  ours = jax.jit(lambda v, x: (model.apply(v, x), model.apply(v, x, method='stage_maps')))
  with jax.default_matmul_precision('highest'):  # TPUs and GPUs would round float32
    our_logits, our_maps = jax.device_get(ours(variables, images))
  of_maps = tuple(difference(a, e) for a, e in zip(our_maps, maps, strict=True))
  return Parity(difference(our_logits, logits), of_maps)


def difference(actual: np.ndarray, expected: np.ndarray) -> float:
  """Returns max|actual - expected| / max|expected|."""
  return float(np.abs(actual - expected).max() / np.abs(expected).max())


def activation_difference(model: CvT, variables: dict, images: np.ndarray) -> float:
  """Returns how far the logits move when QuickGELU and GELU are exchanged."""
  other = 'gelu' if model.activation == 'quick_gelu' else 'quick_gelu'
  with jax.default_matmul_precision('highest'):
    own, moved = (
      jax.device_get(jax.jit(m.apply)(variables, images))
      for m in (model, architecture.with_activation(model, other))
    )
  return difference(moved, own)


def check_comparable(layout: Layout) -> None:
  """Raises a UserError for a layout whose network is in no package."""
  if layout.name in COMPACT_LAYOUTS:
    raise UserError(f'{layout.name} is in no package: there is nothing to compare with')


def torch_model(model: CvT, variables: Mapping, layout: Layout):
  """Returns the torch.nn.Module of `layout` with these variables, in evaluation mode."""
  check_comparable(layout)
  torch = import_torch('to compare with PyTorch')
  if layout is OFFICIAL:
    architecture.check_expressible(HUGGING_FACE, model)
    layout = HUGGING_FACE
  architecture.check_expressible(layout, model)
  if layout is VIT_PYTORCH:
    module = _vit_pytorch(model)
  else:
    module = _transformers(model)
    if model.activation == 'quick_gelu':
      _use_quick_gelu(torch, module)
  state = layout.pack(model, variables)
  module.load_state_dict({n: torch.from_numpy(np.array(x)) for n, x in state.items()}, strict=True)
  return module.eval()


def run_torch(module, layout: Layout, images: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
  """Returns the logits [b k] and stage maps [b h w c] that PyTorch computes."""
  torch = import_torch('to compare with PyTorch')
  x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
  with torch.inference_mode():
    if layout is VIT_PYTORCH:
      maps = []
      for stage in module.layers:
        x = stage(x)
        maps.append(x)
      logits = module.to_logits(x)
    else:
      output = module(x, output_hidden_states=True)
      logits, maps = output.logits, output.hidden_states
  return logits.numpy(), [m.numpy().transpose(0, 2, 3, 1) for m in maps]


def _needed(package, error):
  return UserError(f'to compare with PyTorch, {package} is needed: pip install {package} ({error})')


def _transformers(model):
  try:
    from transformers import CvtConfig, CvtForImageClassification
  except ImportError as e:
    raise _needed('transformers', e) from e
  config = huggingface_config.from_model(model)
  keys = {k: v for k, v in config.items() if k not in ('model_type', 'architectures', 'activation')}
  # Drop path is of no account here, and theirs is indexed by stage.
  keys['drop_path_rate'] = [0.0] * len(model.embed_dims)
  return CvtForImageClassification(CvtConfig(num_labels=model.num_classes, **keys))


def _use_quick_gelu(torch, module):
  class QuickGELU(torch.nn.Module):
    def forward(self, x):
      return x * torch.sigmoid(1.702 * x)

  for child in module.modules():
    if type(child).__name__ == 'CvtIntermediate':
      child.activation = QuickGELU()


def _vit_pytorch(model):
  try:
    from vit_pytorch.cvt import CvT as VitPytorchCvT
  except ImportError as e:
    raise _needed('vit-pytorch', e) from e
  keys = {}
  for s, o in enumerate(resolve(model), start=1):
    keys |= {
      f's{s}_emb_dim': o.embed_dim,
      f's{s}_emb_kernel': o.patch_size,
      f's{s}_emb_stride': o.patch_stride,
      f's{s}_proj_kernel': o.qkv_kernel,
      f's{s}_kv_proj_stride': o.kv_stride,
      f's{s}_heads': o.num_heads,
      f's{s}_depth': o.depth,
      f's{s}_mlp_mult': o.mlp_dim // o.embed_dim,
    }
  return VitPytorchCvT(num_classes=model.num_classes, channels=model.in_channels, **keys)
