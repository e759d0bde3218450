"""Whole runs on the streaming engine, and what is scored besides."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from cvt_flax.data import evaluation_sets, sources
from cvt_flax.errors import UserError, is_momentary
from cvt_flax.training import loop
from cvt_flax.training.config import freeze
from cvt_flax.training.engines import Streaming
from cvt_flax.training.metrics import read_metrics
from cvt_flax.training.sharding import make_mesh, prefetch, split_batch

REPOSITORY = pathlib.Path(__file__).parents[2]


def losses(folder):
  lines = read_metrics(folder / 'metrics.jsonl')
  return [line['train/loss'] for line in lines if 'train/loss' in line]


@pytest.fixture(scope='module')
def finished(streamed_file, tmp_path_factory):
  """A finished run: (its config, its folder, what run() returned)."""
  names = {}
  exec(streamed_file.read_text(), names)
  config = names['get_config']()
  folder = tmp_path_factory.mktemp('runs') / 'streamed'
  return config, folder, loop.run(config, folder)


def test_a_streamed_run_learns(finished):
  _, folder, result = finished
  assert result['test/images'] == 24 and result['test/top1'] >= 0.9
  lines = read_metrics(folder / 'metrics.jsonl')
  assert [m['step'] for m in lines if 'val/top1' in m] == [5, 10, 15]
  assert lines[-2]['val/images'] == 10


def test_processes_and_devices_change_nothing(finished, tmp_path):
  config, folder, result = finished
  config = config.copy_and_resolve_references()
  config.stream.workers = 2
  assert loop.run(config, tmp_path / 'workers') == result
  assert losses(tmp_path / 'workers') == losses(folder)
  config.mesh.data = 4
  loop.run(config, tmp_path / 'devices')
  np.testing.assert_allclose(losses(tmp_path / 'devices'), losses(folder), rtol=2e-6)


def test_pictures_that_are_added_are_refused(finished, pictures, tmp_path):
  config, folder, _ = finished
  run, more = (
    shutil.copytree(folder, tmp_path / 'run'),
    shutil.copytree(pictures, tmp_path / 'tiny'),
  )
  config = config.copy_and_resolve_references()
  shutil.copy(more / 'train/dark/0.png', more / 'train/dark/new.png')
  config.source = f'folder:{more}'
  record = (run / 'experiment.json').read_text()
  (run / 'experiment.json').write_text(record.replace(str(pictures), str(more)))
  with pytest.raises(UserError, match='the images of .* have changed since the run'):
    loop.run(config, run)
  (more / 'train/dark/new.png').unlink()
  assert loop.run(config, run)['test/images'] == 24  # the same pictures in another place


def test_a_run_may_be_given_in_steps(streamed, tmp_path, capsys):
  streamed.epochs, streamed.steps = 10, 7  # epochs as they are by default
  streamed.optimizer.warmup_epochs = 1.2
  result = loop.run(streamed, tmp_path / 'run')
  lines = read_metrics(tmp_path / 'run' / 'metrics.jsonl')
  assert [m['step'] for m in lines if 'val/top1' in m] == [5, 7]
  assert lines[-1]['step'] == 7 and lines[-1]['epoch'] == pytest.approx(1.4)
  told = '1.4 epochs of 5 steps; an epoch leaves out 6 images, a smaller batch_size fewer'
  assert 'test/top1' in result and told in capsys.readouterr().out
  streamed.steps = 6
  with pytest.raises(UserError, match='steps=6: .* was started with 7, which can only be raised'):
    loop.run(streamed, tmp_path / 'run')
  streamed.steps = 8
  loop.run(streamed, tmp_path / 'run')
  assert read_metrics(tmp_path / 'run' / 'metrics.jsonl')[-1]['step'] == 8
  streamed.steps, streamed.optimizer.warmup_epochs = 7, 1.5
  with pytest.raises(UserError, match=r'warmup_epochs goes up to epoch 1.5, but steps=7 are 1.40'):
    loop.run(streamed, tmp_path / 'other')
  assert not (tmp_path / 'other').exists()


@pytest.mark.parametrize('engine', ['resident', 'stream'])
def test_an_unreadable_picture(streamed, pictures, tmp_path, capsys, engine):
  copy = shutil.copytree(pictures, tmp_path / 'tiny')
  (copy / 'train/dark/20.png').write_bytes(b'not a picture')
  (copy / 'test/dark/4.png').write_bytes(b'not a picture')
  streamed.source, streamed.eval.holdout, streamed.epochs = f'folder:{copy}', 0.0, 2
  streamed.engine = engine
  if engine == 'resident':
    streamed.augment.crop_scale, streamed.augment.rand_augment = (), ''
  with pytest.raises(
    UserError, match=r'/train/dark/20.png is not an image.*; --config.skip_unreadable=true leaves'
  ):
    loop.run(streamed, tmp_path / 'run')
  streamed.skip_unreadable = True
  result = loop.run(streamed, tmp_path / 'run')
  assert result['test/images'] == 23
  printed = capsys.readouterr().out
  assert printed.count('left out') == 2  # not once more in every epoch
  for name in ('train/dark/20.png', 'test/dark/4.png'):
    assert f'left out {copy}/{name}, which cannot be read' in printed


@pytest.mark.parametrize('left', ['nothing', 'an empty folder'])
def test_a_disk_that_is_gone_is_not_skipped(streamed, pictures, tmp_path, left):
  copy = shutil.copytree(pictures, tmp_path / 'tiny')
  streamed.source, streamed.skip_unreadable = f'folder:{copy}', True
  engine = Streaming(freeze(streamed), make_mesh(1, 1))
  data = sources.load(streamed.source)
  shutil.rmtree(copy)
  if left == 'an empty folder':  # where it was mounted
    copy.mkdir()
  for feed in (engine.feed_training(data.train, 0, 5), engine.feed_evaluation(data.test, 8)):
    with pytest.raises(OSError, match='the folder is gone, or empty') as error:
      list(feed)
    assert is_momentary(error.value) and error.value.filename.startswith(str(tmp_path))


@pytest.mark.parametrize('engine', ['resident', 'stream'])
def test_a_picture_that_is_renamed_is_refused(streamed, pictures, tmp_path, engine):
  """Others would then be held out, at the same places."""
  copy = shutil.copytree(pictures, tmp_path / 'tiny')
  streamed.source, streamed.epochs, streamed.engine = f'folder:{copy}', 2, engine
  if engine == 'resident':
    streamed.augment.crop_scale, streamed.augment.rand_augment = (), ''
  loop.run(streamed, tmp_path / 'run')
  (copy / 'train/dark/0.png').rename(copy / 'train/dark/zero.png')
  for mode in ('train', 'eval'):
    with pytest.raises(UserError, match='the images of .* have changed since the run'):
      loop.run(streamed, tmp_path / 'run', mode=mode)


# Evaluation sets.


def test_sets_are_scored_beside_the_test_split(finished, pictures, tmp_path, capsys):
  config, folder, result = finished
  bright = tmp_path / 'bright_only.npz'  # the classes in another order than the folder's
  rng = np.random.default_rng(0)
  pixels = rng.normal(170, 40, (7, 12, 12, 3)).clip(0, 255).astype(np.uint8)
  np.savez(bright, x_test=pixels, y_test=np.ones(7, int), class_names=np.array(['dark', 'bright']))
  config = config.copy_and_resolve_references()
  config.eval.sets = (f'folder:{pictures}', f'npz:{bright}')
  metrics = loop.run(config, folder, mode='eval')
  assert metrics['tiny/images'] == 24 and metrics['bright_only/images'] == 7
  for name in ('top1', 'top5', 'per_class'):
    assert metrics[f'tiny/{name}'] == metrics[f'test/{name}'] == result[f'test/{name}']
  assert metrics['bright_only/per_class'] == [1, None]
  assert 'bright_only: top-1' in capsys.readouterr().out
  copy = shutil.copytree(folder, tmp_path / 'copy')  # a finished run is scored on what is new
  assert loop.run(config, copy)['bright_only/top1'] == metrics['bright_only/top1']
  again = loop.run(config, tmp_path / 'trained')
  assert {k: v for k, v in again.items() if 'only' in k} == {
    k: v for k, v in metrics.items() if 'only' in k
  }


def test_a_run_knows_its_own_data_however_it_is_called(finished, pictures, tmp_path):
  config, folder, result = finished
  config = config.copy_and_resolve_references()
  config.source = f'folder:{os.path.relpath(pictures)}/'
  metrics = loop.run(config, folder, mode='eval')
  assert metrics['val/images'] == 10 and metrics['test/top1'] == result['test/top1']
  assert 'all/top1' not in metrics
  flat = shutil.copytree(pictures / 'train', tmp_path / 'flat')
  config.source, config.eval.sets = f'folder:{flat}', (f'folder:{flat}/',)
  with pytest.raises(UserError, match='flat/ has no images but those that are trained on'):
    loop.run(config, tmp_path / 'run')


def test_five_of_five_that_compete_are_no_result(finished, pictures, monkeypatch):
  config, folder, result = finished
  config = config.copy_and_resolve_references()
  config.eval.sets = (f'folder:{pictures}',)
  load = evaluation_sets.load

  def of_few(source, **options):  # as if the model had other classes beside these two
    return dataclasses.replace(load(source, **options), classes=np.ones(2, bool))

  monkeypatch.setattr(evaluation_sets, 'load', of_few)
  metrics = loop.run(config, folder, mode='eval')
  assert metrics['tiny/top1'] == result['test/top1'] and 'tiny/top5' not in metrics


def test_sets_that_cannot_be_told_apart_are_refused(streamed, pictures, tmp_path):
  for sets in ((f'folder:{pictures}',) * 2, ('folder:x/val',)):
    streamed.eval.sets = sets
    with pytest.raises(UserError, match='names other metrics as well'):
      loop.run(streamed, tmp_path / 'run')
  flat = shutil.copytree(pictures / 'train', tmp_path / 'flat')
  streamed.source = f'folder:{flat}'
  streamed.eval.sets = (streamed.source,)
  with pytest.raises(UserError, match='has no images but those that are trained on'):
    loop.run(streamed, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_a_source_of_several_labels_cannot_be_trained_on(streamed, monkeypatch, tmp_path):
  from cvt_flax.data.files import FileSplit

  monkeypatch.setattr(FileSplit, 'multi_label', True)
  with pytest.raises(UserError, match=r"several labels an image; score it by eval.sets=\('folder:"):
    loop.run(streamed, tmp_path / 'run')


def test_a_run_of_before_a_key_was_declared_goes_on(finished, tmp_path):
  config, folder, result = finished
  run = shutil.copytree(folder, tmp_path / 'run')
  record = json.loads((run / 'experiment.json').read_text())
  del record['config']['steps'], record['config']['eval']['sets'], record['config']['stream']
  (run / 'experiment.json').write_text(json.dumps(record))
  assert loop.run(config, run)['test/top1'] == result['test/top1']


def test_an_evaluation_goes_by_what_it_depends_on(finished):
  config, folder, result = finished
  config = config.copy_and_resolve_references()
  config.engine, config.learning_rate = 'resident', 1.0
  config.augment.crop_scale, config.augment.rand_augment = (), ''
  assert loop.run(config, folder, mode='eval')['test/top1'] == result['test/top1']
  config.model.activation = 'gelu'
  config.eval.test_holdout = 0.5
  message = "activation '' -> 'gelu'.*: give its own, --config.model.activation='' .*holdout=0.0$"
  with pytest.raises(UserError, match=message):
    loop.run(config, folder, mode='eval')


def test_nothing_to_score_is_not_divergence(streamed, pictures, tmp_path):
  copy = shutil.copytree(pictures, tmp_path / 'tiny')
  for picture in (copy / 'test').rglob('*.png'):
    picture.write_bytes(b'not a picture')
  streamed.source, streamed.skip_unreadable, streamed.steps = f'folder:{copy}', True, 1
  streamed.optimizer.warmup_epochs = 0.0
  with pytest.raises(
    UserError, match='^no image can be scored: none can be read.*; training is over, the last'
  ):
    loop.run(streamed, tmp_path / 'run')


# Processes that decode.


def start_with_workers(streamed_file, quick_env, folder):
  """Starts train.py in a process group of its own, as a terminal does."""
  process = subprocess.Popen(
    [
      sys.executable,
      str(REPOSITORY / 'train.py'),
      f'--config={streamed_file}',
      f'--workdir={folder}',
      '--config.stream.workers=2',
      '--config.epochs=400',
    ],
    env={**quick_env, 'XLA_FLAGS': os.environ['XLA_FLAGS'], 'PYTHONUNBUFFERED': '1'},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  return process


def wait_for(process, word):
  for line in process.stdout:
    if word in line:
      return
  raise AssertionError(process.stderr.read())


def processes_of(group):
  """Returns those of a group that are alive; what nobody has asked the end of does not count."""
  alive = []
  for path in pathlib.Path('/proc').glob('[0-9]*/stat'):
    with contextlib.suppress(OSError):  # it ended meanwhile
      _, _, fields = path.read_text().rpartition(') ')
      state, _, of_group = fields.split()[:3]
      if int(of_group) == group and state != 'Z':
        alive.append(path)
  return alive


def assert_ended(group):
  deadline = time.monotonic() + 30
  while alive := processes_of(group):
    assert time.monotonic() < deadline, f'still there: {alive}'
    time.sleep(0.1)


@pytest.mark.parametrize(
  ('number', 'code', 'word', 'started'),
  [
    (signal.SIGINT, 130, 'run folder', 2),  # while processes start
    (signal.SIGTERM, 75, 'validation:', 0),
    (signal.SIGINT, 130, 'validation:', 1),  # while those of the next evaluation start
  ],
)
def test_a_signal_to_all_processes_saves_and_says_so(
  streamed_file, quick_env, tmp_path, number, code, word, started
):
  process = start_with_workers(streamed_file, quick_env, tmp_path / 'run')
  wait_for(process, word)
  before = set(processes_of(process.pid))
  while len(set(processes_of(process.pid)) - before) < started:
    assert process.poll() is None
    time.sleep(0.01)
  os.killpg(process.pid, number)
  _, errors = process.communicate(timeout=120)
  assert process.returncode == code, errors
  assert 'saved step' in errors and 'Traceback' not in errors and 'leaked' not in errors
  assert_ended(process.pid)


def test_processes_end_with_a_run_that_is_killed(streamed_file, quick_env, tmp_path):
  process = start_with_workers(streamed_file, quick_env, tmp_path / 'run')
  wait_for(process, 'first step')
  process.kill()
  process.communicate()
  assert_ended(process.pid)


def test_a_script_without_a_guard_is_told_of_it(streamed_file, quick_env, tmp_path):
  script = tmp_path / 'script.py'
  script.write_text(f"""
{streamed_file.read_text()}
import cvt_flax

config = get_config()
config.stream.workers = 2
try:
  cvt_flax.train(config, {str(tmp_path / 'run')!r})
except Exception as error:
  print(type(error).__name__, error)
""")
  done = subprocess.run(
    [sys.executable, str(script)], env=quick_env, capture_output=True, text=True, timeout=120
  )
  assert done.stdout.count('UserError') == 1
  assert "needs `if __name__ == '__main__':`" in done.stdout and 'Traceback' not in done.stderr


# What the engine hands to the devices.


def test_prefetch_keeps_ahead_and_closes_what_it_reads_from():
  mesh, taken, closed = make_mesh(4), [], []

  def batches():
    try:
      for i in range(100):
        taken.append(i)
        yield {'x': np.full((8, 2), i, np.float32)}
    finally:
      closed.append(True)

  feed = prefetch(batches(), mesh, ahead=3)
  for i in range(5):
    batch = next(feed)['x']
    assert batch.sharding == split_batch(mesh)
    np.testing.assert_array_equal(batch, np.full((8, 2), i))
    assert len(taken) == i + 4
  feed.close()
  assert closed == [True]


def test_all_batches_come_out_of_prefetch():
  batches = ({'x': np.full((4,), i)} for i in range(3))
  assert [int(b['x'][0]) for b in prefetch(batches, make_mesh(1), ahead=5)] == [0, 1, 2]
