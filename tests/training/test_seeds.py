"""One config over several seeds; and the report that ends a run, or fails to."""

import gc
import json
import re

import jax
import numpy as np
import pytest

from cvt_flax.errors import Diverged, Interrupted, UserError
from cvt_flax.report import single, writer
from cvt_flax.training import experiment, loop
from cvt_flax.training.config import freeze

WRITE_REPORT = loop._write_report  # before the tests' fixture replaces it


@pytest.fixture
def seeds(config):
  config.seed, config.seeds, config.epochs = 3, 2, 1
  config.optimizer.warmup_epochs = 0.0
  return config


def arrays_of_a_split():
  """Returns how many arrays on the devices are as large as the images of a split."""
  return sum(x.nbytes > 20_000 for x in jax.live_arrays())


def test_each_seed_is_a_run_like_any_other(seeds, tmp_path, capsys, monkeypatch):
  alone = seeds.copy_and_resolve_references()
  alone.seeds = 1
  expected = loop.run(alone, tmp_path / 'seed-3')
  checkpoints = {p: p.stat().st_mtime_ns for p in (tmp_path / 'seed-3').rglob('checkpoints/*')}
  gc.collect()

  written, before = [], arrays_of_a_split()
  monkeypatch.setattr(loop, '_write_report', lambda folder: written.append(folder))
  capsys.readouterr()
  found = loop.run(seeds, tmp_path)
  assert list(found) == ['seed-3', 'seed-4'] and found['seed-3'] != found['seed-4']
  # The first was there already, and is left as it is.
  assert found['seed-3'] | expected == found['seed-3']
  out = capsys.readouterr().out
  assert f'{tmp_path}/seed-3 is finished' in out
  tops = [metrics['test/top1'] for metrics in found.values()]
  words = f'test: top-1 {np.mean(tops):.4f} ± {np.std(tops, ddof=1):.4f} over 2 seeds\n'
  assert out.endswith(words)
  assert all(p.stat().st_mtime_ns == then for p, then in checkpoints.items())
  # The first had none yet.
  assert written == [tmp_path / 'seed-3', tmp_path / 'seed-4', tmp_path]
  assert arrays_of_a_split() <= before  # nothing of a run stays on the devices
  for seed in (3, 4):
    saved = json.loads((tmp_path / f'seed-{seed}' / 'experiment.json').read_text())
    assert (saved['config']['seed'], saved['config']['seeds']) == (seed, 1)

  evaluated = loop.run(seeds, tmp_path, mode='eval')
  assert {name: x['test/top1'] for name, x in evaluated.items()} == {
    name: x['test/top1'] for name, x in found.items()
  }


def test_a_seed_that_diverges_leaves_the_others_to_train(seeds, tmp_path, monkeypatch, capsys):
  def train(config, folder, watch):
    if config.seed == 3:
      raise Diverged('the loss is nan at step 1')
    return {'test/top1': 0.5}

  written = []
  monkeypatch.setattr(loop, '_train', train)
  monkeypatch.setattr(loop, '_write_report', written.append)
  with pytest.raises(Diverged, match=r'^1 of 2 seeds: seed-3 \(the loss is nan at step 1\)$'):
    loop.run(seeds, tmp_path)
  out = capsys.readouterr().out
  assert 'seed 3: the loss is nan at step 1' in out and 'seed 4: run 2 of 2' in out
  assert written == [tmp_path]


def test_a_run_that_was_stopped_before_its_report_gets_it(config, tmp_path, monkeypatch):
  config.epochs, config.optimizer.warmup_epochs = 1, 0.0
  folder = tmp_path / 'run'
  loop.run(config, folder)
  before = (folder / 'experiment.json').stat().st_mtime_ns
  monkeypatch.setattr(loop, '_write_report', WRITE_REPORT)
  monkeypatch.setattr(single, 'sections', lambda run, folder: ['a page'])
  page = folder / 'report' / 'index.html'
  assert not page.exists()
  loop.run(config, folder)
  assert 'a page' in page.read_text()
  # It says what the run was computed with, not where it was asked for again.
  assert (folder / 'experiment.json').stat().st_mtime_ns == before
  page.write_text('kept')
  loop.run(config, folder)
  assert page.read_text() == 'kept'
  # One of fewer epochs is not: this run, too, is stopped before its report.
  config.epochs = 2
  monkeypatch.setattr(loop, '_write_report', lambda folder: None)
  loop.run(config, folder)
  assert not page.exists()


def test_averages_of_few_steps_are_warned_of(config, tmp_path, capsys):
  config.epochs, config.optimizer.warmup_epochs = 1, 0.0
  config.optimizer.ema_decay = 0.999
  loop.run(config, tmp_path / 'run')
  words = r'WARNING: optimizer.ema_decay=0.999 over \d+ steps: .* to 9\d% still'
  assert re.search(words, capsys.readouterr().out)


def test_another_folder_is_beside_that_of_all_seeds(tmp_path):
  assert experiment.free(tmp_path / 'a' / 'seed-0') == f'--workdir={tmp_path}/a-2'
  assert experiment.free(tmp_path / 'a-seed0') == f'--workdir={tmp_path}/a-seed0-2'


def test_a_run_that_is_stopped_stops_those_after_it(seeds, tmp_path, monkeypatch):
  def stopped(config, folder, watch):
    raise Interrupted('SIGTERM', 75)

  monkeypatch.setattr(loop, '_train', stopped)
  with pytest.raises(Interrupted) as stop:
    loop.run(seeds, tmp_path)
  assert stop.value.exit_code == 75


def test_what_does_not_go_with_seeds(seeds, trained, tmp_path):
  with pytest.raises(UserError, match='holds a run of one seed'):
    loop.run(seeds, trained[1])
  with pytest.raises(UserError, match='holds no run to evaluate'):
    loop.run(seeds, tmp_path, mode='eval')
  seeds.init_from = str(trained[1])
  with pytest.raises(UserError, match='seeds=2: .* does not hold the run of every seed'):
    loop.run(seeds, tmp_path, mode='eval')
  seeds.seed = 2**32 - 1
  with pytest.raises(UserError, match='the last one is above 4294967295'):
    freeze(seeds)


def test_a_report_that_fails_costs_a_line(tmp_path, monkeypatch, capsys):
  def broken(folders):
    raise RuntimeError('no\nink')

  monkeypatch.setattr(writer, 'write_report', broken)
  WRITE_REPORT(tmp_path)
  out = capsys.readouterr().out
  assert out.count('\n') == 1 and 'RuntimeError: no ink' in out
  assert f'python -m cvt_flax.report {tmp_path}' in out
