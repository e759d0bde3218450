"""One config over several seeds; and the report that ends a run, or fails to."""

import gc
import json

import jax
import pytest

from cvt_flax.errors import Interrupted, UserError
from cvt_flax.report import writer
from cvt_flax.training import loop
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
  assert f'{tmp_path}/seed-3 is finished' in capsys.readouterr().out
  assert all(p.stat().st_mtime_ns == then for p, then in checkpoints.items())
  assert written == [tmp_path / 'seed-4', tmp_path]
  assert arrays_of_a_split() <= before  # nothing of a run stays on the devices
  for seed in (3, 4):
    saved = json.loads((tmp_path / f'seed-{seed}' / 'experiment.json').read_text())
    assert (saved['config']['seed'], saved['config']['seeds']) == (seed, 1)

  evaluated = loop.run(seeds, tmp_path, mode='eval')
  assert {name: x['test/top1'] for name, x in evaluated.items()} == {
    name: x['test/top1'] for name, x in found.items()
  }


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
