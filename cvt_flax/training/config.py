"""Every key of a config: its default, what it means, what it may be, when it is used.

The dataclasses below are the only declaration. `get_config()` turns them into the ConfigDict that
files in configs/ change and `--config.key=value` overrides; `freeze` turns that back, checked, and
is what the training code works with. An empty value ('', 0 or ()) means "off" or "the default
of what it belongs to": ml_collections cannot override None.
"""

from __future__ import annotations

import dataclasses
import shlex
import typing
from collections.abc import Iterator, Mapping

import ml_collections

from cvt_flax.errors import UserError, nearest
from cvt_flax.training import config_uses as uses
from cvt_flax.training.config_checks import CHECKS
from cvt_flax.training.config_values import check_value, key, typed


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The network. '', 0 and () keep the named model's, but for precision, groups and remat.

  Keys of every stage are those of a CvT; width to drop_path_rate are a CompactViT's.
  """

  name: str = key('cvt-13', 'a name of cvt_flax.list_models()')
  dtype: str = key(
    'float32', 'of the computation; parameters are float32', allowed=('float32', 'bfloat16')
  )
  bn_group_size: int = key(
    0, 'images a batch norm takes its statistics over; 0: the whole batch', low=0
  )
  remat: tuple[str, ...] = key(
    (),
    "what every stage's blocks keep for the backward pass: '' is all, 'dots_saveable', "
    "'dots_with_no_batch_dims_saveable', 'nothing_saveable'",
  )
  embed_dims: tuple[int, ...] = key((), 'channels of every stage', low=1)
  depths: tuple[int, ...] = key((), 'blocks of every stage', low=1)
  num_heads: tuple[int, ...] = key((), 'attention heads of every stage', low=1)
  patch_sizes: tuple[int, ...] = key((), 'kernel of every embedding', low=1)
  patch_strides: tuple[int, ...] = key((), 'stride of every embedding', low=1)
  patch_paddings: tuple[int, ...] = key((), 'padding of every embedding', low=0)
  mlp_ratios: tuple[float, ...] = key((), 'hidden channels of every MLP, by its stage', low=0.0)
  kv_strides: tuple[int, ...] = key((), 'stride of the keys and values of every stage', low=1)
  cls_token: tuple[bool, ...] = key((), 'whether each stage has a class token')
  pos_embed: tuple[int, ...] = key(
    (), "side of the map that each stage's position embedding is for; 0: none", low=0
  )
  qkv_kernels: tuple[int, ...] = key((), 'kernel of the projections of every stage', low=1)
  head_dim: int = key(0, "channels of a head; 0: the stage's, divided by its heads", low=0)
  attention_scale: str = key('', "'embed_dim' or 'head_dim'", allowed=('', 'embed_dim', 'head_dim'))
  activation: str = key(
    '',
    "'quick_gelu', 'gelu' or 'gelu_tanh'",
    allowed=('', 'quick_gelu', 'gelu', 'gelu_tanh'),
  )
  projection: str = key('', "'dw_bn', 'avg' or 'linear'", allowed=('', 'dw_bn', 'avg', 'linear'))
  pool: str = key('', "'cls', 'seq' or 'mean'", allowed=('', 'cls', 'seq', 'mean'))
  drop_rates: tuple[float, ...] = key((), 'dropout of every stage', low=0.0)
  attn_drop_rates: tuple[float, ...] = key((), 'attention dropout of every stage', low=0.0)
  drop_path_rates: tuple[float, ...] = key(
    (), 'drop path of the last block of every stage', low=0.0
  )
  width: int = key(0, 'channels of a token', low=0)
  depth: int = key(0, 'blocks', low=0)
  heads: int = key(0, 'attention heads', low=0)
  mlp_ratio: float = key(0.0, 'hidden channels of the MLP, by the width', low=0.0)
  patch_size: int = key(0, "side of a patch, or kernel of the tokenizer's convolutions", low=0)
  conv_layers: int = key(0, "convolutions of CCT's tokenizer", low=0)
  position: str = key(
    '', "'learnable', 'sine' or 'none'", allowed=('', 'learnable', 'sine', 'none')
  )
  drop_rate: float = key(0.0, 'dropout', low=0.0)
  attn_drop_rate: float = key(0.0, 'attention dropout', low=0.0)
  drop_path_rate: float = key(0.0, 'drop path of the last block', low=0.0)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """The optimizer, its schedule, and what happens to gradients and parameters around it."""

  name: str = key('adamw', 'optimizer', allowed=('adamw', 'adam', 'sgd', 'rmsprop'))
  weight_decay: float = key(
    0.05, 'decoupled for adamw, added to the gradient for the others', low=0.0
  )
  beta1: float = key(
    0.9, 'decay of the first moment', low=0.0, high=1.0, used=uses.optimizer_is('adamw', 'adam')
  )
  beta2: float = key(
    0.999, 'decay of the second moment', low=0.0, high=1.0, used=uses.optimizer_is('adamw', 'adam')
  )
  epsilon: float = key(
    1e-8, 'added to the denominator', low=0.0, used=uses.optimizer_is('adamw', 'adam', 'rmsprop')
  )
  momentum: float = key(
    0.9, 'decay of the velocity', low=0.0, high=1.0, used=uses.optimizer_is('sgd', 'rmsprop')
  )
  nesterov: bool = key(False, "Nesterov's momentum", used=uses.NESTEROV)
  rms_decay: float = key(
    0.99, 'decay of the squared gradient', low=0.0, high=1.0, used=uses.optimizer_is('rmsprop')
  )
  schedule: str = key('cosine', 'of the learning rate', allowed=('cosine', 'constant', 'multistep'))
  schedule_per: str = key(
    'step', 'how often the learning rate moves', allowed=('step', 'epoch'), used=uses.MOVING
  )
  warmup_epochs: float = key(0.0, 'epochs of linear warm-up', low=0.0)
  warmup_learning_rate: float = key(0.0, 'where the warm-up starts', low=0.0, used=uses.WARMUP)
  min_learning_rate: float = key(
    0.0, 'where the cosine ends', low=0.0, used=uses.schedule_is('cosine')
  )
  milestones: tuple[float, ...] = key(
    (),
    'epochs at which the rate is multiplied by gamma',
    low=0.0,
    used=uses.schedule_is('multistep'),
  )
  gamma: float = key(
    0.1, 'what milestones multiply by', low=0.0, used=uses.schedule_is('multistep')
  )
  reference_batch: int = key(
    0, 'learning_rate holds at this batch size and scales with it; 0: no scaling', low=0
  )
  clip_norm: float = key(0.0, 'largest global norm of the gradient; 0: no clipping', low=0.0)
  ema_decay: float = key(
    0.0, 'of the averaged parameters and statistics; 0: none are kept', low=0.0, high=1.0
  )
  accumulate_steps: int = key(1, 'microbatches a step is computed in', low=1)
  freeze: str = key(
    '',
    "what is not trained: 'backbone', all but the head, or an expression for names as in "
    "parameters.txt, 'stage[01]/.*' for example; '' or 'none': nothing",
  )
  layer_decay: float = key(
    1.0,
    "each layer's learning rate, as a share of that of the layer above it; the head's is whole",
    low=0.01,
    high=1.0,
    used=uses.SEVERAL_LAYERS,
  )


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
  """What happens to training images and labels."""

  crop_padding: int = key(
    0, 'pad by so many black pixels, then crop back at random', low=0, used=uses.RESIDENT
  )
  crop_scale: tuple[float, ...] = key(
    (),
    'least and greatest share of the area that a random crop keeps; (): no random resized crop',
    low=0.01,
    high=1.0,
    used=uses.STREAM,
  )
  crop_aspect: tuple[float, ...] = key(
    (3 / 4, 4 / 3),
    'least and greatest width / height of a random crop',
    low=0.1,
    high=10.0,
    used=uses.RANDOM_CROP,
  )
  crop_margin: int = key(
    0, 'squash to image_size and so many pixels more, then crop at random', low=0, used=uses.MARGIN
  )
  interpolation: str = key(
    'bicubic',
    'of random crops and of RandAugment; evaluation is bicubic',
    allowed=('bicubic', 'bilinear'),
    used=uses.FILTER,
  )
  flip: bool = key(False, 'mirror half of the images')
  rand_augment: str = key(
    '', "as timm writes it, 'rand-m9-mstd0.5-inc1'; '': none", used=uses.STREAM
  )
  color_jitter: tuple[float, ...] = key(
    (),
    'most that brightness, contrast, saturation and, if a fourth is given, hue change; (): off',
    low=0.0,
    used=uses.JITTER,
  )
  trivial_augment: bool = key(
    False, 'TrivialAugmentWide: one random operation an image', used=uses.RESIDENT
  )
  repeats: int = key(
    1,
    'times that an image comes in an epoch, of a share of the images as small',
    low=1,
    used=uses.STREAM,
  )
  mixup: float = key(0.0, 'alpha of Mixup; 0: off', low=0.0)
  cutmix: float = key(0.0, 'alpha of CutMix; 0: off', low=0.0)
  mix_prob: float = key(
    1.0, 'probability of mixing a group of images', low=0.0, high=1.0, used=uses.MIXING
  )
  switch_prob: float = key(
    0.5, 'probability of CutMix when both are on', low=0.0, high=1.0, used=uses.BOTH_MIXINGS
  )
  label_smoothing: float = key(
    0.0, 'share of the target spread over all classes', low=0.0, high=1.0
  )
  erase_prob: float = key(0.0, 'probability of random erasing, an image', low=0.0, high=1.0)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Evaluation."""

  every_epochs: int = key(1, 'epochs between two evaluations of the validation split', low=1)
  batch_size: int = key(0, 'global; 0: batch_size', low=0)
  holdout: float = key(
    0.1,
    'share of train (at most 5,000 images) to validate on where a source brings no split; 0: none',
    low=0.0,
    high=0.5,
  )
  test_holdout: float = key(
    0.0,
    'share of train to test on where a source brings no test split; 0: none',
    low=0.0,
    high=0.5,
  )
  sets: tuple[str, ...] = key(
    (), "sources that the best checkpoint is scored on too, 'tfds:imagenet_v2' for example"
  )


@dataclasses.dataclass(frozen=True)
class StreamConfig:
  """The streaming engine."""

  workers: int = key(
    0,
    'processes that decode, on every host; 0: one a core, or threads where cores are few, or '
    'arrays are in memory',
    low=0,
    used=uses.STREAMED,
  )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """The devices."""

  data: int = key(0, 'copies of the model, the batch is split over; 0: as many as devices', low=0)
  fsdp: int = key(1, 'devices that share a copy of parameters and optimizer state', low=1)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """Checkpoints: one at every evaluation and at the end; these keys add to that."""

  every_steps: int = key(0, 'one more checkpoint every so many steps; 0: none', low=0)
  keep: int = key(2, 'how many of the latest checkpoints to keep; the best is kept besides', low=1)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """A run."""

  name: str = key('', 'of the experiment; names the run folder')
  init_from: str = key(
    '',
    'weights to start from: a .pth file, a folder of weights, a run folder, hf:NAME or '
    'cvt-nano-cifar10',
  )
  seed: int = key(0, 'of everything that is random', low=0, high=2**32 - 1)
  seeds: int = key(1, 'runs with seed, seed + 1, ... one after another, each in DIR/seed-N', low=1)
  source: str = key('', 'tfds:NAME[:VERSION], folder:DIR, csv:FILE, npz:FILE or digits')
  engine: str = key(
    'resident',
    'resident: images lie decoded on the devices; stream: they are read and decoded as they come',
    allowed=('resident', 'stream'),
  )
  data_dir: str = key('', "where TFDS keeps its data sets; '': its own default", used=uses.TFDS)
  skip_unreadable: bool = key(
    False,
    'leave out images that cannot be decoded, and say which (of several hosts, those of the first)',
    used=uses.ENCODED,
  )
  train_share: float = key(
    1.0, 'share of the training images that is trained on, of every class', low=0.0, high=1.0
  )
  image_size: int = key(224, 'height and width, in pixels', low=1)
  crop_ratio: float = key(
    1.0, 'share of the shorter side that the crop keeps; 0: squash, cut nothing', low=0.0, high=1.0
  )
  mean: tuple[float, ...] = key(
    (0.485, 0.456, 0.406), 'of the pixels, 0 to 1, a channel', low=0.0, high=1.0
  )
  std: tuple[float, ...] = key((0.229, 0.224, 0.225), 'of the pixels, 0 to 1, a channel', low=1e-6)
  batch_size: int = key(128, 'images a step, over all devices', low=1)
  epochs: int = key(10, 'passes over the training images', low=1)
  steps: int = key(0, 'batches to train on, in place of epochs; 0: epochs', low=0)
  learning_rate: float = key(
    1e-3, 'the highest, at optimizer.reference_batch images a step', low=0.0
  )
  loss: str = key(
    'softmax',
    'softmax: cross entropy, a logit for each class; binary: of two classes, one logit for both',
    allowed=('softmax', 'binary'),
  )
  class_weights: tuple[float, ...] = key(
    (), 'what the training loss of each class counts, in the order of the classes; (): 1', low=0.0
  )
  balance_classes: bool = key(
    False, 'class_weights by which every class counts the same in sum, however many images it has'
  )
  log_every: int = key(50, 'steps between two lines of training metrics', low=1)
  tensorboard: bool = key(True, 'write TensorBoard events')
  closing_note: str = key('', 'printed when the run is finished')
  model: ModelConfig = ModelConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  augment: AugmentConfig = AugmentConfig()
  eval: EvalConfig = EvalConfig()
  stream: StreamConfig = StreamConfig()
  mesh: MeshConfig = MeshConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()


def get_config() -> ml_collections.ConfigDict:
  """Returns all keys with their defaults, for a file in configs/ to change. Keys are locked."""
  return ml_collections.ConfigDict(dataclasses.asdict(TrainConfig())).lock()


def keys(declaration=TrainConfig, prefix='') -> Iterator[tuple[str, dataclasses.Field, type]]:
  """Yields every key as (dotted name, its declaration, its type)."""
  types = typing.get_type_hints(declaration)
  for field in dataclasses.fields(declaration):
    if dataclasses.is_dataclass(types[field.name]):
      yield from keys(types[field.name], f'{prefix}{field.name}.')
    else:
      yield f'{prefix}{field.name}', field, types[field.name]


def unknown_key(name: str) -> UserError:
  """Returns the error for a key that is not declared."""
  known = [k for k, _, _ in keys()]
  same_end = [k for k in known if k.rpartition('.')[2] == name.rpartition('.')[2]]
  hint = f', did you mean {same_end[0]!r}?' if same_end else nearest(name, known)
  return UserError(f'config has no key {name!r}{hint}')


def freeze(config: ml_collections.ConfigDict | dict) -> TrainConfig:
  """Checks a config and returns it as frozen dataclasses.

  Raises:
    UserError: for an unknown, missing, mistyped or out-of-range key, or one that is off its default
      and without effect.
  """
  if isinstance(config, ml_collections.ConfigDict):
    config = config.to_dict()
  frozen = _build(TrainConfig, config, '')
  for name, field, _ in keys():
    check_value(name, field, _get(frozen, name))
  for name, field, _ in keys():
    used = field.metadata['used']
    if used and _get(frozen, name) != field.default and not used[0](frozen):
      raise UserError(f'{name}={_get(frozen, name)!r} has no effect: it is used when {used[1]}')
  for check in CHECKS:
    check(frozen)
  return frozen


def to_dict(config: TrainConfig) -> dict:
  """Returns the config as nested dicts of JSON values."""
  return dataclasses.asdict(config)


def differences(a: TrainConfig, b: TrainConfig) -> dict[str, tuple]:
  """Returns the keys in which two configs differ, as {dotted name: (value of a, value of b)}."""
  pairs = {name: (_get(a, name), _get(b, name)) for name, _, _ in keys()}
  return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def flags(values: Mapping) -> str:
  """Returns the flags that give keys of a config these values, quoted for a shell."""
  return ' '.join(f'--config.{name}={shlex.quote(str(value))}' for name, value in values.items())


def _get(config, name):
  for part in name.split('.'):
    config = getattr(config, part)
  return config


def _build(declaration, values, prefix):
  if not isinstance(values, dict):
    raise UserError(f'{prefix[:-1]}={values!r}: a group of keys is needed')
  types = typing.get_type_hints(declaration)
  for name in values:
    if name not in types:
      raise unknown_key(f'{prefix}{name}')
  built = {}
  for name, kind in types.items():
    if name not in values:
      raise UserError(f'config lacks the key {prefix + name!r}: start from a config that is there')
    if dataclasses.is_dataclass(kind):
      built[name] = _build(kind, values[name], f'{prefix}{name}.')
    else:
      built[name] = typed(f'{prefix}{name}', values[name], kind)
  return declaration(**built)
