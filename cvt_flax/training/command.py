"""The command line of train.py: flags, errors in one line, exit codes."""

import ast
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from cvt_flax.errors import Diverged, Interrupted, UserError, nearest
from cvt_flax.training.config import keys, unknown_key

_CONFIG = config_flags.DEFINE_config_file('config', help_string='the experiment, configs/NAME.py')
_WORKDIR = flags.DEFINE_string('workdir', '', 'the run folder; by default runs/NAME-seedN')
_MODE = flags.DEFINE_enum('mode', 'train', ['train', 'eval'], 'what to do')
_LIST = flags.DEFINE_bool('list-configs', False, 'list the experiments that come along')


def main() -> None:
  """Runs train.py's command line and exits.

  Exit codes: 0 done; 2 the input is wrong; 3 diverged; 75 stopped by SIGTERM, run me again;
  130 Ctrl-C, the state is saved; 1 anything else, with a traceback.
  """
  try:
    app.run(_main, flags_parser=_parse)
  except UserError as e:
    _exit(e, 2)
  except Diverged as e:
    _exit(e, 3)
  except Interrupted as e:
    _exit(e, e.exit_code)


def _exit(error, code):
  print(f'train.py: {error}', file=sys.stderr)
  sys.exit(code)


def _main(argv):
  if argv[1:]:
    raise UserError(f'{argv[1]!r}: all arguments are flags, such as --config=configs/digits.py')
  if _LIST.value:
    print('\n'.join(_described_configs()))
    return
  if _CONFIG.value is None:
    raise UserError(
      '--config=configs/NAME.py is needed; --list-configs lists them, --help explains'
    )
  try:
    config = _CONFIG.value.copy_and_resolve_references()  # raises what the file itself raised
  except UserError:
    raise
  except Exception as e:
    raise _config_error(e) from e
  # Orbax tells of every file, and warns of checkpoints between evaluations, which have no metric.
  logging.set_verbosity(logging.ERROR)
  from cvt_flax.training.loop import run  # here, so that a wrong flag is told at once

  run(config, _WORKDIR.value, _MODE.value)


def _parse(argv):
  """Parses flags as absl does, with its errors and those of config_flags made ours."""
  if {'--help', '-help', '-h', '--helpfull', '--helpshort'} & set(argv[1:]):
    print('\n'.join(_help()))
    sys.exit(0)
  known = {name for name, _, _ in keys()}
  groups = {name.partition('.')[0] for name in known if '.' in name}
  for argument in argv[1:]:
    flag = argument.lstrip('-').partition('=')[0]
    name = flag.removeprefix('no').removeprefix('config.')
    if flag.startswith(('config.', 'noconfig.')) and name not in known | groups:
      raise unknown_key(name)
  try:
    return flags.FLAGS(argv)
  except (flags.Error, AttributeError) as e:
    raise UserError(' '.join(str(e).split())) from e


def _config_error(error):
  """Returns the UserError for a config file that cannot be read or run."""
  path = pathlib.Path(flags.FLAGS['config'].config_filename.partition(':')[0])
  if not path.exists():
    shipped = [str(p) for p in _configs()]
    return UserError(f'--config={path}: there is no such file{nearest(str(path), shipped)}')
  if isinstance(error, AttributeError):
    return UserError(f'{path}: {" ".join(str(error).split())}')
  return UserError(f'{path}: {type(error).__name__}: {" ".join(str(error).split())}')


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
