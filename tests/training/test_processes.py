"""Several processes of one run, which find each other by jax.distributed, on CPU devices."""

import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from cvt_flax.errors import Interrupted, UserError
from cvt_flax.training import loop, processes, sharding, signals
from cvt_flax.weights.run_folder import read_metrics
from tests.conftest import ROOT
from tests.training.compare import assert_same_bytes, lines_without_times, saved_arrays
from tests.training.conftest import changed

# Runs train.py, and writes which images each process read, in their order.
RECORDING = """
import contextlib, sys
import numpy as np
from cvt_flax import command_line
from cvt_flax.data import stream
from cvt_flax.training.command import main

path, original = sys.argv.pop(1), stream.train_batches

def train_batches(*args, **kwargs):
  read = []
  with contextlib.closing(original(*args, **kwargs)) as batches:
    for batch in batches:
      read.append(batch['index'])
      yield batch
  np.save(path, read)

stream.train_batches = train_batches
if __name__ == '__main__':
  command_line.run(main)
"""


def start(env, count, devices, *arguments, program=(ROOT / 'train.py',), alone=False):
  """Starts a run of `count` processes, with so many devices each.

  One joins no others, unless it is `alone` in what it joins.
  """
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{s.getsockname()[1]}'
  env = {**env, 'JAX_NUM_CPU_DEVICES': str(devices)}
  started = []
  for i in range(count):
    command = [sys.executable, *(str(word).format(process=i) for word in program), *arguments]
    command += [f'--distributed={address},{i},{count}'] if count > 1 or alone else []
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    started.append(subprocess.Popen(command, env=env, text=True, **pipes))
  return started


def finish(started, seconds=600):
  """Waits for processes; returns the exit code, output and errors of each."""
  ends = [process.communicate(timeout=seconds) for process in started]
  return [(process.returncode, *end) for process, end in zip(started, ends, strict=True)]


def losses(folder):
  lines = read_metrics(folder / 'metrics.jsonl')
  return np.array([line['train/loss'] for line in lines if 'train/loss' in line])


def assert_close(got, expected, steps):
  assert len(got) == len(expected) >= steps
  np.testing.assert_allclose(got[:10], expected[:10], rtol=2e-6)
  np.testing.assert_allclose(got[:steps], expected[:steps], rtol=1e-4)


NANO = [
  f'--config={ROOT}/configs/digits.py',
  '--config.steps=60',
  '--config.optimizer.warmup_epochs=0.5',
  '--config.model.depths=(1,1,1)',  # each array is a sum of its own here, and that takes its time
  '--config.batch_size=32',
  '--config.model.bn_group_size=4',  # the images of a device
  '--config.log_every=1',
  '--config.tensorboard=false',
  '--config.eval.every_epochs=100',
]


@pytest.fixture(scope='module')
def jpegs(tmp_path_factory):
  """A folder of two classes of noisy JPEGs, dark and bright: 132 to train on, 16 to validate."""
  root = tmp_path_factory.mktemp('jpegs')
  rng = np.random.default_rng(0)
  for split, count in (('train', 132), ('val', 16)):
    for i in range(count):
      path = root / split / ('dark', 'bright')[i % 2]
      path.mkdir(parents=True, exist_ok=True)
      pixels = rng.normal(80 + 90 * (i % 2), 40, (*rng.integers(24, 48, 2), 3)).clip(0, 255)
      Image.fromarray(pixels.astype(np.uint8)).save(path / f'{i}.jpg')
  return root


def test_two_processes_compute_what_one_does(quick_env, tmp_path):
  runs = [
    start(quick_env, count, 8 // count, *NANO, f'--workdir={tmp_path}/{count}') for count in (1, 2)
  ]
  one, two = map(finish, runs)
  assert [code for code, *_ in (*one, *two)] == [0, 0, 0], two
  # The first speaks. Threads of XLA's collectives, in all, write into each other's lines.
  said = re.compile('jax|images|loss|top-1')
  assert said.search(two[0][1]) and not said.search(two[1][1])
  assert_close(losses(tmp_path / '2'), losses(tmp_path / '1'), 60)
  assert (tmp_path / '2/report/index.html').is_file()


def test_two_processes_read_what_one_does(quick_env, jpegs, tmp_path):
  (tmp_path / 'recording.py').write_text(RECORDING)
  changes = [
    f'--config.source=folder:{jpegs}',
    '--config.engine=stream',
    '--config.augment.crop_padding=0',
    '--config.augment.crop_scale=(0.5,1.0)',
    '--config.augment.rand_augment=rand-m9-mstd0.5-inc1',
  ]
  started = []
  for count in (1, 2):
    program = tmp_path / 'recording.py', f'{tmp_path}/read-{count}-{{process}}.npy'
    folder = f'--workdir={tmp_path}/{count}'
    started += start(quick_env, count, 8 // count, *NANO, *changes, folder, program=program)
  ends = finish(started)
  assert [code for code, *_ in ends] == [0, 0, 0], ends
  read = {}
  for count in (1, 2):
    parts = [np.load(f'{tmp_path}/read-{count}-{i}.npy') for i in range(count)]
    read[count] = np.concatenate(parts, axis=1)  # [step, place in the batch]
  np.testing.assert_array_equal(read[2], read[1])
  for epoch in read[2].reshape(15, -1):  # 4 steps of 32 images
    assert len(np.unique(epoch)) == epoch.size == 128
  assert_close(losses(tmp_path / '2'), losses(tmp_path / '1'), 60)


# Runs train.py; the process that is named stops itself by SIGTERM, before it reads its data, while
# it saves its first checkpoint, or in its first evaluation, which is a long one.
STOPPED = """
import itertools, os, signal, sys, time
import orbax.checkpoint as ocp
from cvt_flax import command_line
from cvt_flax.training.command import main
from cvt_flax.training.setup import Setup

process, when = sys.argv.pop(1), sys.argv.pop(1)

def stopped(moment, function):
  due = [process == '1' and when == moment]
  def call(*args, **kwargs):
    if due[0]:
      due[0] = False
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(2)  # until it is known to all
    return function(*args, **kwargs)
  return call

def long_evaluation(self, variables, data, signals):
  feed = self.engine.feed_evaluation
  def slow(*args):
    for fed in itertools.chain.from_iterable(itertools.repeat(list(feed(*args)), 1000)):
      time.sleep(0.01)
      yield fed
  self.engine.feed_evaluation = slow
  return evaluate(self, variables, data, signals)

evaluate = Setup.evaluate
Setup.__init__ = stopped('setup', Setup.__init__)
Setup.evaluate = stopped('evaluation', long_evaluation if when == 'evaluation' else evaluate)
# Of what Orbax does to save, this comes after it might ask whether to stop.
waiting = ocp.CheckpointManager.wait_until_finished
ocp.CheckpointManager.wait_until_finished = stopped('saving', waiting)
if __name__ == '__main__':
  command_line.run(main)
"""


LINES = """
  config.mesh.data = config.model.bn_group_size = 0
  config.log_every = 1
"""


@pytest.fixture(scope='module')
def several(config_file):
  """The tiny config, on all devices of all processes, which batch norms average over."""
  return changed(config_file, 'several', LINES)


@pytest.fixture(scope='module')
def whole(several, quick_env, tmp_path_factory):
  """The folder of a run by two processes that nothing stopped."""
  folder = tmp_path_factory.mktemp('runs') / 'whole'
  ends = finish(start(quick_env, 2, 2, f'--config={several}', f'--workdir={folder}'))
  assert [code for code, *_ in ends] == [0, 0], ends
  return folder


@pytest.fixture(scope='module')
def stopped(several, quick_env, tmp_path_factory):
  """The folder of one whose second process got a SIGTERM in the evaluation after step 11."""
  path = tmp_path_factory.mktemp('runs')
  (path / 'stopped.py').write_text(STOPPED)
  arguments = [f'--config={several}', f'--workdir={path}/run']
  program = path / 'stopped.py', '{process}', 'evaluation'
  assert_stopped(finish(start(quick_env, 2, 2, *arguments, program=program)), 11)
  return path / 'run'


def assert_stopped(ends, step):
  assert [code for code, *_ in ends] == [75] * len(ends), ends
  for _, _, errors in ends:
    assert f'SIGTERM: saved step {step}' in errors and 'Traceback' not in errors


def test_a_sigterm_to_one_stops_all_at_the_same_step(several, whole, stopped, quick_env, tmp_path):
  """In evaluation, then in training; after both the bytes are those of the run nothing stopped."""
  run = shutil.copytree(stopped, tmp_path / 'run')
  arguments = [f'--config={several}', f'--workdir={run}']
  started = start(quick_env, 2, 2, *arguments)
  while read_metrics(run / 'metrics.jsonl')[-1]['step'] < 13:
    assert started[1].poll() is None, finish(started)
    time.sleep(0.01)
  started[1].send_signal(signal.SIGTERM)
  ends = finish(started)
  step = max(int(path.name) for path in (run / 'checkpoints').glob('[0-9]*'))
  assert 13 <= step < 33 and 'going on from step 11' in ends[0][1]
  assert_stopped(ends, step)
  ends = finish(start(quick_env, 2, 2, *arguments))
  assert [code for code, *_ in ends] == [0, 0] and f'going on from step {step}' in ends[0][1]
  assert lines_without_times(run) == lines_without_times(whole)
  assert_same_bytes(saved_arrays(run, 33), saved_arrays(whole, 33))


@pytest.mark.parametrize(
  ('count', 'when', 'least'), [(1, 'setup', 1), (2, 'setup', 1), (2, 'saving', 11)]
)
def test_a_sigterm_is_answered_whenever_it_comes(count, when, least, several, quick_env, tmp_path):
  (tmp_path / 'stopped.py').write_text(STOPPED)
  program = tmp_path / 'stopped.py', '{process}' if count > 1 else '1', when
  arguments = [f'--config={several}', f'--workdir={tmp_path}/run']
  ends = finish(start(quick_env, count, 4 // count, *arguments, program=program, alone=True))
  step = max(int(path.name) for path in (tmp_path / 'run/checkpoints').glob('[0-9]*'))
  assert least <= step < 33
  assert_stopped(ends, step)


def test_one_process_goes_on_from_two(several, whole, stopped, quick_env, tmp_path):
  run = shutil.copytree(stopped, tmp_path / 'run')
  (end,) = finish(start(quick_env, 1, 4, f'--config={several}', f'--workdir={run}'))
  assert end[0] == 0 and 'going on from step 11' in end[1], end
  got, expected = losses(run), losses(whole)
  assert len(got) == len(expected) == 33
  np.testing.assert_array_equal(got[:11], expected[:11])
  np.testing.assert_allclose(got[11:21], expected[11:21], rtol=2e-6)


def test_two_processes_write_the_shards_that_one_did_not(quick_env, jpegs, tmp_path):
  one, two = tmp_path / 'one', tmp_path / 'two'
  options = ['--weights=cvt-nano-cifar10', '--shard_size=40', '--batch_size=16', '--features']
  options += [str(jpegs)]
  program = '-m', 'cvt_flax.batch_predict'
  ((code, *said),) = finish(start(quick_env, 1, 4, *options, str(one), program=program))
  assert code == 0 and len(shards := sorted(one.glob('*.npz'))) == 4, said
  shutil.copytree(one, two)
  for shard in shards[1:3]:
    (two / shard.name).unlink()
  ends = finish(start(quick_env, 2, 2, *options, str(two), program=program))
  assert [code for code, *_ in ends] == [0, 0], ends
  for said in ('2 of 4 shards are there', 'shard 3 of 4'):
    assert said in ends[0][1] and said not in ends[1][1]
  for shard in shards:
    expected, found = dict(np.load(shard)), dict(np.load(two / shard.name))
    assert found.keys() == expected.keys()
    for name, array in found.items():
      if array.dtype == np.float32:
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-5)
      else:
        np.testing.assert_array_equal(array, expected[name])


# Of two processes the first waits for the second, which fails.
FAILING = """
import sys
from cvt_flax import command_line
from cvt_flax.training import processes

def main():
  processes.join(sys.argv[1].removeprefix('--distributed='))
  if not processes.is_first():
    raise KeyError('k')
  processes.wait_for_all('ever')

command_line.run(main)
"""


def test_none_waits_for_one_that_failed(clean_env, tmp_path):
  (tmp_path / 'failing.py').write_text(FAILING)
  started = start(clean_env, 2, 1, program=(tmp_path / 'failing.py',))
  first, second = finish(started, seconds=200)  # as Python ends JAX would wait for 300
  assert second[0] == 1 and second[2].endswith("KeyError: 'k'\n")
  assert first[0] != 0


def test_a_run_goes_on_on_another_mesh(config, tmp_path, monkeypatch):
  monkeypatch.setattr(sharding, '_SMALL', 8)  # the tiny model has no larger arrays
  config.log_every, config.optimizer.warmup_epochs = 1, 0.5
  config.epochs, config.mesh.data, config.mesh.fsdp = 1, 2, 4
  loop.run(config, tmp_path / 'saved')
  table = (tmp_path / 'saved' / 'parameters.txt').read_text()
  assert "'fsdp'" in table
  config.epochs, found = 2, {}
  for data, fsdp in ((2, 4), (8, 1), (4, 1), (1, 1)):
    config.mesh.data, config.mesh.fsdp = data, fsdp
    run = shutil.copytree(tmp_path / 'saved', tmp_path / f'{data}-{fsdp}')
    loop.run(config, run)
    found[data, fsdp] = losses(run)[11:]
  expected = found.pop((2, 4))
  assert len(expected) == 11
  for got in found.values():
    np.testing.assert_allclose(got, expected, rtol=2e-6)


@pytest.mark.parametrize(
  'how', ['two', '127.0.0.1,0,2', '127.0.0.1:1,2,2', '127.0.0.1:1,-1,2', '127.0.0.1:1,0,x']
)
def test_what_is_no_place_among_processes(how):
  with pytest.raises(UserError, match=f'--distributed={how}: auto or HOST:PORT,I,N is needed'):
    processes.join(how)


def test_processes_that_jax_cannot_find(monkeypatch):
  def initialize():
    raise ValueError('coordinator_address should be defined.')

  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  with pytest.raises(UserError, match='should be defined; where JAX finds no others'):
    processes.join('auto')


def test_processes_that_do_not_answer(monkeypatch):
  def initialize(**_):
    raise RuntimeError('Failed to connect\n  in 300 s')

  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  with pytest.raises(Interrupted, match='Failed to connect in 300 s') as stop:
    processes.join('127.0.0.1:1,0,2')
  assert stop.value.exit_code == 75


def test_runs_one_after_another_ask_on(monkeypatch):
  """JAX answers a process by how often it has asked, in all of its runs."""
  asked = []
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  monkeypatch.setattr(
    signals.multihost_utils, 'reached_preemption_sync_point', lambda i: asked.append(i)
  )
  for _ in range(2):
    run = signals.Signals()
    assert not run.received() and not run.received()
  assert asked == list(range(asked[0], asked[0] + 4))


def test_ctrl_c_in_one_process_is_a_sigterm_to_all(monkeypatch):
  terms = []
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(
    signals.multihost_utils, 'reached_preemption_sync_point', lambda _: bool(terms)
  )
  before = signal.signal(signal.SIGTERM, lambda number, _: terms.append(number))  # jax's own
  try:
    with signals.Signals() as here, signals.Signals() as elsewhere:
      assert not here.received() and not elsewhere.received()
      here._note(signal.SIGINT, None)
      assert here.received() and elsewhere.received() and len(terms) == 1
  finally:
    signal.signal(signal.SIGTERM, before)
  stops = here.interruption('saved'), elsewhere.interruption('saved')
  assert [(str(stop), stop.exit_code) for stop in stops] == [
    ('Ctrl-C: saved', 130),
    ('SIGTERM: saved', 75),
  ]


def test_one_that_has_joined_no_others_answers_each_time(monkeypatch):
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  monkeypatch.setattr(signals.multihost_utils, 'reached_preemption_sync_point', lambda _: False)
  for number, code in [(signal.SIGINT, 130), (signal.SIGTERM, 75)] * 2:
    with signals.Signals() as noted:
      assert not noted.received()
      signal.raise_signal(number)
      assert noted.received() and noted.interruption('saved').exit_code == code


def test_processes_that_have_not_joined(monkeypatch, config, tmp_path):
  monkeypatch.setattr(jax, 'process_count', lambda: 4)
  with pytest.raises(UserError, match='one of 4 processes that have not joined: start each with'):
    loop.run(config, tmp_path)
