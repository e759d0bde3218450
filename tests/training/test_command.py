"""The command line: what a person is told, in one line, and the exit code."""

import dataclasses
import inspect
import pathlib
import re
import runpy
import shlex
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from cvt_flax.errors import UserError
from cvt_flax.training import command_help
from cvt_flax.training.config import TrainConfig, freeze, get_config, keys

ROOT = pathlib.Path(__file__).resolve().parents[2]
DIGITS = '--config=configs/digits.py'

# A config file of one's own, by name, and what it holds.
FILES = {
  'raises.py': 'def get_config():\n  return 1 / 0\n',
  'type_error.py': 'def get_config():\n  return 1 + "a"\n',
  'value_error.py': 'def get_config():\n  return int("many")\n',
  'reads.py': 'def get_config():\n  return open("nowhere.txt")\n',
  'syntax.py': 'def get_config(:\n',
  'misspelt.py': (
    'from cvt_flax.training.config import get_config as defaults\n'
    'def get_config():\n  config = defaults()\n  config.model.dephts = (1,)\n  return config\n'
  ),
  'mistyped.py': (
    'from cvt_flax.training.config import get_config as defaults\n'
    'def get_config():\n  config = defaults()\n  config.batch_size = "many"\n  return config\n'
  ),
  'lacks.py': 'def something_else():\n  pass\n',
  'forgot_return.py': 'def get_config():\n  pass\n',
  'own.py': (
    'import ml_collections\n'
    'def get_config():\n  return ml_collections.ConfigDict({"batch_size": 4})\n'
  ),
}

# Name of the test: (arguments, what the one line must say).
WRONG = {
  'no config': ([], r'--config=configs/NAME\.py is needed'),
  'unknown key': ([DIGITS, '--config.btch_size=3'], r"'btch_size', did you mean 'batch_size'\?"),
  'unknown key in a group': (
    [DIGITS, '--config.model.kv_stride=(1,)'],
    r"'model\.kv_stride', did you mean 'model\.kv_strides'\?",
  ),
  'key without its group': (
    [DIGITS, '--config.weight_decay=0'],
    r"'weight_decay', did you mean 'optimizer\.weight_decay'\?",
  ),
  'unknown key, negated': (
    [DIGITS, '--noconfig.augment.flop'],
    r"'augment\.flop', did you mean 'augment\.flip'\?",
  ),
  'unknown key, in two arguments': (
    [DIGITS, '--config.epoch', '3'],
    r"'epoch', did you mean 'epochs'\?",
  ),
  'key before the config': (['--config.epochs=3', DIGITS], r'--config\.epochs.*before'),
  'key without a config': (['--config.epochs=3'], r'--config'),
  'unknown flag': ([DIGITS, '--wrkdir=x'], r"'wrkdir'.*workdir"),
  'unknown mode': ([DIGITS, '--mode=evl'], r'--mode=evl.*train\|eval'),
  'not a flag': ([DIGITS, 'epochs=3'], r"'epochs=3': all arguments are flags"),
  'missing file': (
    ['--config=configs/digit.py'],
    r"configs/digit\.py: there is no such file, did you mean '.*configs/digits\.py'\?",
  ),
  'empty name': (['--config='], r'--config'),
  'a folder': (['--config=configs'], r'configs'),
  'wrong variant': (
    ['--config=configs/cvt13_cifar10.py:small'],
    r'cvt13_cifar10\.py:small: .*small_images',
  ),
  'variant of a config without any': ([f'{DIGITS}:big'], r'digits\.py has no variants'),
  'wrong type of a number': ([DIGITS, '--config.epochs=many'], r"config\.epochs=many.*'many'"),
  'a fraction for an integer': ([DIGITS, '--config.epochs=1.5'], r'config\.epochs=1\.5'),
  'wrong type of a boolean': (
    [DIGITS, '--config.augment.flip=maybe'],
    r'config\.augment\.flip=maybe',
  ),
  'wrong type of a tuple': ([DIGITS, '--config.model.depths=(1,x)'], r'model\.depths='),
  'a number for a group': ([DIGITS, '--config.model=3'], r'config\.model=3'),
  'file that raises': (['--config={tmp}/raises.py'], r'raises\.py.*: ZeroDivisionError: division'),
  'file that raises a TypeError': (
    ['--config={tmp}/type_error.py'],
    r'type_error\.py.*: TypeError: unsupported operand',
  ),
  'file that raises a ValueError': (
    ['--config={tmp}/value_error.py'],
    r"value_error\.py.*: ValueError: invalid literal for int\(\) with base 10: 'many'",
  ),
  'file that raises an OSError': (
    ['--config={tmp}/reads.py'],
    r"reads\.py.*: FileNotFoundError: .*'nowhere\.txt'",
  ),
  'file that does not parse': (['--config={tmp}/syntax.py'], r'syntax\.py: SyntaxError'),
  'file that misspells a key': (['--config={tmp}/misspelt.py'], r'dephts'),
  'file that mistypes a key': (['--config={tmp}/mistyped.py'], r'mistyped\.py.*batch_size'),
  'file without get_config': (['--config={tmp}/lacks.py'], r'lacks\.py.*get_config'),
  'file without return': (['--config={tmp}/forgot_return.py'], r'forgot_return\.py'),
  # What the command line cannot know is found when the run begins.
  'file of its own making': (
    ['--config={tmp}/own.py'],
    r"config lacks the key 'name': start from a config that is there",
  ),
  'unknown source': ([DIGITS, '--config.source=digit'], r"'digit'.*did you mean 'digits'\?"),
  'value out of range': ([DIGITS, '--config.augment.label_smoothing=2'], r'at most 1\.0'),
  'nothing to evaluate': ([DIGITS, '--mode=eval'], r'holds no run to evaluate'),
}
RIGHT = {
  'help': ['--help'],
  'help of a config': [DIGITS, '--config.batch_size=32', '--help'],
  'list': ['--list-configs'],
}
CONCURRENT = 3


@pytest.fixture(scope='module')
def outcomes(tmp_path_factory, clean_env):
  """{name of the test: (exit code, standard output, standard error)}, of processes."""
  tmp = tmp_path_factory.mktemp('configs')
  for name, text in FILES.items():
    (tmp / name).write_text(text)
  cases = {name: arguments for name, (arguments, _) in WRONG.items()} | RIGHT
  waiting, running, outcomes = list(cases.items()), {}, {}
  while waiting or running:
    while waiting and len(running) < CONCURRENT:
      name, arguments = waiting.pop(0)
      workdir = [] if name == 'no config' else [f'--workdir={tmp}/run']
      arguments = [a.format(tmp=tmp) for a in arguments]
      running[name] = subprocess.Popen(
        [sys.executable, ROOT / 'train.py', *arguments, *workdir],
        cwd=ROOT,
        env=clean_env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    name = next(iter(running))  # the oldest
    process = running.pop(name)
    out, err = process.communicate(timeout=120)
    outcomes[name] = process.returncode, out, err
  assert not (tmp / 'run').exists()  # nothing was written
  return outcomes


@pytest.mark.parametrize('name', WRONG)
def test_wrong_input_is_told_in_one_line(outcomes, name):
  code, _, err = outcomes[name]
  assert code == 2, err
  assert re.fullmatch(r'train\.py: [^\n]+\n', err)
  assert 'Traceback' not in err and 'File "' not in err
  assert re.search(WRONG[name][1], err)
  assert len(err) < 300


def test_help_lists_every_key_with_its_default(outcomes):
  code, out, err = outcomes['help']
  assert (code, err) == (0, '')
  words = ' '.join(out.split())  # as wide as the terminal is, a doc is on several lines
  for name, field, _ in keys():
    assert f' --config.{name}={shlex.quote(str(field.default))} ' in words
    assert ' '.join(field.metadata['doc'].split()) in words
  assert '--mode=train|eval' in out
  _, _, codes = out.partition('Exit codes\n')
  told = re.findall(r'^  (\d+) ', codes.partition('\n\n')[0], re.MULTILINE)
  assert set(told) == {'0', '1', '2', '3', '75', '130', '141'}
  assert max(map(len, out.splitlines())) <= 80  # where there is no terminal


def test_defaults_are_shown_as_they_can_be_given(monkeypatch):
  monkeypatch.setenv('COLUMNS', '100')
  lines = command_help.help_text().splitlines()
  words = [shlex.split(line[2:].split('  ')[0]) for line in lines if line[:11] == '  --config.']
  shown = [word for (word,) in words if 'KEY' not in word]
  assert len(shown) == len(list(keys()))
  arguments = ['train.py', *shown, '--config.source=digits']
  monkeypatch.setattr(sys, 'argv', arguments)  # where ml_collections looks for overrides
  values = flags.FlagValues()
  config_flags.DEFINE_config_dict('config', get_config(), flag_values=values)
  values(arguments)
  assert freeze(values.config) == dataclasses.replace(TrainConfig(), source='digits')


@pytest.mark.parametrize('columns', [40, 72, 100, 200])
def test_help_is_as_wide_as_the_terminal(monkeypatch, columns):
  monkeypatch.setenv('COLUMNS', str(columns))
  text = command_help.help_text()
  keys_at = text.index('Keys and')
  prose = [line for line in text[keys_at:].splitlines() if '--config.' not in line]
  assert 30 < max(map(len, prose)) <= min(columns, 100)


def test_help_of_a_config_has_its_own_values(outcomes):
  code, out, err = outcomes['help of a config']
  assert (code, err) == (0, '')
  assert "A small CvT on scikit-learn's handwritten digits" in out
  words = ' '.join(out.split())
  assert '--config.source=digits tfds:' in words
  assert '--config.batch_size=32 images a step, over all devices (by default 128)' in words
  assert '--config.seed=0 of everything that is random --config' in words


def test_list_configs_lists_what_comes_along(outcomes, clean_env):
  code, out, err = outcomes['list']
  assert (code, err) == (0, '')
  module = [sys.executable, '-m', 'cvt_flax.training', '--list-configs']
  assert subprocess.check_output(module, cwd=ROOT, env=clean_env, text=True) == out
  listed, starts = {}, set()
  for line in out.splitlines():
    path, about = re.fullmatch(r'(\S+)  +(.*\.)', line).groups()
    listed[pathlib.Path(path).name] = about
    starts.add(line.index(about))
  shipped = {p.name for p in (ROOT / 'configs').glob('*.py')} - {'__init__.py'}
  assert set(listed) == shipped and len(starts) == 1
  assert listed['cvt13_cifar10.py'] == 'CvT-13 on CIFAR-10. Variants: small_images.'


@pytest.mark.parametrize('path', sorted((ROOT / 'configs').glob('*.py')), ids=lambda p: p.stem)
def test_variants_that_are_listed_are_those_that_there_are(path):
  namespace = runpy.run_path(str(path))
  variants = command_help.variants_of(path)
  if not variants:
    assert not inspect.signature(namespace['get_config']).parameters
    return
  for variant in variants:
    assert variant in command_help.help_text(path, namespace['get_config'](variant))
  with pytest.raises(UserError) as error:
    namespace['get_config']('no such variant')
  assert all(variant in str(error.value) for variant in variants)
