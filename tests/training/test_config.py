"""The keys: that each is documented, overridable, checked, and read by something."""

import ast
import dataclasses
import importlib.util
import inspect
import json
import pathlib
import re

import ml_collections
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

import cvt_flax
from cvt_flax.errors import UserError
from cvt_flax.models.compact import CompactViT
from cvt_flax.models.cvt import CvT
from cvt_flax.training.config import (
  differences,
  freeze,
  get_config,
  keys,
  to_dict,
)
from cvt_flax.training.network import build_model

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHIPPED = sorted(p for p in (ROOT / 'configs').glob('*.py') if p.stem != '__init__')
KEYS = {name: (field, kind) for name, field, kind in keys()}

# For every key that has no effect always: changes to the defaults under which it has none, changes
# under which it has one, and a value that is not its default.
USED = {
  'optimizer.schedule_per': (
    {'optimizer.schedule': 'constant'},
    {'optimizer.schedule': 'cosine'},
    'epoch',
  ),
  'data_dir': ({'source': 'digits'}, {'source': 'tfds:cifar10'}, '/data'),
  'skip_unreadable': ({'source': 'npz:x.npz'}, {'source': 'folder:x'}, True),
  'optimizer.beta1': ({'optimizer.name': 'sgd'}, {'optimizer.name': 'adam'}, 0.8),
  'optimizer.beta2': ({'optimizer.name': 'rmsprop'}, {'optimizer.name': 'adamw'}, 0.95),
  'optimizer.epsilon': ({'optimizer.name': 'sgd'}, {'optimizer.name': 'rmsprop'}, 1e-6),
  'optimizer.momentum': ({'optimizer.name': 'adam'}, {'optimizer.name': 'sgd'}, 0.5),
  'optimizer.nesterov': ({'optimizer.name': 'rmsprop'}, {'optimizer.name': 'sgd'}, True),
  'optimizer.rms_decay': ({'optimizer.name': 'sgd'}, {'optimizer.name': 'rmsprop'}, 0.9),
  'optimizer.warmup_learning_rate': ({}, {'optimizer.warmup_epochs': 2}, 1e-6),
  'optimizer.min_learning_rate': (
    {'optimizer.schedule': 'constant'},
    {'optimizer.schedule': 'cosine'},
    1e-5,
  ),
  'optimizer.milestones': (
    {'optimizer.schedule': 'constant'},
    {'optimizer.schedule': 'multistep'},
    (3.0, 6.0),
  ),
  'optimizer.gamma': (
    {'optimizer.schedule': 'cosine'},
    {'optimizer.schedule': 'multistep', 'optimizer.milestones': (3.0,)},
    0.5,
  ),
  'optimizer.layer_decay': (
    {'optimizer.freeze': 'backbone', 'init_from': 'weights'},
    {'optimizer.freeze': ''},
    0.7,
  ),
  'augment.crop_padding': ({'engine': 'stream'}, {'engine': 'resident'}, 4),
  'augment.trivial_augment': ({'engine': 'stream'}, {'engine': 'resident'}, True),
  'augment.crop_scale': ({'engine': 'resident'}, {'engine': 'stream'}, (0.08, 1.0)),
  'augment.crop_aspect': (
    {'engine': 'stream'},
    {'engine': 'stream', 'augment.crop_scale': (0.5, 1.0)},
    (0.5, 2.0),
  ),
  'augment.crop_margin': (
    {'engine': 'stream', 'augment.crop_scale': (0.5, 1.0)},
    {'engine': 'stream', 'augment.crop_scale': ()},
    32,
  ),
  'augment.interpolation': (
    {'engine': 'stream'},
    {'engine': 'stream', 'augment.crop_margin': 32},
    'bilinear',
  ),
  'augment.rand_augment': ({}, {'engine': 'stream'}, 'rand-m9-mstd0.5-inc1'),
  'augment.color_jitter': (
    {'engine': 'stream', 'augment.rand_augment': 'rand-m9-mstd0.5-inc1'},
    {'engine': 'stream'},
    (0.4, 0.4, 0.4),
  ),
  'augment.repeats': ({}, {'engine': 'stream'}, 3),
  'stream.workers': ({}, {'engine': 'stream'}, 4),
  'augment.mix_prob': ({}, {'augment.cutmix': 1.0}, 0.5),
  'augment.switch_prob': (
    {'augment.mixup': 0.8},
    {'augment.mixup': 0.8, 'augment.cutmix': 1.0},
    0.3,
  ),
}


def config_with(changes=None, /):
  """Returns the defaults, a source, and the changes {dotted name: value}, as nested dicts."""
  config = get_config().to_dict() | {'source': 'digits'}
  for name, value in (changes or {}).items():
    group, _, last = name.rpartition('.')
    (config[group] if group else config)[last] = value
  return config


def value_of(config, name):
  for part in name.split('.'):
    config = getattr(config, part)
  return config


def element(kind):
  """Returns the type of one number (or word) of a key's type."""
  return kind.__args__[0] if hasattr(kind, '__args__') else kind


def test_what_is_scored_besides_counts_for_keys_of_sources():
  sets = {'source': 'npz:x.npz', 'eval.sets': ('tfds:imagenet_v2',)}
  config = freeze(config_with(sets | {'data_dir': '/data', 'skip_unreadable': True}))
  assert config.data_dir == '/data' and config.skip_unreadable


def refused(changes):
  """Returns the message with which freeze refuses the changes."""
  with pytest.raises(UserError) as error:
    freeze(config_with(changes))
  message = str(error.value)
  assert '\n' not in message
  return message


# What every key must have.


@pytest.mark.parametrize('name', KEYS)
def test_every_key_says_what_it_means(name):
  field, kind = KEYS[name]
  assert len(field.metadata['doc']) > 5
  assert element(kind) in (str, int, float, bool)
  default = field.default
  assert default is not None and not isinstance(default, list)  # these cannot be overridden
  for number in default if isinstance(default, tuple) else (default,):
    assert type(number) is element(kind)


def other_value(name):
  """Returns a valid value of the key that is not its default, and how a person types it."""
  field, kind = KEYS[name]
  if allowed := field.metadata['allowed']:
    value = next(a for a in reversed(allowed) if a != field.default)
    return value, value
  number = {str: 'a word', int: 7, float: 0.25, bool: True}[element(kind)]
  if element(kind) is kind:
    value = not field.default if kind is bool else number
    return value, str(value)
  value = (number, number, number)
  return value, repr(value)


def parse(config, *arguments):
  """Parses arguments as train.py does, with flags of their own."""
  argv = ['train.py', *arguments]
  values = flags.FlagValues()
  config_flags.DEFINE_config_dict('config', config, flag_values=values, sys_argv=argv)
  values(argv)
  return values.config


def test_every_key_can_be_overridden_by_a_flag():
  values = {name: other_value(name) for name in KEYS}
  config = parse(get_config(), *(f'--config.{name}={text}' for name, (_, text) in values.items()))
  for name, (value, _) in values.items():
    assert value != KEYS[name][0].default, name
    assert value_of(config, name) == value, name
    assert type(value_of(config, name)) is type(value), name


@pytest.mark.parametrize(
  ('arguments', 'name', 'value'),
  [
    (['--config.model.depths=(1, 2, 3)'], 'model.depths', (1, 2, 3)),
    (['--config.model.depths=1', '--config.model.depths=2'], 'model.depths', (1, 2)),
    (['--config.model.depths=(4,)'], 'model.depths', (4,)),
    (['--config.model.cls_token=(False, True)'], 'model.cls_token', (False, True)),
    (['--config.model.drop_path_rates=(0, 0, .1)'], 'model.drop_path_rates', (0.0, 0.0, 0.1)),
    (['--config.std=(1, 1, 1)'], 'std', (1.0, 1.0, 1.0)),
    (['--config.learning_rate=1e-4'], 'learning_rate', 1e-4),
    (['--config.learning_rate=1'], 'learning_rate', 1.0),
    (['--config.batch_size', '96'], 'batch_size', 96),
    (['--config.augment.flip'], 'augment.flip', True),
    (['--noconfig.tensorboard'], 'tensorboard', False),
    (['--config.closing_note='], 'closing_note', ''),
  ],
)
def test_what_people_type_arrives_in_the_declared_type(arguments, name, value):
  frozen = value_of(freeze(parse(ml_collections.ConfigDict(config_with()), *arguments)), name)
  assert frozen == value
  assert type(frozen) is type(value)
  if isinstance(value, tuple):
    assert [type(v) for v in frozen] == [type(v) for v in value]


def test_the_config_is_locked():
  config = get_config()
  assert config.is_locked and config.model.is_locked
  with pytest.raises(AttributeError, match='batchsize'):
    config.batchsize = 3
  with pytest.raises(AttributeError, match='dephts'):
    config.model.dephts = (1,)


def test_every_key_is_read():
  """A key that nothing reads would be ignored without a word."""
  folder = pathlib.Path(cvt_flax.__file__).parent / 'training'
  trees = [
    ast.parse(p.read_text())
    for p in folder.glob('*.py')
    if p.stem not in ('config', 'config_checks')
  ]
  nodes = [node for tree in trees for node in ast.walk(tree)]
  paths = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
  for name in KEYS:
    group, _, last = name.rpartition('.')
    if group == 'model':
      continue  # all of them are passed on to the model: the next test
    owners = f'c|_?config|{group}|{group[0]}' if group else 'c|_?config'
    read = re.compile(rf'(.*\.)?({owners})\.{last}')
    assert any(map(read.fullmatch, paths)), f'{name} is read nowhere'


def test_every_model_key_reaches_the_model():
  changes = {
    'embed_dims': (8, 16, 24),
    'depths': (2, 1, 1),
    'num_heads': (2, 2, 2),
    'patch_sizes': (5, 5, 5),
    'patch_strides': (3, 1, 1),
    'patch_paddings': (0, 0, 0),
    'mlp_ratios': (1.0, 2.0, 3.0),
    'qkv_kernels': (1, 3, 5),
    'kv_strides': (1, 1, 3),
    'head_dim': 8,
    'attention_scale': 'head_dim',
    'activation': 'gelu',
    'cls_token': (True, False, False),
    'pos_embed': (0, 4, 2),
    'projection': 'avg',
    'pool': 'mean',
    'drop_rates': (0.1, 0.2, 0.3),
    'attn_drop_rates': (0.3, 0.2, 0.1),
    'drop_path_rates': (0.0, 0.1, 0.2),
    'remat': ('', 'dots_saveable', 'nothing_saveable'),
  }
  changed = build_model(freeze(config_with({f'model.{k}': v for k, v in changes.items()})).model, 5)
  for name, value in changes.items():
    assert getattr(changed, name) == value
    assert getattr(CvT(), name) != value
  compact = {
    'width': 12,
    'depth': 2,
    'heads': 3,
    'mlp_ratio': 1.5,
    'patch_size': 3,
    'conv_layers': 1,
    'position': 'sine',
    'drop_rate': 0.1,
    'attn_drop_rate': 0.2,
    'drop_path_rate': 0.3,
  }
  config = config_with({'model.name': 'mcvit'} | {f'model.{k}': v for k, v in compact.items()})
  model = build_model(freeze(config).model, 5, image_size=24)
  assert {name: getattr(model, name) for name in compact} == compact
  assert not compact.items() & vars(CompactViT()).items()
  assert (model.pool, model.image_size, model.num_classes) == ('seq', 24, 5)
  config = config_with({'model.dtype': 'bfloat16', 'model.bn_group_size': 32})
  model = build_model(freeze(config).model, 5)
  assert (model.dtype, model.bn_group_size, model.num_classes) == ('bfloat16', 32, 5)
  tested = {*changes, *compact, 'name', 'dtype', 'bn_group_size'}
  assert {f'model.{name}' for name in tested} == {k for k in KEYS if k.startswith('model.')}


def test_model_keys_that_do_not_fit_are_the_users_error():
  with pytest.raises(UserError, match=r"model: .*did you mean 'cvt-13'"):
    build_model(freeze(config_with({'model.name': 'cvt13'})).model, 5)
  with pytest.raises(UserError, match='model: .*num_heads'):
    build_model(freeze(config_with({'model.num_heads': (3, 3, 3)})).model, 5)
  for name, key, value, nearest in (
    ('mcvit', 'num_heads', (3,), 'heads'),
    ('mcvit', 'drop_path_rates', (0.1,), 'drop_path_rate'),
    ('cvt-13', 'depth', 3, 'depths'),
  ):
    changes = {'model.name': name, f'model.{key}': value}
    message = f"model: {name}: .* no attribute '{key}', did you mean '{nearest}'"
    with pytest.raises(UserError, match=message):
      build_model(freeze(config_with(changes)).model, 5)


# The configs that come along.


def load(path):
  spec = importlib.util.spec_from_file_location(f'shipped_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def variants(path):
  """Returns the variants of a config file: the cases that it matches its argument with."""
  cases = [c for node in ast.walk(ast.parse(path.read_text())) for c in getattr(node, 'cases', [])]
  patterns = [case.pattern for case in cases if isinstance(case.pattern, ast.MatchValue)]
  return [ast.literal_eval(pattern.value) for pattern in patterns]


SHIPPED_VARIANTS = [
  pytest.param(path, arguments, id=':'.join([path.stem, *arguments]))
  for path in SHIPPED
  for arguments in ([], *([v] for v in variants(path) if v))
]


@pytest.mark.parametrize(('path', 'arguments'), SHIPPED_VARIANTS)
def test_every_shipped_config_is_valid(path, arguments):
  module = load(path)
  config = module.get_config(*arguments)
  config.source = config.source or 'folder:DIR'  # one is for the user to name
  config = freeze(config)
  assert module.__doc__.splitlines()[0].endswith('.')
  assert config.name.startswith(path.stem)
  build_model(config.model, 10)


@pytest.mark.parametrize(('path', 'arguments'), SHIPPED_VARIANTS)
def test_a_few_steps_of_every_shipped_config_can_be_tried(path, arguments):
  config = load(path).get_config(*arguments)
  config.source = config.source or 'folder:DIR'
  config.steps = 20  # as docs/training.md says it
  config.optimizer.warmup_epochs = config.optimizer.warmup_learning_rate = 0.0
  assert freeze(config).steps == 20


def test_shipped_configs_are_found_with_their_variants():
  assert {p.stem for p in SHIPPED} >= {'digits', 'cvt13_cifar10', 'cvt13_imagenet'}
  assert variants(ROOT / 'configs' / 'cvt13_cifar10.py') == ['', 'small_images']
  assert len(variants(ROOT / 'configs' / 'finetune.py')) == 5


def test_every_shipped_config_has_a_run_folder_of_its_own():
  configs = [pytest_param.values for pytest_param in SHIPPED_VARIANTS]
  names = [load(path).get_config(*arguments).name for path, arguments in configs]
  defaults = [path for path, arguments in configs if not arguments and '' not in variants(path)]
  with_a_default = [path for path in defaults if variants(path)]  # which is one of the others
  assert len(set(names)) == len(names) - len(with_a_default)


@pytest.mark.parametrize('path', [p for p in SHIPPED if variants(p)], ids=lambda p: p.stem)
def test_an_unknown_variant_is_the_users_error(path):
  assert inspect.signature(load(path).get_config).parameters
  with pytest.raises(UserError) as error:
    load(path).get_config('quux')
  assert str(error.value).startswith(f'{path.name}:quux: ')
  assert all(v in str(error.value) for v in variants(path))


# What freeze refuses.


@pytest.mark.parametrize(
  ('name', 'meant'),
  [
    ('btch_size', 'batch_size'),
    ('weight_decay', 'optimizer.weight_decay'),
    ('optimizer.learning_rate', 'learning_rate'),
    ('model.embed_dim', 'model.embed_dims'),
    ('augment.label_smooth', 'augment.label_smoothing'),
    ('quux', None),
  ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(name, meant):
  values = config_with()
  group, _, last = name.rpartition('.')
  (values[group] if group else values)[last] = 1
  with pytest.raises(UserError) as error:
    freeze(values)
  hint = f', did you mean {meant!r}?' if meant else ''
  assert str(error.value) == f'config has no key {name!r}{hint}'


@pytest.mark.parametrize('name', ['seed', 'model', 'model.depths'])
def test_a_missing_key_is_refused(name):
  values = config_with()
  group, _, last = name.rpartition('.')
  del (values[group] if group else values)[last]
  with pytest.raises(UserError, match=f"lacks the key '{name}': start from a config"):
    freeze(values)


@pytest.mark.parametrize(
  ('name', 'value', 'needed'),
  [
    ('batch_size', 64.0, 'an integer'),
    ('batch_size', '64', 'an integer'),
    ('batch_size', True, 'an integer'),
    ('batch_size', None, 'an integer'),
    ('batch_size', np.int64(64), 'an integer'),
    ('learning_rate', '1e-3', 'a number'),
    ('learning_rate', True, 'a number'),
    ('source', 3, 'a string'),
    ('augment.flip', 1, 'true or false'),
    ('augment.flip', 'yes', 'true or false'),
    ('model.depths', 3, 'a tuple of int'),
    ('model.depths', 'abc', 'a tuple of int'),
    ('model.depths', (1, 2.0, 3), 'an integer'),
    ('model.depths', (1, True, 3), 'an integer'),
    ('model.cls_token', (0, 0, 1), 'true or false'),
    ('model.drop_rates', (0.1, '0.1', 0.1), 'a number'),
  ],
)
def test_a_mistyped_value_is_refused(name, value, needed):
  message = refused({name: value})
  assert message.startswith(f'{name}=') and message.endswith(f'{needed} is needed')


def test_a_group_that_is_none_is_refused():
  values = config_with() | {'model': 3}
  with pytest.raises(UserError, match='model=3'):
    freeze(values)


@pytest.mark.parametrize('name', [n for n, (f, _) in KEYS.items() if f.metadata['low'] is not None])
def test_a_value_below_the_least_is_refused(name):
  field, kind = KEYS[name]
  low = field.metadata['low']
  value = low - 1 if element(kind) is int else low - 1e-6
  value = value if element(kind) is kind else (field.default or (low,))[:-1] + (value,)
  assert refused({name: value}) == f'{name}={value!r}: at least {low} is needed'


@pytest.mark.parametrize(
  'name', [n for n, (f, _) in KEYS.items() if f.metadata['high'] is not None]
)
def test_a_value_above_the_highest_is_refused(name):
  field, kind = KEYS[name]
  high = field.metadata['high']
  above = high + (1 if element(kind) is int else 1e-6)
  value = above if element(kind) is kind else (*field.default[:-1], above)
  assert refused({name: value}) == f'{name}={value!r}: at most {high} is allowed'


def test_bounds_are_allowed():
  frozen = freeze(config_with({'crop_ratio': 0.1, 'augment.erase_prob': 1.0, 'eval.holdout': 0.5}))
  assert (frozen.crop_ratio, frozen.augment.erase_prob, frozen.eval.holdout) == (0.1, 1.0, 0.5)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), float('-inf')])
@pytest.mark.parametrize('name', [n for n, (_, kind) in KEYS.items() if element(kind) is float])
def test_a_number_that_is_not_finite_is_refused(name, value):
  kind = KEYS[name][1]
  assert refused({name: value if element(kind) is kind else (value,) * 3}).startswith(f'{name}=')


@pytest.mark.parametrize('name', [n for n, (f, _) in KEYS.items() if f.metadata['allowed']])
def test_a_value_that_is_not_allowed_is_refused(name):
  allowed = KEYS[name][0].metadata['allowed']
  longest = max(allowed, key=len)
  message = refused({name: longest[:-1]})
  assert message.startswith(f'{name}={longest[:-1]!r}: one of ')
  assert all(repr(a) in message for a in allowed if a)
  assert message.endswith(f'did you mean {longest!r}?')


def test_used_has_a_row_for_every_key_that_is_not_always_used():
  assert set(USED) == {name for name, (field, _) in KEYS.items() if field.metadata['used']}


@pytest.mark.parametrize('name', USED)
def test_a_key_without_effect_is_refused_with_the_condition(name):
  without, with_effect, value = USED[name]
  assert value != KEYS[name][0].default
  freeze(config_with(without))
  message = refused(without | {name: value})
  assert message.startswith(f'{name}={value!r} has no effect: it is used when ')
  condition = message.rpartition(' when ')[2]
  for key_of_condition, needed in with_effect.items():
    if key_of_condition != 'optimizer.milestones':  # that the schedule needs, not the key
      assert key_of_condition in condition
      if isinstance(needed, str):
        assert needed.partition(':')[0] in condition
  assert value_of(freeze(config_with(with_effect | {name: value})), name) == value


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'source': ''}, r"^source='': "),
    ({'mean': (0.5,)}, r'^mean=\(0.5,\): three numbers'),
    ({'std': (0.5, 0.5, 0.5, 0.5)}, r'^std=.*: three numbers'),
    ({'epochs': 5, 'optimizer.warmup_epochs': 5}, r'^optimizer.warmup_epochs=5.0: .* 5 epochs'),
    ({'optimizer.schedule': 'multistep'}, r'^optimizer.milestones=\(\): .*at least one'),
    (
      {'optimizer.schedule': 'multistep', 'optimizer.milestones': (3, 2)},
      r'^optimizer.milestones=\(3.0, 2.0\): rising',
    ),
    (
      {'optimizer.schedule': 'multistep', 'optimizer.milestones': (3, 3)},
      r'^optimizer.milestones=\(3.0, 3.0\): rising',
    ),
    (
      {'engine': 'stream', 'augment.crop_scale': (0.5,)},
      r'^augment.crop_scale=\(0.5,\): a least and a greatest',
    ),
    (
      {'engine': 'stream', 'augment.crop_scale': (1, 0.5)},
      r'^augment.crop_scale=\(1.0, 0.5\): a least and a greatest',
    ),
    (
      {'engine': 'stream', 'augment.color_jitter': (0.4, 0.4, 0.4, 0.6)},
      r'^augment.color_jitter=.*: three numbers .* hue up to 0.5',
    ),
    (
      {'engine': 'stream', 'augment.rand_augment': 'rand-m9'},
      r"^augment.rand_augment: RandAugment 'rand-m9' lacks mstd, inc",
    ),
    (
      {'engine': 'stream', 'augment.repeats': 200},
      r'^augment.repeats=200: at most batch_size=128',
    ),
    (
      {'optimizer.schedule_per': 'epoch', 'optimizer.warmup_epochs': 1},
      r'^optimizer.schedule_per=.* the rate of the whole first epoch would be 0',
    ),
    ({'optimizer.ema_decay': 1.0}, r'^optimizer.ema_decay=1.0: '),
    ({'class_weights': (0.0, 0.0)}, r'^class_weights=\(0.0, 0.0\): one above 0'),
    (
      {'class_weights': (1.0, 2.0), 'balance_classes': True},
      r'^class_weights=\(1.0, 2.0\) with balance_classes=true: one of the two is needed',
    ),
    (
      {'batch_size': 96, 'model.bn_group_size': 64},
      r'^model.bn_group_size=64 does not divide batch_size=96$',
    ),
    (
      {'batch_size': 96, 'model.bn_group_size': 32, 'optimizer.accumulate_steps': 2},
      r'^optimizer.accumulate_steps=2 does not divide the 3 groups .*=32 .*=96$',
    ),
    (  # batch norms of a frozen backbone take no statistics, but images are mixed in groups
      {
        'batch_size': 512,
        'model.bn_group_size': 64,
        'optimizer.accumulate_steps': 16,
        'optimizer.freeze': 'backbone',
        'init_from': 'weights',
      },
      r'^optimizer.accumulate_steps=16 does not divide the 8 groups .*=64 .*=512$',
    ),
  ],
)
def test_keys_that_contradict_each_other_are_refused(changes, message):
  assert re.search(message, refused(changes))


def test_keys_that_just_fit_are_accepted():
  freeze(config_with({'epochs': 5, 'optimizer.warmup_epochs': 4.9}))
  freeze(config_with({'optimizer.ema_decay': 0.9999}))
  freeze(config_with({'optimizer.schedule': 'multistep', 'optimizer.milestones': (2, 3)}))
  fits = {'batch_size': 96, 'model.bn_group_size': 24, 'optimizer.accumulate_steps': 2}
  freeze(config_with(fits))
  turned = {'augment.rand_augment': 'rand-m9-mstd0.5-inc1', 'augment.interpolation': 'bilinear'}
  freeze(config_with({'engine': 'stream'} | turned))


@pytest.mark.parametrize(('batch_size', 'accumulate_steps'), [(128, 4), (128, 3), (4, 8)])
def test_accumulation_without_groups_is_refused_with_a_remedy(batch_size, accumulate_steps):
  """What the message proposes is accepted; where nothing would be, it proposes nothing."""
  changes = {'batch_size': batch_size, 'optimizer.accumulate_steps': accumulate_steps}
  message = refused(changes)
  assert message.startswith(f'optimizer.accumulate_steps={accumulate_steps} ')
  remedy = re.search(r'set model.bn_group_size, (\d+) for example', message)
  if batch_size % accumulate_steps:
    assert remedy is None and f'batch_size={batch_size}' in message
  else:
    freeze(config_with(changes | {'model.bn_group_size': int(remedy[1])}))


def test_accumulation_without_batch_norm_needs_no_groups():
  freeze(config_with({'model.name': 'mcvit', 'optimizer.accumulate_steps': 4}))


# What becomes of a config.


def test_a_frozen_config_cannot_be_changed():
  config = freeze(config_with())
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.seed = 1
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.model.name = 'cvt-21'


def test_a_config_survives_json():
  changes = {
    'model.depths': (1, 2, 3),
    'model.cls_token': (False, False, True),
    'optimizer.schedule': 'multistep',
    'optimizer.milestones': (2, 4.5),
    'learning_rate': 3,
    'source': 'folder:a b/ü',
  }
  config = freeze(config_with(changes))
  written = json.loads(json.dumps(to_dict(config)))
  assert isinstance(written['model']['depths'], list)
  assert freeze(written) == config
  assert freeze(ml_collections.ConfigDict(to_dict(config))) == config


def test_differences_names_both_values():
  a = freeze(config_with())
  b = freeze(config_with({'seed': 1, 'model.depths': (1, 1, 1), 'eval.holdout': 0.2}))
  assert differences(a, a) == {}
  assert differences(a, b) == {
    'seed': (0, 1),
    'model.depths': ((), (1, 1, 1)),
    'eval.holdout': (0.1, 0.2),
  }
