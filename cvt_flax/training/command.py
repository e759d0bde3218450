"""The command line of train.py: flags, errors in one line, exit codes."""

import ast
import itertools
import pathlib
import re
import sys
import traceback

from absl import app, flags, logging
from ml_collections import config_flags

from cvt_flax.errors import Diverged, Interrupted, UserError, nearest
from cvt_flax.training.config import keys, unknown_key
from cvt_flax.training.hardware import keep_freed_memory

_CONFIG = config_flags.DEFINE_config_file('config', help_string='the experiment, configs/NAME.py')
_WORKDIR = flags.DEFINE_string(
  'workdir', '', 'the run folder; by default runs/NAME-seedN, and runs/NAME where seeds is above 1'
)
_MODE = flags.DEFINE_enum('mode', 'train', ['train', 'eval'], 'what to do')
_LIST = flags.DEFINE_bool('list-configs', False, 'list the experiments that come along')
_CONFIG_IS_NEEDED = '--config=configs/NAME.py is needed; --list-configs lists them, --help explains'


def main() -> None:
  """Runs train.py's command line and exits.

  Exit codes: 0 done; 2 the input is wrong; 3 diverged; 75 stopped by SIGTERM, run me again;
  130 Ctrl-C, the state is saved; 1 anything else, with a traceback.
  """
  keep_freed_memory()
  try:
    app.run(_main, flags_parser=_parse)
  except UserError as e:
    _exit(e, 2)
  except Diverged as e:
    _exit(e, 3)
  except Interrupted as e:
    _exit(e, e.exit_code)
  except KeyboardInterrupt:  # before the first step, or a second time
    _exit('Ctrl-C', 130)


def _exit(error, code):
  print(f'train.py: {error}', file=sys.stderr)
  sys.exit(code)


def _main(argv):
  if argv[1:]:
    raise UserError(f'{argv[1]!r}: all arguments are flags, such as --config=configs/digits.py')
  if _LIST.value:
    print('\n'.join(_described_configs()))
    return
  path = _config_path(sys.argv)
  if _CONFIG.value is None:
    raise UserError(f'{path}: get_config() returns nothing' if path else _CONFIG_IS_NEEDED)
  try:
    config = _CONFIG.value.copy_and_resolve_references()
  except OSError as e:  # of the file's own; config_flags keeps it until now
    raise _config_error(path, e.__cause__) from e
  from cvt_flax.training.loop import run  # here, so that a wrong flag is told at once

  run(config, _WORKDIR.value, _MODE.value)


def _parse(argv):
  """Parses flags as absl does, with its errors and those of config_flags made ours."""
  if {'--help', '-help', '-h', '--helpfull', '--helpshort'} & set(argv[1:]):
    print('\n'.join(_help()))
    sys.exit(0)
  path = _config_path(argv)
  known = {name for name, _, _ in keys()}
  groups = {name.partition('.')[0] for name in known if '.' in name}
  for argument in argv[1:]:
    flag = argument.lstrip('-').partition('=')[0]
    name = flag.removeprefix('no').removeprefix('config.')
    if flag.startswith(('config.', 'noconfig.')):
      if name not in known | groups:
        raise unknown_key(name)
      if not path:
        raise UserError(_CONFIG_IS_NEEDED)
  if path and not path.is_file():
    shipped = [str(p) for p in _configs()]
    raise UserError(f'--config={path}: there is no such file{nearest(str(path), shipped)}')
  # Orbax tells of every file, and warns of checkpoints between evaluations, which have no metric.
  logging.set_verbosity(logging.ERROR)
  try:
    return flags.FLAGS(argv)
  except UserError:
    raise
  except flags.Error as e:
    if 'Error whilst parsing config file' not in str(e):
      raise UserError(_one_line(e)) from e
    # config_flags and absl have each wrapped what the file raised, with its whole traceback.
    raise _config_error(path, e.__context__.__context__) from e
  except Exception as e:
    raise _config_error(path, e) from e


def _config_path(argv):
  """Returns the path of --config=PATH[:VARIANT]; None where it is not given."""
  for argument, following in itertools.zip_longest(argv[1:], argv[2:], fillvalue=''):
    flag, equals, value = argument.partition('=')
    if flag in ('--config', '-config'):
      return pathlib.Path((value if equals else following).partition(':')[0])
  return None


def _config_error(path, error):
  """Returns the UserError for what a config file raised."""
  frames = traceback.extract_tb(error.__traceback__)
  lines = [f.lineno for f in frames if pathlib.Path(f.filename).absolute() == path.absolute()]
  where = f'{path}, line {lines[-1]}' if lines else path
  if isinstance(error, TypeError) and 'get_config() takes 0 positional' in str(error):
    return UserError(f'{path} has no variants: --config={path} is all')
  return UserError(f'{where}: {type(error).__name__}: {_one_line(error)}')


def _one_line(error):
  """Returns an error's message on one line, less the list of all keys that ml_collections adds."""
  text = re.sub(r'Other fields present: ".*"(\n|\\n|$)', '', str(error), flags=re.DOTALL)
  return ' '.join(text.split())


def _configs():
  folder = pathlib.Path(sys.argv[0]).parent / 'configs'
  return sorted(p for p in folder.glob('*.py') if p.stem != '__init__')


def _described_configs():
  for path in _configs():
    yield f'{path}  {(ast.get_docstring(ast.parse(path.read_text())) or "").partition(chr(10))[0]}'


def _help():
  yield 'python train.py --config=configs/NAME.py[:VARIANT] [--workdir=DIR] [--mode=train|eval]'
  yield '    [--list-configs] [--config.KEY=VALUE ...]'
  yield ''
  yield 'A run folder that holds an unfinished run of the same config is gone on with.'
  yield ''
  yield 'Keys, with their defaults before the config changes them:'
  for name, field, _ in keys():
    yield f'  --config.{name}={field.default!r}'
    yield f'      {field.metadata["doc"]}'
