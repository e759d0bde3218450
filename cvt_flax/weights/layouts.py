"""Names and shapes of a model's tensors in PyTorch: one table for each code base.

A table says what a module of ours is called elsewhere. It is read in both directions: the tensors
of a model are listed with their foreign names and shapes, so that what is missing, left over or of
another shape shows before anything is read or written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from flax import traverse_util

from cvt_flax.errors import UserError
from cvt_flax.models.compact import CompactViT, sine_embedding
from cvt_flax.models.compact_options import resolve_compact
from cvt_flax.models.cvt import CvT
from cvt_flax.weights.tensor_checks import COUNTER, Path, check, check_numbers, leaf_shapes

Shapes = Mapping[str, tuple[int, ...]]  # of tensors, by their names

# PyTorch's name of a leaf, where it is not ours.
_LEAVES = {'kernel': 'weight', 'scale': 'weight', 'mean': 'running_mean', 'var': 'running_var'}
# What sines that were kept in float16 or bfloat16 are off by at most.
_ROUNDED = 2**-8
# From our axes to PyTorch's, by their number: linear [in out], convolutions [h w in out].
_TRANSPOSED = {2: (1, 0), 4: (3, 2, 0, 1)}


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A foreign tensor, and the leaves of our tree that it holds.

  Attributes:
    name: in the foreign state dict.
    shape: there.
    leaves: paths of ours with their shapes; several follow each other along the first axis. A
      counter, and what is no parameter here, hold none.
    constant: what it holds then. A counter may hold any number.
  """

  name: str
  shape: tuple[int, ...]
  leaves: Mapping[Path, tuple[int, ...]]
  constant: np.ndarray | None = None

  def pack(self, leaves: Mapping[Path, np.ndarray]) -> np.ndarray:
    """Returns the foreign tensor, given all leaves of ours."""
    if not self.leaves:
      return self.constant
    parts = [_transpose(np.asarray(leaves[path])) for path in self.leaves]
    # A copy only where there are several: a writer wants them contiguous one at a time.
    return (parts[0] if len(parts) == 1 else np.concatenate(parts)).reshape(self.shape)

  def unpack(self, tensor: np.ndarray) -> dict[Path, np.ndarray]:
    """Returns the leaves of ours, contiguous float32."""
    if not self.leaves:
      return {}
    parts = np.split(tensor, len(self.leaves))
    return {
      path: np.array(_transpose_back(part, shape), np.float32, order='C')
      for (path, shape), part in zip(self.leaves.items(), parts, strict=True)
    }


def _transpose(x):
  return x.transpose(_TRANSPOSED.get(x.ndim, range(x.ndim)))


def _transpose_back(x, shape):
  axes = _TRANSPOSED.get(len(shape), range(len(shape)))
  return x.reshape([shape[axis] for axis in axes]).transpose(np.argsort(axes))


def _pytorch_leaf(module: str, leaf: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
  """Returns the name and the shape of a leaf whose axes are in PyTorch's order."""
  return _LEAVES.get(leaf, leaf), shape


def _renamed(**names: str):
  """Returns `_pytorch_leaf` with other names for some leaves."""

  def leaf(module, leaf, shape):
    name, shape = _pytorch_leaf(module, leaf, shape)
    return names.get(name, name), shape

  return leaf


def _vit_pytorch_leaf(module, leaf, shape):
  """As `_pytorch_leaf`; all layers work on maps, and so norms and linear layers have their axes."""
  if module.rpartition('/')[2].startswith('norm'):
    return {'scale': 'g', 'bias': 'b'}[leaf], (1, *shape, 1, 1)
  if leaf == 'kernel' and len(shape) == 2 and module != 'head':
    return 'weight', (*shape, 1, 1)
  return _pytorch_leaf(module, leaf, shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
  """What a code base calls the tensors of a CvT, or of a CompactViT.

  Attributes:
    name: of the layout.
    modules: {our module: theirs}, with {s} for a stage, {j} for a block, {p} for a projection, {i}
      for a convolution of a tokenizer; '' is the model itself.
    projections: {our letters of a projection: theirs}.
    marker: a tensor's name by which the layout is known.
    activation: that its code computes.
    leaf: (our module, our leaf, its shape with PyTorch's axes) -> its name and shape there.
  """

  name: str
  modules: Mapping[str, str]
  projections: Mapping[str, str]
  marker: str
  activation: str
  leaf: Callable[[str, str, tuple[int, ...]], tuple[str, tuple[int, ...]]] = _pytorch_leaf

  def expand(self, model: CvT | CompactViT) -> dict[str, str]:
    """Returns {our module: theirs} of all modules of `model`, in their order."""
    compact = isinstance(model, CompactViT)
    depths = (model.depth,) if compact else model.depths
    convolutions = model.conv_layers if compact else 0
    names = {}
    for ours, theirs in self.modules.items():
      for s in range(len(depths)) if '{s}' in ours else (0,):
        for j in range(depths[s]) if '{j}' in ours else ('',):
          for i in range(convolutions) if '{i}' in ours else ('',):
            for p, q in self.projections.items() if '{p}' in ours else (('', ''),):
              names[ours.format(s=s, j=j, i=i, p=p)] = theirs.format(s=s, j=j, i=i, p=q)
    return names

  def tensors(self, model: CvT | CompactViT) -> dict[str, Tensor]:
    """Returns {name: Tensor} of all that the layout holds of `model`."""
    modules = self.expand(model)
    found: dict[str, dict] = {}
    for path, shape in leaf_shapes(model).items():
      *module, leaf = path[1:]
      module = '/'.join(module)
      transposed = tuple(shape[axis] for axis in _TRANSPOSED.get(len(shape), range(len(shape))))
      leaf, foreign = self.leaf(module, leaf, transposed)
      held = found.setdefault(f'{modules[module]}.{leaf}', {'shape': foreign, 'leaves': {}})
      held['leaves'][path] = shape
    tensors = {}
    for name, held in found.items():
      first, *rest = held['shape']
      tensors[name] = Tensor(name, (first * len(held['leaves']), *rest), held['leaves'])
      if name.endswith('.running_var'):
        counter = f'{name.rpartition(".")[0]}.{COUNTER}'
        tensors[counter] = Tensor(counter, (), {}, np.zeros((), np.int64))
    if isinstance(model, CompactViT) and model.position == 'sine':
      table = _sine_table(model)
      name = f'{modules[""]}.{self.leaf("", "pos_embed", table.shape)[0]}'
      tensors[name] = Tensor(name, table.shape, {}, table)
    return tensors

  def pack(self, model: CvT | CompactViT, variables: Mapping) -> dict[str, np.ndarray]:
    """Returns the state dict of the layout that holds the variables of `model`, in their dtype.

    Args:
      model: one that the layout can hold, see `architecture.check_expressible`.
      variables: {'params', 'batch_stats'}.
    """
    leaves = {path: np.asarray(x) for path, x in traverse_util.flatten_dict(variables).items()}
    return {name: tensor.pack(leaves) for name, tensor in self.tensors(model).items()}

  def unpack(
    self,
    model: CvT | CompactViT,
    shapes: Shapes,
    read: Callable[[str], np.ndarray],
    source: str,
  ) -> dict:
    """Returns the variables {'params', 'batch_stats'} of `model` that a state dict holds.

    Args:
      model: one that the layout can hold.
      shapes: {name: shape} of the state dict.
      read: name -> tensor; called once for each, when all names and shapes are known to fit.
      source: where the tensors are, for the message.

    Raises:
      UserError: listing all tensors that are missing, left over or of another shape.
    """
    tensors = self.tensors(model)
    check(source, {name: tensor.shape for name, tensor in tensors.items()}, shapes)
    leaves = {}
    for name in shapes:
      tensor = read(name)
      counter = name.endswith(f'.{COUNTER}')
      check_numbers(source, name, tensor, counter)
      if not (counter or tensors[name].leaves):
        _check_sines(source, name, tensor, tensors[name].constant)
      leaves |= tensors[name].unpack(tensor)
    return {'batch_stats': {}} | traverse_util.unflatten_dict(leaves)


def unpack_own(
  model: CvT | CompactViT,
  shapes: Shapes,
  read: Callable[[str], np.ndarray],
  source: str,
) -> dict:
  """As `Layout.unpack`, of tensors that have our names and axes."""
  paths = leaf_shapes(model)
  check(source, paths, shapes)
  leaves = {}
  for path in paths:
    tensor = read('/'.join(path))
    check_numbers(source, '/'.join(path), tensor)
    leaves[path] = np.array(tensor, np.float32)
  return {'batch_stats': {}} | traverse_util.unflatten_dict(leaves)


# lib/models/cls_cvt.py of github.com/microsoft/CvT.
_BLOCK = 'stage{s}.blocks.{j}'
OFFICIAL = Layout(
  'official',
  {
    'stage{s}': 'stage{s}',
    'stage{s}/patch_embed/proj': 'stage{s}.patch_embed.proj',
    'stage{s}/patch_embed/norm': 'stage{s}.patch_embed.norm',
    'stage{s}/blocks_{j}/norm1': f'{_BLOCK}.norm1',
    'stage{s}/blocks_{j}/attn/conv_proj_{p}/conv': f'{_BLOCK}.attn.conv_proj_{{p}}.conv',
    'stage{s}/blocks_{j}/attn/conv_proj_{p}/bn': f'{_BLOCK}.attn.conv_proj_{{p}}.bn',
    'stage{s}/blocks_{j}/attn/proj_{p}': f'{_BLOCK}.attn.proj_{{p}}',
    'stage{s}/blocks_{j}/attn/proj': f'{_BLOCK}.attn.proj',
    'stage{s}/blocks_{j}/norm2': f'{_BLOCK}.norm2',
    'stage{s}/blocks_{j}/mlp/fc1': f'{_BLOCK}.mlp.fc1',
    'stage{s}/blocks_{j}/mlp/fc2': f'{_BLOCK}.mlp.fc2',
    'norm': 'norm',
    'head': 'head',
  },
  {'q': 'q', 'k': 'k', 'v': 'v'},
  marker='stage0.patch_embed.proj.weight',
  activation='quick_gelu',
)

# CvtForImageClassification of transformers, models/cvt/modeling_cvt.py.
_STAGE = 'cvt.encoder.stages.{s}'
_LAYER = f'{_STAGE}.layers.{{j}}'
_PROJECTION = f'{_LAYER}.attention.attention.convolution_projection_{{p}}.convolution_projection'
HUGGING_FACE = Layout(
  'huggingface',
  {
    'stage{s}': _STAGE,
    'stage{s}/patch_embed/proj': f'{_STAGE}.embedding.convolution_embeddings.projection',
    'stage{s}/patch_embed/norm': f'{_STAGE}.embedding.convolution_embeddings.normalization',
    'stage{s}/blocks_{j}/norm1': f'{_LAYER}.layernorm_before',
    'stage{s}/blocks_{j}/attn/conv_proj_{p}/conv': f'{_PROJECTION}.convolution',
    'stage{s}/blocks_{j}/attn/conv_proj_{p}/bn': f'{_PROJECTION}.normalization',
    'stage{s}/blocks_{j}/attn/proj_{p}': f'{_LAYER}.attention.attention.projection_{{p}}',
    'stage{s}/blocks_{j}/attn/proj': f'{_LAYER}.attention.output.dense',
    'stage{s}/blocks_{j}/norm2': f'{_LAYER}.layernorm_after',
    'stage{s}/blocks_{j}/mlp/fc1': f'{_LAYER}.intermediate.dense',
    'stage{s}/blocks_{j}/mlp/fc2': f'{_LAYER}.output.dense',
    'norm': 'layernorm',
    'head': 'classifier',
  },
  {'q': 'query', 'k': 'key', 'v': 'value'},
  marker='cvt.encoder.stages.0.embedding.convolution_embeddings.projection.weight',
  activation='gelu',
)

# vit_pytorch/cvt.py of github.com/lucidrains/vit-pytorch. Keys and values are one projection there,
# keys first.
_ATTENTION = 'layers.{s}.2.layers.{j}.0'
_MLP = 'layers.{s}.2.layers.{j}.1.net'
VIT_PYTORCH = Layout(
  'vit-pytorch',
  {
    'stage{s}/patch_embed/proj': 'layers.{s}.0',
    'stage{s}/patch_embed/norm': 'layers.{s}.1',
    'stage{s}/blocks_{j}/norm1': f'{_ATTENTION}.norm',
    'stage{s}/blocks_{j}/attn/conv_proj_{p}/conv': f'{_ATTENTION}.to_{{p}}.net.0',
    'stage{s}/blocks_{j}/attn/conv_proj_{p}/bn': f'{_ATTENTION}.to_{{p}}.net.1',
    'stage{s}/blocks_{j}/attn/proj_{p}': f'{_ATTENTION}.to_{{p}}.net.2',
    'stage{s}/blocks_{j}/attn/proj': f'{_ATTENTION}.to_out.0',
    'stage{s}/blocks_{j}/norm2': f'{_MLP}.0',
    'stage{s}/blocks_{j}/mlp/fc1': f'{_MLP}.1',
    'stage{s}/blocks_{j}/mlp/fc2': f'{_MLP}.4',
    'head': 'to_logits.2',
  },
  {'q': 'q', 'k': 'kv', 'v': 'kv', 'kv': 'kv'},
  marker='layers.0.2.layers.0.0.to_kv.net.2.weight',
  activation='gelu',
  leaf=_vit_pytorch_leaf,
)

# vit.py of github.com/tintn/vision-transformer-from-scratch with use_faster_attention, and of
# github.com/francischen0724, whose sequence pooling stands in place of the class token. Heads with
# projections of their own are merged before: see cvt_flax.weights.compact.
_ENCODER = 'encoder.blocks.{j}'
VIT_FROM_SCRATCH = Layout(
  'vit-from-scratch',
  {
    '': 'embedding',
    'patch_embed/proj': 'embedding.patch_embeddings.projection',
    'blocks_{j}/norm1': f'{_ENCODER}.layernorm_1',
    'blocks_{j}/attn/qkv': f'{_ENCODER}.attention.qkv_projection',
    'blocks_{j}/attn/proj': f'{_ENCODER}.attention.output_projection',
    'blocks_{j}/norm2': f'{_ENCODER}.layernorm_2',
    'blocks_{j}/mlp/fc1': f'{_ENCODER}.mlp.dense_1',
    'blocks_{j}/mlp/fc2': f'{_ENCODER}.mlp.dense_2',
    'seq_pool/score': 'pooling.attention_pool',
    'head': 'classifier',
  },
  {},
  marker='embedding.patch_embeddings.projection.weight',
  activation='gelu_tanh',
  leaf=_renamed(pos_embed='position_embeddings'),
)

# src/ of github.com/SHI-Labs/Compact-Transformers: CCT, and ViT-Lite and CVT, which have patches.
_SHI = 'classifier.blocks.{j}'
COMPACT_TRANSFORMERS = Layout(
  'compact-transformers',
  {
    '': 'classifier',
    'patch_embed/proj': 'tokenizer.conv_layers.0.0',
    'tokenizer/conv_{i}': 'tokenizer.conv_layers.{i}.0',
    'blocks_{j}/norm1': f'{_SHI}.pre_norm',
    'blocks_{j}/attn/qkv': f'{_SHI}.self_attn.qkv',
    'blocks_{j}/attn/proj': f'{_SHI}.self_attn.proj',
    'blocks_{j}/norm2': f'{_SHI}.norm1',
    'blocks_{j}/mlp/fc1': f'{_SHI}.linear1',
    'blocks_{j}/mlp/fc2': f'{_SHI}.linear2',
    'norm': 'classifier.norm',
    'seq_pool/score': 'classifier.attention_pool',
    'head': 'classifier.fc',
  },
  {},
  marker='classifier.blocks.0.pre_norm.weight',
  activation='gelu',
  leaf=_renamed(cls_token='class_emb', pos_embed='positional_emb'),
)

LAYOUTS = {
  layout.name: layout
  for layout in (OFFICIAL, HUGGING_FACE, VIT_PYTORCH, VIT_FROM_SCRATCH, COMPACT_TRANSFORMERS)
}


def _sine_table(model):
  """Returns the position embedding of sines [1 n c], which PyTorch keeps among the parameters."""
  height, width = resolve_compact(model).map_size(model.image_size, model.image_size)
  return sine_embedding(height * width + (model.pool == 'cls'), model.width)[None]


def _check_sines(source, name, tensor, table):
  """Raises a UserError when a tensor holds other positions than the sines that a model adds."""
  if not np.allclose(np.asarray(tensor, np.float32), table, atol=_ROUNDED):
    raise UserError(
      f"{source}: {name} holds learnt positions, and the model adds sines: position='learnable' "
      'is needed'
    )
