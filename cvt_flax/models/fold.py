"""Batch norms folded into the layers around them, for inference."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from cvt_flax.models.compact import CompactViT
from cvt_flax.models.cvt import CvT
from cvt_flax.models.layers import EPSILON
from cvt_flax.models.options import StageOptions, resolve

# Modules that compute in float32 whatever the model's dtype is.
_FLOAT32 = ('norm', 'norm1', 'norm2', 'seq_pool', 'head')


def fold(
  model: CvT | CompactViT, variables: Mapping
) -> tuple[CvT | CompactViT, dict[str, Mapping]]:
  """Returns a model and variables for inference that give the same logits with less.

      model, variables = fold(*load_pretrained('CvT-13-224x224-IN-1k.pth'))

  Every batch norm is gone. What it multiplies by is in the kernel of the depthwise convolution
  before it; what it adds is in the biases of the linear layers after it, or, where there is a class
  token or no such bias, a bias of the convolution. Kernels and biases that the model would round to
  its `dtype` anyway are kept in that, so that with `model.clone(dtype=jnp.bfloat16)` they take half
  the memory. A model without batch norms keeps its layers.

  Args:
    model: the network.
    variables: {'params', 'batch_stats'}.

  Returns:
    The model, with projection 'dw' in place of 'dw_bn', and {'params'}.

  Raises:
    ValueError: the variables are not those of the model.
  """
  params = traverse_util.flatten_dict(variables['params'])
  if isinstance(model, CvT) and model.projection == 'dw_bn':
    statistics = traverse_util.flatten_dict(variables.get('batch_stats', {}))
    for s, options in enumerate(resolve(model)):
      for j in range(options.depth):
        try:
          _fold_block(options, params, statistics, (f'stage{s}', f'blocks_{j}', 'attn'))
        except KeyError as e:
          missing = '/'.join(e.args[0])
          raise ValueError(f'the variables are not those of the model: no {missing}') from e
    model = model.clone(projection='dw', bn_group_size=0)
  params = {path: _stored(model, path, value) for path, value in params.items()}
  return model, {'params': traverse_util.unflatten_dict(params)}


def _fold_block(options: StageOptions, params: dict, statistics: dict, attention: tuple) -> None:
  """Replaces the parameters of one attention's convolutions, batch norms and linear layers."""
  for names in ('q', 'kv') if options.shared_kv else 'qkv':
    convolution = (*attention, f'conv_proj_{names}')
    norm = (*convolution, 'bn')
    scale, shift = (np.asarray(params.pop((*norm, x)), np.float64) for x in ('scale', 'bias'))
    mean, var = (np.asarray(statistics[*norm, x], np.float64) for x in ('mean', 'var'))
    gain = scale / np.sqrt(var + EPSILON)
    level = shift - mean * gain
    _change(params, (*convolution, 'conv', 'kernel'), lambda kernel, gain=gain: kernel * gain)
    if options.dw_bias:
      params[*convolution, 'conv', 'bias'] = jnp.asarray(level, jnp.float32)
      continue
    for name in names:
      linear = (*attention, f'proj_{name}')
      moved = level @ np.asarray(params[*linear, 'kernel'], np.float64)
      _change(params, (*linear, 'bias'), lambda bias, moved=moved: bias + moved)


def _change(params: dict, path: tuple, change) -> None:
  params[path] = jnp.asarray(change(np.asarray(params[path], np.float64)), jnp.float32)


def _stored(model: CvT | CompactViT, path: tuple, value: jax.Array) -> jax.Array:
  """Returns a parameter in the dtype that it is kept in."""
  rounded = path[-1] in ('kernel', 'bias') and not set(path) & set(_FLOAT32)
  return jnp.asarray(value, model.dtype if rounded else None)
