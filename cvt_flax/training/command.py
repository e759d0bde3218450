"""The command line of train.py: its flags, and their errors in one line."""

import dataclasses
import itertools
import json
import pathlib
import re
import sys
import traceback

from absl import app, flags
from ml_collections import config_flags

from cvt_flax.errors import UserError, nearest
from cvt_flax.training import command_help
from cvt_flax.training.config import keys, unknown_key
from cvt_flax.training.hardware import keep_freed_memory
from cvt_flax.training.shipped import shipped_configs

_CONFIG = config_flags.DEFINE_config_file('config', help_string='the experiment, configs/NAME.py')
_WORKDIR = flags.DEFINE_string(
  'workdir', '', 'the run folder; by default runs/NAME-seedN, and runs/NAME where seeds is above 1'
)
_MODE = flags.DEFINE_enum('mode', 'train', ['train', 'eval', 'compile'], 'what to do')
_TOPOLOGY = flags.DEFINE_string('topology', '', 'with --mode=compile, for which devices')
_DISTRIBUTED = flags.DEFINE_string(
  'distributed', '', 'this is one of several processes: auto, or HOST:PORT,I,N'
)
_LIST = flags.DEFINE_bool('list-configs', False, 'list the experiments that come along')
_HELP = {'--help', '-help', '-h', '--helpfull', '--helpshort'}  # absl's
_CONFIG_IS_NEEDED = '--config=configs/NAME.py is needed; --list-configs lists them, --help explains'


def main() -> None:
  """Runs train.py's command line; `cvt_flax.command_line.run` has its exit codes."""
  keep_freed_memory()
  app.run(_main, flags_parser=_parse)


def _main(argv):
  if argv[1:]:
    raise UserError(f'{argv[1]!r}: all arguments are flags, such as --config=configs/digits.py')
  if _LIST.value:
    print(command_help.list_text(shipped_configs()))
    return
  config = _config(_config_path(sys.argv))
  from cvt_flax.training import processes  # here, so that a wrong flag is told at once
  from cvt_flax.training.loop import run

  if _DISTRIBUTED.value:
    processes.join(_DISTRIBUTED.value)

  if _TOPOLOGY.value and _MODE.value != 'compile':
    raise UserError(f'--topology={_TOPOLOGY.value} is for --mode=compile')
  if _MODE.value == 'compile':
    from cvt_flax.training.plan import plan

    print(f'compiling the step for {_TOPOLOGY.value or "the devices attached"}')
    found = plan(config, _TOPOLOGY.value)
    print(found)
    print(json.dumps(dataclasses.asdict(found)))
    return
  run(config, _WORKDIR.value, _MODE.value)


def _parse(argv):
  """Parses flags as absl does, with its errors and those of config_flags made ours."""
  help_is_wanted = bool(_HELP & set(argv[1:]))
  argv = [argument for argument in argv if argument not in _HELP]
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
    shipped = {p.stem: str(p) for p in shipped_configs()}
    close = nearest(path.stem, shipped, shown=shipped)
    raise UserError(
      f'--config={path}: there is no such file{close or ", --list-configs lists what comes along"}'
    )
  try:
    rest = flags.FLAGS(argv)
  except UserError:
    raise
  except flags.Error as e:
    if 'Error whilst parsing config file' not in str(e):
      text = re.sub(r"invalid literal for int.* base 10: ('.*')", r'\1 is no integer', _one_line(e))
      text = re.sub(r"could not convert string to float: ('.*')", r'\1 is no number', text)
      raise UserError(text) from e
    # config_flags and absl have each wrapped what the file raised, with its whole traceback.
    raise _config_error(path, e.__context__.__context__) from e
  except Exception as e:
    raise _config_error(path, e) from e
  if help_is_wanted:
    print(command_help.help_text(path, _config(path) if path else None))
    sys.exit(0)
  return rest


def _config(path):
  """Returns what --config and the flags for its keys make together."""
  if _CONFIG.value is None:
    raise UserError(f'{path}: get_config() returns nothing' if path else _CONFIG_IS_NEEDED)
  try:
    return _CONFIG.value.copy_and_resolve_references()
  except OSError as e:  # of the file's own; config_flags keeps it until now
    raise _config_error(path, e.__cause__) from e


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
