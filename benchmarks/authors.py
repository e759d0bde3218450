"""The authors' network, from a checkout of github.com/microsoft/CvT, on today's PyTorch."""

import collections.abc
import functools
import importlib.util
import logging
import pathlib
import sys
import types
import warnings

import torch

from cvt_flax.models.options import resolve
from cvt_flax.weights.layouts import OFFICIAL


def build(checkout, model, variables):
  """Returns their ConvolutionalVisionTransformer with our variables, in evaluation mode.

  Args:
    checkout: the folder that has lib/models/cls_cvt.py.
    model: a CvT that their layout can hold.
    variables: {'params', 'batch_stats'}.
  """
  code = _load(pathlib.Path(checkout))
  stages = resolve(model)

  def each(attribute):
    return [getattr(o, attribute) for o in stages]

  n = len(stages)
  spec = {
    'NUM_STAGES': n,
    'PATCH_SIZE': each('patch_size'),
    'PATCH_STRIDE': each('patch_stride'),
    'PATCH_PADDING': each('patch_padding'),
    'DIM_EMBED': each('embed_dim'),
    'DEPTH': each('depth'),
    'NUM_HEADS': each('num_heads'),
    'MLP_RATIO': list(model.mlp_ratios),
    'QKV_BIAS': each('qkv_bias'),
    'DROP_RATE': [0.0] * n,
    'ATTN_DROP_RATE': [0.0] * n,
    'DROP_PATH_RATE': [0.0] * n,
    'CLS_TOKEN': each('cls_token'),
    'QKV_PROJ_METHOD': each('projection'),
    'KERNEL_QKV': each('qkv_kernel'),
    'PADDING_Q': each('qkv_padding'),
    'PADDING_KV': each('qkv_padding'),
    'STRIDE_KV': each('kv_stride'),
    'STRIDE_Q': each('q_stride'),
  }
  module = code.ConvolutionalVisionTransformer(
    num_classes=model.num_classes,
    act_layer=code.QuickGELU,
    norm_layer=functools.partial(code.LayerNorm, eps=1e-5),
    init='trunc_norm',
    spec=spec,
  )
  state = OFFICIAL.pack(model, variables)
  tensors = {name: torch.tensor(tensor) for name, tensor in state.items()}
  module.load_state_dict(tensors, strict=True)
  return module.eval()


def run(module, images):
  """Returns the logits and the stage maps [b h w c] for images [b h w 3]."""
  maps = []
  stages = [getattr(module, f'stage{s}') for s in range(module.num_stages)]
  hooks = [
    stage.register_forward_hook(lambda _, __, output: maps.append(output[0])) for stage in stages
  ]
  with torch.inference_mode():
    logits = module(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
  for hook in hooks:
    hook.remove()
  logits = logits.reshape(len(images), -1)  # they squeeze away the axis of a single image
  return logits.numpy(), [x.numpy().transpose(0, 2, 3, 1) for x in maps]


@functools.cache
def _load(checkout):
  """Imports lib/models/cls_cvt.py, which asks for timm 0.3 and a module PyTorch has dropped."""
  six = types.ModuleType('torch._six')
  six.container_abcs = collections.abc
  layers = types.ModuleType('timm.models.layers')
  layers.DropPath = torch.nn.Identity  # its rate is 0 here
  layers.trunc_normal_ = torch.nn.init.trunc_normal_
  registry = types.ModuleType('authors.registry')
  registry.register_model = lambda function: function
  stand_ins = {
    'torch._six': six,
    'timm': types.ModuleType('timm'),
    'timm.models': types.ModuleType('timm.models'),
    'timm.models.layers': layers,
    'authors': types.ModuleType('authors'),
    'authors.registry': registry,
  }
  path = checkout / 'lib' / 'models' / 'cls_cvt.py'
  spec = importlib.util.spec_from_file_location('authors.cls_cvt', path)
  code = importlib.util.module_from_spec(spec)
  logging.disable(logging.INFO)  # it tells of every layer that it initialises
  try:
    sys.modules.update(stand_ins)
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', SyntaxWarning)  # it compares with literals by 'is'
      spec.loader.exec_module(code)
  finally:
    for name in stand_ins:
      sys.modules.pop(name, None)
  return code
