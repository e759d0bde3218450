"""Runs that are killed, stopped, and gone on with."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from cvt_flax.errors import Interrupted
from cvt_flax.training import loop
from cvt_flax.training.metrics import read_metrics
from tests.training.compare import assert_same_bytes, lines_without_times, saved_arrays

REPOSITORY = pathlib.Path(__file__).parents[2]


def _command(config_file, folder):
  return [
    sys.executable,
    str(REPOSITORY / 'train.py'),
    f'--config={config_file}',
    f'--workdir={folder}',
  ]


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


@pytest.mark.parametrize(('file', 'steps'), [('stateful_file', 33), ('streamed_file', 15)])
def test_killed_three_times_it_ends_with_the_same_bytes(file, steps, quick_env, tmp_path, request):
  """kill -9 in mid-epoch, and the same command again: as if it had never been killed."""
  config_file = request.getfixturevalue(file)
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  environment = {**quick_env, 'XLA_FLAGS': os.environ['XLA_FLAGS']}
  subprocess.run(_command(config_file, whole), env=environment, check=True, capture_output=True)

  step = 0
  for _ in range(3):
    process = subprocess.Popen(
      _command(config_file, killed), env=environment, stdout=subprocess.DEVNULL
    )
    step = _kill_after(process, killed, step, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
  subprocess.run(_command(config_file, killed), env=environment, check=True, capture_output=True)

  assert lines_without_times(killed) == lines_without_times(whole)
  expected, got = saved_arrays(whole, steps), saved_arrays(killed, steps)
  assert any('ema' in name for name in got)
  assert_same_bytes(got, expected)


def test_sigterm_saves_exits_75_and_the_run_goes_on(config_file, quick_env, tmp_path, trained):
  environment = {**quick_env, 'XLA_FLAGS': os.environ['XLA_FLAGS']}
  process = subprocess.Popen(
    _command(config_file, tmp_path / 'run'), env=environment, stderr=subprocess.PIPE, text=True
  )
  _kill_after(process, tmp_path / 'run', 0, signal.SIGTERM)
  _, message = process.communicate(timeout=120)
  assert process.returncode == 75
  assert 'SIGTERM: stopping after this step; again stops at once' in message
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
    signals._noted = signal.SIGTERM
    return original(self, variables, arrays, signals)

  with monkeypatch.context() as patch:
    patch.setattr(Setup, 'evaluate', interrupted)
    with pytest.raises(Interrupted, match='saved step 11') as stop:
      loop.run(config, tmp_path)
    assert stop.value.exit_code == 75
  result = loop.run(config, tmp_path)
  _, folder, expected = trained
  assert lines_without_times(tmp_path) == lines_without_times(folder)
  assert result == expected
