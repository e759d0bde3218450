"""The command line: what a person is told, in one line, and the exit code."""

import pathlib
import re
import subprocess
import sys

import pytest

from cvt_flax.training import command
from cvt_flax.training.config import keys

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
  'file of its own making': (['--config={tmp}/own.py'], r'config lacks the key .*get_config\(\)'),
  'unknown source': ([DIGITS, '--config.source=digit'], r"'digit'.*did you mean 'digits'\?"),
  'value out of range': ([DIGITS, '--config.augment.label_smoothing=2'], r'at most 1\.0'),
  'nothing to evaluate': ([DIGITS, '--mode=eval'], r'holds no run to evaluate'),
}
RIGHT = {'help': ['--help'], 'list': ['--list-configs']}
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
  for name, field, _ in keys():
    assert f'  --config.{name}={field.default!r}\n      {field.metadata["doc"]}\n' in out
  assert '--mode=train|eval' in out


def test_list_configs_lists_what_comes_along(outcomes):
  code, out, err = outcomes['list']
  assert (code, err) == (0, '')
  lines = [line.split('  ', 1) for line in out.splitlines()]
  listed = {pathlib.Path(path).name: text for path, text in lines}
  shipped = {p.name for p in (ROOT / 'configs').glob('*.py')} - {'__init__.py'}
  assert set(listed) == shipped
  assert all(text.endswith('.') for text in listed.values())


def exit_code_of(monkeypatch, capsys, error):
  def fail(*args, **kwargs):
    raise error

  monkeypatch.setattr(command.app, 'run', fail)
  with pytest.raises(SystemExit) as exited:
    command.main()
  return exited.value.code, capsys.readouterr().err


def test_every_end_of_a_run_has_its_exit_code(monkeypatch, capsys):
  for error, code in (
    (command.UserError('wrong'), 2),
    (command.Diverged('the loss is nan at step 3'), 3),
    (command.Interrupted('SIGTERM: saved step 3', 75), 75),
    (command.Interrupted('SIGINT: saved step 3', 130), 130),
  ):
    assert exit_code_of(monkeypatch, capsys, error) == (code, f'train.py: {error}\n')


def test_an_error_of_ours_keeps_its_traceback(monkeypatch):
  def fail(*args, **kwargs):
    raise ZeroDivisionError

  monkeypatch.setattr(command.app, 'run', fail)
  with pytest.raises(ZeroDivisionError):
    command.main()
