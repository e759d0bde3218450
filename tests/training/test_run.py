"""Whole runs, through the same run() that train.py calls."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from cvt_flax.errors import Diverged, Interrupted, UserError
from cvt_flax.training import experiment, loop
from cvt_flax.training.metrics import read_metrics

REPOSITORY = pathlib.Path(__file__).parents[2]

# A config file for a network small enough to compile in seconds, on a data set that a test writes.
# Everything that has state is on: averages, accumulation, mixing, dropout, drop path.
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
  config.model.name = 'cvt-nano'
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
  config.model.bn_group_size = 4
  config.optimizer.accumulate_steps = 2
  config.optimizer.ema_decay = 0.8
  config.optimizer.warmup_epochs = 1
  config.augment.crop_padding = 1
  config.augment.flip = True
  config.augment.mixup = 0.8
  config.augment.cutmix = 1.0
  config.augment.mix_prob = 0.5
  config.augment.erase_prob = 0.25
  config.checkpoint.every_steps = 5
  return config
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


@pytest.fixture
def config(config_file):
  names = {}
  exec(config_file.read_text(), names)
  return names['get_config']()


@pytest.fixture(scope='module')
def trained(config_file, tmp_path_factory):
  """A finished run: (its config, its folder, what run() returned)."""
  names = {}
  exec(config_file.read_text(), names)
  config = names['get_config']()
  folder = tmp_path_factory.mktemp('runs') / 'trained'
  return config, folder, loop.run(config, folder)


def test_a_run_learns_and_says_what_it_did(trained, capsys):
  config, folder, result = trained
  assert result['test/top1'] >= 0.9
  assert result['test/images'] == 50
  assert len(result['test/per_class']) == 2

  lines = read_metrics(folder / 'metrics.jsonl')
  assert [m['step'] for m in lines if 'train/loss' in m] == [7, 14, 21, 28, 33]
  assert [m['epoch'] for m in lines if 'val/top1' in m] == [1, 2, 3]
  assert [m['step'] for m in lines if 'test/top1' in m] == [33]
  norms = {'gradient_norm', 'parameter_norm', 'update_norm', 'learning_rate', 'images_per_sec'}
  assert {f'train/{name}' for name in norms} < lines[0].keys()

  held_out = json.loads((folder / 'held_out.json').read_text())
  assert len(held_out) == 20 and held_out == sorted(set(held_out))
  assert lines[1]['val/images'] == 20
  record = json.loads((folder / 'experiment.json').read_text())
  assert record['config']['source'] == config.source
  assert record['hardware']['versions']['jax'] == jax.__version__
  assert 'stage1' in (folder / 'parameters.txt').read_text()


def test_a_finished_run_is_left_alone(trained, capsys):
  config, folder, result = trained
  before = (folder / 'metrics.jsonl').read_bytes()
  again = loop.run(config, folder)
  assert 'is finished' in capsys.readouterr().out
  assert again['test/top1'] == result['test/top1']
  assert (folder / 'metrics.jsonl').read_bytes() == before


def test_evaluation_of_a_run_gives_what_training_reported(trained):
  config, folder, result = trained
  unfinished = folder / 'checkpoints' / '99.orbax-checkpoint-tmp'
  unfinished.mkdir()  # of a process that is still training
  metrics = loop.run(config, folder, mode='eval')
  assert unfinished.exists()
  unfinished.rmdir()
  assert metrics['test/top1'] == result['test/top1']
  np.testing.assert_allclose(metrics['test/loss'], result['test/loss'], rtol=1e-6)
  best = max(
    (m for m in read_metrics(folder / 'metrics.jsonl') if 'val/top1' in m),
    key=lambda m: m['val/top1'],
  )
  assert metrics['val/top1'] == best['val/top1']


def test_a_run_folder_of_another_config_is_not_touched(trained):
  config, folder, _ = trained
  before = {p: p.stat().st_mtime_ns for p in folder.rglob('*')}
  other = config.copy_and_resolve_references()
  other.learning_rate = 0.5
  other.model.bn_group_size = 8
  with pytest.raises(UserError) as error:
    loop.run(other, folder)
  assert 'learning_rate 0.01 -> 0.5' in str(error.value)
  assert 'model.bn_group_size 4 -> 8' in str(error.value)
  fewer = config.copy_and_resolve_references()
  fewer.epochs = 2
  with pytest.raises(UserError, match='epochs=2: .* started with 3, which can only be raised'):
    loop.run(fewer, folder)
  assert {p: p.stat().st_mtime_ns for p in folder.rglob('*')} == before


def test_a_run_may_get_more_epochs_another_mesh_and_other_checkpoints(config, tmp_path):
  config.epochs = 2
  loop.run(config, tmp_path)
  config.epochs, config.mesh.data, config.checkpoint.every_steps = 3, 4, 0
  loop.run(config, tmp_path)
  lines = read_metrics(tmp_path / 'metrics.jsonl')
  assert [m['step'] for m in lines if 'test/top1' in m] == [22, 33]
  assert [m['step'] for m in lines if 'val/top1' in m] == [11, 22, 33]


@pytest.fixture
def copy(trained, tmp_path):
  """A copy of the finished run's folder, to damage."""
  return shutil.copytree(trained[1], tmp_path / 'copy')


def test_data_that_has_changed_is_refused(config, copy):
  record = json.loads((copy / 'experiment.json').read_text())
  record['data'] = '0' * 64
  (copy / 'experiment.json').write_text(json.dumps(record))
  with pytest.raises(UserError, match='the images of .* have changed since the run'):
    loop.run(config, copy)


def test_a_second_process_in_the_folder_is_refused(config, copy):
  with experiment.only_one(copy), pytest.raises(UserError, match='another process is training in'):
    loop.run(config, copy)
  with experiment.only_one(copy):  # and the lock is gone with its holder
    pass


@pytest.mark.parametrize(
  ('file', 'text', 'message'),
  [
    ('experiment.json', b'\xff\x00', 'experiment.json is damaged'),
    ('experiment.json', b'{}', 'experiment.json is damaged'),
    ('metrics.jsonl', b'3\n{"step": 1}\n', 'metrics.jsonl, line 1 is damaged'),
  ],
)
def test_a_damaged_folder_is_told(config, copy, file, text, message):
  (copy / file).write_bytes(text)
  with pytest.raises(UserError, match=message):
    loop.run(config, copy)


def test_a_workdir_out_of_reach(config, tmp_path):
  (tmp_path / 'file').write_text('')
  for folder in (tmp_path / 'file', tmp_path / 'file' / 'below'):
    with pytest.raises(UserError, match='is not a folder'):
      loop.run(config, folder)
  with pytest.raises(UserError, match='holds no run to evaluate'):
    loop.run(config, tmp_path / 'file', mode='eval')


def test_a_folder_with_something_else_in_it_is_refused(config, tmp_path):
  (tmp_path / 'thesis.txt').write_text('dear')
  with pytest.raises(UserError, match='is not empty and holds no run'):
    loop.run(config, tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == ['thesis.txt']


def test_evaluating_what_is_no_run(config, tmp_path):
  with pytest.raises(UserError, match='holds no run to evaluate'):
    loop.run(config, tmp_path / 'nothing', mode='eval')
  with pytest.raises(UserError, match="mode='evaluate': train or eval"):
    loop.run(config, tmp_path / 'nothing', mode='evaluate')
  assert not (tmp_path / 'nothing').exists()


def test_classes_that_do_not_match_the_checkpoint(trained, tmp_path):
  config, folder, _ = trained
  rng = np.random.default_rng(0)
  np.savez(
    tmp_path / 'three.npz',
    **{f'x_{s}': rng.integers(0, 255, (60, 8, 8, 3), np.uint8) for s in ('train', 'test')},
    **{f'y_{s}': np.arange(60) % 3 for s in ('train', 'test')},
  )
  other = config.copy_and_resolve_references()
  other.source = f'npz:{tmp_path}/three.npz'
  with pytest.raises(UserError, match='has 3 classes .* was trained on 2'):
    loop.run(other, folder, mode='eval')


def test_without_a_test_split_validation_is_reported(config, npz, tmp_path, capsys):
  arrays = np.load(npz)
  np.savez(tmp_path / 'train.npz', x_train=arrays['x_train'], y_train=arrays['y_train'])
  config.source = f'npz:{tmp_path}/train.npz'
  config.epochs = 2
  result = loop.run(config, tmp_path / 'run')
  assert 'val/top1' in result and 'test/top1' not in result
  assert 'has no labelled test split' in capsys.readouterr().out


def test_holdout_0_trains_on_everything_and_reports_the_last_checkpoint(config, tmp_path):
  config.epochs, config.eval.holdout = 2, 0.0
  result = loop.run(config, tmp_path)
  lines = read_metrics(tmp_path / 'metrics.jsonl')
  assert not any('val/top1' in m for m in lines)
  assert result['checkpoint'] == 24  # 200 images in batches of 16: 12 steps an epoch
  assert json.loads((tmp_path / 'held_out.json').read_text()) == []


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'mesh.data': 3}, 'batch_size=16 does not divide over 3 devices: 15 or 18 would'),
    ({'mesh.data': 9}, 'mesh.data=9: there are 8 devices'),
    ({'eval.batch_size': 10}, 'eval.batch_size=10 does not divide over 8 devices: 8 or 16 would'),
    ({'batch_size': 1600}, 'batch_size=1600: .* has only 180 images'),
    ({'model.kv_strides': (4, 1)}, 'leaves stage 0 of the model a single key'),
    (
      {'image_size': 1, 'model.patch_strides': (8, 8), 'model.patch_paddings': (0, 0)},
      'image_size=1: too small, stage 0',
    ),
    ({'model.name': 'cvt-nona'}, "did you mean 'cvt-nano'?"),
    ({'model.num_heads': (1, 3)}, 'num_heads=.* 3 heads do not divide the 8 channels of stage 1'),
    ({'source': 'npz:nowhere.npz'}, 'nowhere.npz'),
    ({'model.bn_group_size': 5}, 'bn_group_size=5 does not divide batch_size=16'),
  ],
)
def test_wrong_input_is_told_before_anything_is_written(config, tmp_path, change, message):
  for name, value in change.items():
    group = config
    *path, last = name.split('.')
    for part in path:
      group = group[part]
    group[last] = value
  with pytest.raises(UserError, match=message) as error:
    loop.run(config, tmp_path / 'run')
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'run').exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
  config, tmp_path
):
  # The rate explodes after the first epoch, 11 steps, whose checkpoint is good.
  config.optimizer.schedule, config.optimizer.milestones = 'multistep', (1.0,)
  config.optimizer.gamma, config.optimizer.warmup_epochs = 1e36, 0.0
  with pytest.raises(Diverged, match=r'step 1\d: the checkpoint of step 11 is kept'):
    loop.run(config, tmp_path)
  metrics = loop.run(config, tmp_path, mode='eval')
  assert metrics['checkpoint'] == 11 and np.isfinite(metrics['test/loss'])


def test_imagenet_takes_a_real_step_on_stand_in_arrays(tmp_path):
  sys.path.insert(0, str(REPOSITORY))
  try:
    from configs.cvt13_imagenet import get_config as imagenet
  finally:
    sys.path.remove(str(REPOSITORY))
  rng = np.random.default_rng(0)
  np.savez(
    tmp_path / 'stand_in.npz',
    **{f'x_{s}': rng.integers(0, 255, (8, 224, 224, 3), np.uint8) for s in ('train', 'val')},
    **{f'y_{s}': np.arange(8) for s in ('train', 'val')},
  )
  config = imagenet()
  config.source = f'npz:{tmp_path}/stand_in.npz'
  config.batch_size = 8
  config.epochs = 6
  config.optimizer.min_learning_rate = 0.0  # the rate scales with the batch, this does not
  config.model.bn_group_size = 4
  config.mesh.data = 2
  config.model.depths = (1, 1, 1)
  config.tensorboard = False
  result = loop.run(config, tmp_path / 'run')
  assert np.isfinite(result['val/loss'])
  lines = read_metrics(tmp_path / 'run' / 'metrics.jsonl')
  rates = [m['train/learning_rate'] for m in lines if 'train/learning_rate' in m]
  # The last epoch, t = 5 of 6, is the first after the warm-up; 0.002 at 2,048 images.
  np.testing.assert_allclose(
    rates, [0.002 * 8 / 2048 * 0.5 * (1 + np.cos(np.pi * 5 / 6))], rtol=1e-5
  )


def _command(config_file, folder):
  return [
    sys.executable,
    str(REPOSITORY / 'train.py'),
    f'--config={config_file}',
    f'--workdir={folder}',
  ]


def _without_times(folder):
  return [
    {k: v for k, v in line.items() if k != 'train/images_per_sec'}
    for line in read_metrics(folder / 'metrics.jsonl')
  ]


def _arrays(folder, step):
  """Returns everything that a checkpoint holds, as {name of the leaf: array}."""
  with ocp.CheckpointManager(folder / 'checkpoints') as manager:
    names = ('model', 'ema', 'optimizer', 'window')
    args = ocp.args.Composite(**{name: ocp.args.StandardRestore() for name in names})
    tree = manager.restore(step, args=args)
  leaves = jax.tree_util.tree_leaves_with_path(dict(tree.items()))
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _kill_after(process, folder, step, number):
  """Sends a signal once the run has written a checkpoint of a step after `step`."""
  deadline = time.monotonic() + 300
  checkpoints = folder / 'checkpoints'
  while process.poll() is None and time.monotonic() < deadline:
    steps = [int(p.name) for p in checkpoints.glob('*') if p.name.isdigit()]
    if steps and max(steps) > step:
      os.kill(process.pid, number)
      return max(steps)
    time.sleep(0.002)
  raise AssertionError(f'the run ended ({process.poll()}) before it could be killed')


def test_killed_three_times_it_ends_with_the_same_bytes(config_file, clean_env, tmp_path):
  """kill -9 in mid-epoch, and the same command again: as if it had never been killed."""
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  environment = {**clean_env, 'XLA_FLAGS': os.environ['XLA_FLAGS']}
  subprocess.run(_command(config_file, whole), env=environment, check=True, capture_output=True)

  step = 0
  for _ in range(3):
    process = subprocess.Popen(
      _command(config_file, killed), env=environment, stdout=subprocess.DEVNULL
    )
    step = _kill_after(process, killed, step, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
  subprocess.run(_command(config_file, killed), env=environment, check=True, capture_output=True)

  assert _without_times(killed) == _without_times(whole)
  expected, got = _arrays(whole, 33), _arrays(killed, 33)
  assert got.keys() == expected.keys() and any('ema' in name for name in got)
  for name, array in expected.items():
    assert got[name].tobytes() == array.tobytes(), name


def test_sigterm_saves_exits_75_and_the_run_goes_on(config_file, clean_env, tmp_path, trained):
  environment = {**clean_env, 'XLA_FLAGS': os.environ['XLA_FLAGS']}
  process = subprocess.Popen(
    _command(config_file, tmp_path / 'run'), env=environment, stderr=subprocess.PIPE, text=True
  )
  _kill_after(process, tmp_path / 'run', 0, signal.SIGTERM)
  _, message = process.communicate(timeout=120)
  assert process.returncode == 75
  assert 'SIGTERM: saved step' in message and 'Traceback' not in message
  done = subprocess.run(
    _command(config_file, tmp_path / 'run'), env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0 and 'going on from step' in done.stdout
  whole = [m['step'] for m in read_metrics(trained[1] / 'metrics.jsonl')]
  assert [m['step'] for m in read_metrics(tmp_path / 'run' / 'metrics.jsonl')] == whole


def test_a_signal_during_evaluation_loses_nothing(config, trained, tmp_path, monkeypatch):
  """The evaluation that was cut off is made up for, and the best checkpoint is still the best."""
  from cvt_flax.training.setup import Setup

  original = Setup.evaluate

  def interrupted(self, variables, arrays, signals):
    signals.received = signal.SIGTERM
    return original(self, variables, arrays, signals)

  with monkeypatch.context() as patch:
    patch.setattr(Setup, 'evaluate', interrupted)
    with pytest.raises(Interrupted, match='saved step 11') as stop:
      loop.run(config, tmp_path)
    assert stop.value.exit_code == 75
  result = loop.run(config, tmp_path)
  _, folder, expected = trained
  assert _without_times(tmp_path) == _without_times(folder)
  assert result == expected
