"""get_config by name, and what train makes of names and watchers."""

import json
import pathlib
import shutil

import pytest

from cvt_flax import get_config, train
from cvt_flax.errors import UserError
from cvt_flax.training import shipped
from cvt_flax.training.config import freeze


@pytest.mark.parametrize('name', [path.stem for path in shipped.shipped_configs()])
def test_every_shipped_config_has_its_name(name):
  config = get_config(name)
  assert config.is_locked
  assert config.source == '' or freeze(config)


def test_a_variant():
  assert get_config('ablations:linear').model.projection == 'linear'
  assert get_config('cvt13_cifar10').model.name == 'cvt-13'


def test_every_call_returns_its_own():
  get_config('digits').epochs = 3
  assert get_config('digits').epochs == 40


@pytest.mark.parametrize(
  'name, message',
  [
    ('cvt13_cifr10', "did you mean 'cvt13_cifar10'"),
    ('', 'one of ablations, cct7_cifar10'),
    ('digits:x', 'digits has no variants'),
    ('ablations:lin', 'the variants are base, avg, linear'),
    ('../setup', 'one of ablations'),
  ],
)
def test_a_name_that_is_none(name, message):
  with pytest.raises(UserError, match=message):
    get_config(name)
  with pytest.raises(UserError, match=message):
    train(name)


def test_in_a_wheel_configs_lie_inside(tmp_path, monkeypatch):
  shutil.copytree(shipped.shipped_configs()[0].parent, tmp_path / 'configs')
  monkeypatch.setattr(shipped, '_PACKAGE', tmp_path)
  assert {path.parent for path in shipped.shipped_configs()} == {tmp_path / 'configs'}
  assert get_config('digits').name == 'digits'


def test_below_the_working_directory_paths_are_short(monkeypatch):
  folder = shipped.shipped_configs()[0].absolute().parent
  monkeypatch.chdir(folder.parent)
  assert pathlib.Path('configs/digits.py') in shipped.shipped_configs()
  monkeypatch.chdir(folder / '..' / 'tests')
  assert folder / 'digits.py' in shipped.shipped_configs()


def test_watch_gets_every_line_as_it_is_written(config, tmp_path):
  config.epochs = 2
  path, seen = tmp_path / 'run' / 'metrics.jsonl', []

  def watch(line):
    seen.append(line)
    assert json.loads(path.read_text().splitlines()[-1]) == line

  train(config, tmp_path / 'run', watch=watch)
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert seen == lines and any('val/top1' in line for line in lines)
  assert 'checkpoint' in lines[-1]

  finished = []
  train(config, tmp_path / 'run', watch=finished.append)
  assert finished == lines


def test_an_evaluation_has_nothing_to_watch(config, tmp_path):
  with pytest.raises(UserError, match='watch has no effect'):
    train(config, tmp_path, mode='eval', watch=print)
