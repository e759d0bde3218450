"""A tiny run: its data, its config, its folder when it is finished."""

import numpy as np
import pytest
from PIL import Image

from cvt_flax.training import loop

# A config file for a network small enough to compile in seconds, on a data set that a test writes.
# It compiles soonest for one device; what is about the mesh asks for more.
CONFIG = """
from cvt_flax.training.config import get_config as defaults


def get_config():
  config = defaults()
  config.name = 'tiny'
  config.source = 'npz:{npz}'
  config.image_size = 8
  config.batch_size = 16
  config.epochs = 3
  config.learning_rate = 0.01
  config.log_every = 7
  config.tensorboard = False
  config.mesh.data = 1
  config.model.name = 'cvt-nano'
  config.model.embed_dims = (8,)
  config.model.depths = (1,)
  config.model.num_heads = (1,)
  config.model.mlp_ratios = (2.0,)
  config.model.patch_sizes = (3,)
  config.model.patch_strides = (2,)
  config.model.patch_paddings = (1,)
  config.model.cls_token = (True,)
  config.model.drop_rates = (0.1,)
  config.model.drop_path_rates = (0.0,)
  config.model.bn_group_size = 4
  config.optimizer.ema_decay = 0.8
  config.optimizer.warmup_epochs = 1
  config.augment.crop_padding = 1
  config.augment.flip = True
  return config
"""

# With this everything that has state is on: averages, accumulation, mixing, dropout, drop path.
STATEFUL = """
  config.model.embed_dims = (8, 8)
  config.model.depths = (1, 1)
  config.model.num_heads = (1, 1)
  config.model.mlp_ratios = (2.0, 2.0)
  config.model.patch_sizes = (3, 3)
  config.model.patch_strides = (2, 1)
  config.model.patch_paddings = (1, 1)
  config.model.cls_token = (False, True)
  config.model.drop_rates = (0.1, 0.0)
  config.model.drop_path_rates = (0.0, 0.2)
  config.optimizer.accumulate_steps = 2
  config.augment.mixup = 0.8
  config.augment.cutmix = 1.0
  config.augment.mix_prob = 0.5
  config.augment.erase_prob = 0.25
  config.checkpoint.every_steps = 5
"""


@pytest.fixture(scope='module')
def npz(tmp_path_factory):
  """Two classes of noisy 8x8 images, dark and bright: 200 to train on, 50 to test."""
  rng = np.random.default_rng(0)
  path = tmp_path_factory.mktemp('data') / 'tiny.npz'
  arrays = {}
  for split, n in (('train', 200), ('test', 50)):
    labels = rng.integers(0, 2, n)
    pixels = rng.normal(80 + 90 * labels[:, None, None, None], 40, (n, 8, 8, 3))
    arrays[f'x_{split}'] = pixels.clip(0, 255).astype(np.uint8)
    arrays[f'y_{split}'] = labels
  np.savez(path, **arrays)
  return path


@pytest.fixture(scope='module')
def config_file(npz, tmp_path_factory):
  path = tmp_path_factory.mktemp('config') / 'tiny.py'
  path.write_text(CONFIG.format(npz=npz))
  return path


@pytest.fixture(scope='module')
def stateful_file(config_file):
  return changed(config_file, 'stateful', STATEFUL)


def changed(config_file, name, lines):
  """Returns a config file beside another, with these lines at its end."""
  text, end = config_file.read_text(), '\n  return config\n'
  assert text.endswith(end)
  path = config_file.with_name(f'{name}.py')
  path.write_text(f'{text.removesuffix(end)}{lines.rstrip()}{end}')
  return path


def read(config_file):
  names = {}
  exec(config_file.read_text(), names)
  return names['get_config']()


@pytest.fixture
def config(config_file):
  return read(config_file)


@pytest.fixture
def stateful(stateful_file):
  return read(stateful_file)


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
  """A folder of two classes of noisy pictures, dark and bright: 96 to train on, 24 to test."""
  root = tmp_path_factory.mktemp('pictures') / 'tiny'
  rng = np.random.default_rng(0)
  for split, count in (('train', 96), ('test', 24)):
    for i in range(count):
      path = root / split / ('dark', 'bright')[i % 2]
      path.mkdir(parents=True, exist_ok=True)
      height, width = rng.integers(9, 30, 2)
      pixels = rng.normal(80 + 90 * (i % 2), 40, (height, width, 3)).clip(0, 255)
      Image.fromarray(pixels.astype(np.uint8)).save(path / f'{i}.png')
  return root


@pytest.fixture(scope='module')
def streamed_file(config_file, pictures):
  """The tiny config on the streaming engine, with ImageNet's augmentation: 5 steps an epoch."""
  lines = f"""
  config.name = 'streamed'
  config.source = 'folder:{pictures}'
  config.engine = 'stream'
  config.augment.crop_padding = 0
  config.augment.crop_scale = (0.3, 1.0)
  config.augment.rand_augment = 'rand-m9-mstd0.5-inc1'
  config.checkpoint.every_steps = 2
"""
  return changed(config_file, 'streamed', lines)


@pytest.fixture
def streamed(streamed_file):
  return read(streamed_file)


@pytest.fixture(scope='module')
def trained(config_file, tmp_path_factory):
  """A finished run: (its config, its folder, what run() returned)."""
  config = read(config_file)
  folder = tmp_path_factory.mktemp('runs') / 'trained'
  return config, folder, loop.run(config, folder)


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
  """Runs of tests end without a report, which takes seconds; `trained` is a run that has one."""
  monkeypatch.setattr(loop, '_write_report', lambda folder: None)
