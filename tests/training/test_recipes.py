"""The shipped configs: ImageNet's against the authors' yaml files, and one step of each of them."""

import contextlib
import importlib.util
import io
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from cvt_flax import save_pretrained
from cvt_flax.data import array_source, stream
from cvt_flax.models.geometry import stage_geometry
from cvt_flax.models.zoo import is_compact
from cvt_flax.training import loop
from cvt_flax.training.config import differences, freeze
from cvt_flax.training.engines import Streaming
from cvt_flax.training.metrics import read_metrics
from cvt_flax.training.network import build_model
from cvt_flax.training.optimizer import make_schedule, peak_learning_rate
from cvt_flax.training.sharding import make_mesh
from tests.models.torch_weights import drawn_variables
from tests.training.test_optimizer import OFFICIAL

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / 'configs'


def load(name, *variant):
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(*variant)


# What experiments/imagenet/cvt/*.yaml say (github.com/microsoft/CvT at f851e68): images and rate of
# a GPU, weight decay, image size, whether evaluation crops, whether timm's loader is used, sampler.
YAML = {
  'cvt13_imagenet': ('cvt-13', 256, 2.5e-4, 0.05, 224, True, True, 'default'),
  'cvt13_imagenet_384': ('cvt-13', 256, 2.5e-4, 0.05, 384, False, True, 'default'),
  'cvt21_imagenet': ('cvt-21', 128, 1.25e-4, 0.1, 224, True, False, 'repeated_aug'),
  'cvt21_imagenet_384': ('cvt-21', 128, 1.25e-4, 0.1, 384, False, True, 'default'),
  'cvtw24_imagenet_384': ('cvt-w24', 128, 1.25e-4, 0.1, 384, False, True, 'default'),
}
DROP_PATH = {'cvt-13': (0, 0, 0.1), 'cvt-21': (0, 0, 0.1), 'cvt-w24': (0, 0, 0.3)}


@pytest.mark.parametrize('name', YAML)
def test_official_experiments_are_their_yaml(name):
  model, images, rate, decay, size, crops, timm_loader, sampler = YAML[name]
  c = freeze(load(name))
  gpus = 2048 // images
  assert c.batch_size == gpus * images and c.model.bn_group_size == images
  assert peak_learning_rate(c.optimizer, c.learning_rate, c.batch_size) == pytest.approx(
    rate * gpus
  )
  assert (c.model.name, c.image_size, c.epochs, c.steps) == (model, size, 300, 0)
  assert build_model(c.model, 1000).drop_path_rates == DROP_PATH[model]
  assert c.crop_ratio == (0.875 if crops else 0)
  o = c.optimizer
  assert (o.name, o.weight_decay, o.beta1, o.beta2, o.epsilon) == ('adamw', decay, 0.9, 0.999, 1e-8)
  assert (o.clip_norm, o.ema_decay, o.accumulate_steps) == (0, 0, 1)
  a = c.augment
  assert (c.engine, a.crop_scale, a.crop_aspect) == ('stream', (0.08, 1.0), (3 / 4, 4 / 3))
  assert a.flip and a.color_jitter == ()
  assert a.interpolation == ('bicubic' if timm_loader else 'bilinear')
  assert a.rand_augment == ('rand-m9-mstd0.5-inc1' if timm_loader else '')
  assert a.erase_prob == (0.25 if timm_loader else 0)
  assert a.repeats == (3 if sampler == 'repeated_aug' else 1)
  assert (a.mixup, a.cutmix, a.mix_prob, a.switch_prob) == (0.8, 1.0, 1.0, 0.5)
  assert a.label_smoothing == 0.1
  assert (c.mean, c.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize('name', YAML)
def test_official_experiments_have_the_official_learning_rates(name):
  c = freeze(load(name))
  peak = peak_learning_rate(c.optimizer, c.learning_rate, c.batch_size)
  schedule = make_schedule(c.optimizer, peak, 300 * 625, 625)
  for epoch, rate in OFFICIAL.items():
    for step in (epoch * 625, epoch * 625 + 624):
      assert float(schedule(step)) == pytest.approx(rate, rel=3e-5), (epoch, step)


@pytest.mark.parametrize('model', ['cvt13', 'cvt21', 'cvtw24'])
def test_pretraining_is_the_recipe_of_imagenet_with_the_classes_of_its_source(model):
  config = load(f'{model}_imagenet22k')
  assert config.source == ''
  config.source = 'folder:DIR'
  c = freeze(config)
  official = freeze(load(f'{model}_imagenet' if model != 'cvtw24' else 'cvtw24_imagenet_384'))
  assert c.model == official.model and c.epochs == 90
  assert c.optimizer == official.optimizer and c.learning_rate == official.learning_rate
  assert c.augment == freeze(load('cvt13_imagenet')).augment and c.image_size == 224


@pytest.mark.parametrize(
  ('variant', 'steps'),
  [
    ('imagenet', 20_000),
    ('cifar10', 10_000),
    ('cifar100', 10_000),
    ('pets', 500),
    ('flowers', 500),
  ],
)
def test_fine_tuning_is_what_the_paper_says(variant, steps):
  c = freeze(load('finetune', variant))
  assert (c.optimizer.name, c.optimizer.momentum, c.batch_size) == ('sgd', 0.9, 512)
  assert (c.image_size, c.crop_ratio, c.steps) == (384, 0, steps)
  assert c.init_from  # from scratch would be another experiment


@pytest.mark.parametrize('name', ['transfer_folder', 'transfer_food11'])
def test_transfer_is_sgd_on_weights(name):
  frozen, full = load(name, 'frozen'), load(name, 'full')
  for config in (frozen, full):
    config.source = config.source or 'folder:DIR'
  frozen, full = freeze(frozen), freeze(full)
  assert (frozen.optimizer.freeze, full.optimizer.freeze) == ('backbone', '')
  for c in (frozen, full):
    o = c.optimizer
    assert (o.name, o.momentum, o.schedule, c.engine) == ('sgd', 0.9, 'cosine', 'stream')
    assert c.init_from  # from scratch would be another experiment


def test_imagenette_is_imagenet_in_small_batches():
  c, official = freeze(load('cvt13_imagenet', 'imagenette')), freeze(load('cvt13_imagenet'))
  assert c.source.startswith('tfds:imagenette') and c.augment == official.augment
  assert c.batch_size == c.model.bn_group_size == 128
  assert peak_learning_rate(c.optimizer, c.learning_rate, 128) == pytest.approx(0.002 / 16)


SHIPPED = [
  (path.stem, variant)
  for path in sorted(CONFIGS.glob('*.py'))
  if path.stem not in ('__init__', 'ablations')  # their networks are what they are about: below
  for variant in re.findall(r"case '(\w*)':", path.read_text()) or ['']
]


# A network of one stage, so that each recipe compiles in seconds.
SMALL = {
  'embed_dims': (8,),
  'depths': (1,),
  'num_heads': (1,),
  'patch_sizes': (7,),
  'patch_strides': (4,),
  'patch_paddings': (2,),
  'mlp_ratios': (2.0,),
  'qkv_kernels': (3,),
  'kv_strides': (2,),
  'cls_token': (True,),
  'pool': 'cls',
  'drop_rates': (0.0,),
  'attn_drop_rates': (0.0,),
  'drop_path_rates': (0.1,),
}


# The same of a CompactViT.
SMALL_COMPACT = {'width': 8, 'depth': 1, 'heads': 2}


@pytest.mark.parametrize(('name', 'variant'), SHIPPED)
def test_every_config_trains_a_step(name, variant, tmp_path):
  """The whole recipe of every config, for a small network, on stand-in images."""
  config = load(name, *filter(None, [variant]))
  images = np.random.default_rng(0).integers(0, 255, (8, 40, 36, 3), np.uint8)
  np.savez(tmp_path / 'stand_in.npz', x_train=images, y_train=np.arange(8) % 3)
  config.source = f'npz:{tmp_path}/stand_in.npz'
  config.eval.holdout, config.eval.every_epochs = 0.0, 1
  config.init_from = ''
  config.image_size = 24
  config.batch_size = 8
  config.mesh.data = 1
  if is_compact(config.model.name):
    config.model.update(SMALL_COMPACT)
  else:
    config.model.update(SMALL | {'bn_group_size': 4})
  if config.optimizer.freeze:  # what is frozen has to come from somewhere
    config.init_from = str(tmp_path / 'weights')
    model = build_model(freeze(config).model, 3)
    save_pretrained(config.init_from, model, drawn_variables(model))
  config.optimizer.min_learning_rate = 0.0  # the rate scales with the batch, this does not
  if config.steps:
    config.steps = 2
  else:
    config.epochs = 2
    config.optimizer.warmup_epochs = min(config.optimizer.warmup_epochs, 1)
  config.tensorboard = False
  assert loop.run(config, tmp_path / 'run') == {'checkpoint': 2}
  assert [p.name for p in (tmp_path / 'run/checkpoints').iterdir()] == ['2']


ABLATIONS = {
  'base': (),
  'avg': ('model.projection',),
  'linear': ('model.projection',),
  'stride1': ('model.kv_strides',),
  'patches': ('model.patch_paddings', 'model.patch_sizes'),
  'position': ('model.pos_embed',),
  'position_first': ('model.pos_embed',),
  'position_linear': ('model.pos_embed', 'model.projection'),
}


def test_ablations_change_one_thing():
  base = freeze(load('ablations'))
  cases = re.findall(r"case '(\w*)':", (CONFIGS / 'ablations.py').read_text())
  assert cases == list(ABLATIONS)
  geometries = {}
  for variant, keys in ABLATIONS.items():
    config = freeze(load('ablations', variant))
    assert sorted(differences(base, config).keys() - {'name'}) == sorted(keys)
    stages = stage_geometry(build_model(config.model, 10), 32, 32)
    geometries[variant] = [(s.height, s.keys) for s in stages]
    assert [s.height for s in stages] == [16, 8, 8]
  full = [(16, 256), (8, 64), (8, 65)]  # keys; the last stage has a class token
  strided = [(16, 64), (8, 16), (8, 17)]
  rounded_up = [(16, 81), (8, 25), (8, 26)]  # as average pooling does
  expected = dict.fromkeys(('linear', 'stride1', 'position_linear'), full) | {'avg': rounded_up}
  for variant, geometry in geometries.items():
    assert geometry == expected.get(variant, strided), variant


@pytest.fixture(scope='module')
def imagenet2012(tmp_path_factory):
  """TFDS's imagenet2012: ten JPEGs in train, three in validation, two in test without labels."""
  import tensorflow_datasets as tfds

  data_dir = tmp_path_factory.mktemp('tfds')
  builder = tfds.builder('imagenet2012', data_dir=data_dir, file_format='array_record')

  def examples(split, count):
    rng = np.random.default_rng(count)
    for i in range(count):
      jpeg = io.BytesIO()
      Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8)).save(jpeg, 'JPEG')
      jpeg.seek(0)
      label = -1 if split == 'test' else 100 * i
      yield i, {'image': jpeg, 'label': label, 'file_name': f'{split}{i}.JPEG'}

  counts = {'train': 10, 'validation': 3, 'test': 2}
  builder._split_generators = lambda _: {s: examples(s, n) for s, n in counts.items()}
  with contextlib.redirect_stdout(io.StringIO()):
    builder.download_and_prepare()
  return data_dir


def test_imagenet_is_trained_on_from_tfds_at_the_official_rates(imagenet2012, tmp_path):
  config = load('cvt13_imagenet')
  config.data_dir = str(imagenet2012)
  config.batch_size = config.optimizer.reference_batch = 8  # an epoch is one step
  config.image_size, config.model.bn_group_size = 24, 4
  config.model.update(SMALL)
  config.log_every, config.eval.every_epochs, config.tensorboard = 1, 300, False
  result = loop.run(config, tmp_path)
  assert (result['val/images'], 'test/top1' in result, result['checkpoint']) == (3, False, 300)
  lines = read_metrics(tmp_path / 'metrics.jsonl')
  rates = {line['step'] - 1: line['train/learning_rate'] for line in lines if 'train/loss' in line}
  assert len(rates) == 300
  for epoch, rate in OFFICIAL.items():
    assert rates[epoch] == pytest.approx(rate, rel=3e-5)


def test_repeats_are_dealt_to_the_groups_of_batch_norm(monkeypatch):
  config = load('cvt21_imagenet')
  c = freeze(config)
  orders = []
  monkeypatch.setattr(
    stream,
    'train_batches',
    lambda split, transform, order, *_, **__: (batch for batch in orders.append(order) or ()),
  )
  split = array_source.ArraySplit(
    'x', np.zeros((4096, 1, 1, 3), np.uint8), np.zeros(4096, np.int32)
  )
  list(Streaming(c, make_mesh(1)).feed_training(split, 0, 1))
  assert orders == [stream.Order(4096, 2048, 0, repeats=3, groups=16)]
