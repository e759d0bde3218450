"""The command line of train.py: flags, errors as one line, exit codes."""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from cvt_flax.errors import Diverged, Interrupted, UserError
from cvt_flax.training.config import keys, unknown_key

CONFIG = config_flags.DEFINE_config_file('config', help_string='An experiment: configs/NAME.py')
WORKDIR = flags.DEFINE_string('workdir', '', 'The run folder; by default runs/NAME-seedN')
MODE = flags.DEFINE_enum('mode', 'train', ['train', 'eval'], 'What to do')


def main() -> None:
  """Runs train.py's command line and exits.

  Exit codes: 0 done; 2 the input is wrong; 3 diverged; 75 stopped by SIGTERM, run me again; 130
  Ctrl-C, saved; 1 anything else.
  """
  try:
    app.run(_main, flags_parser=_parse)
  except UserError as e:
    _exit(str(e), 2)
  except Diverged as e:
    _exit(str(e), 3)
  except Interrupted as e:
    _exit(str(e), e.exit_code)


def _main(argv):
  del argv
  from cvt_flax.training.loop import run  # after the flags, so that a wrong one is told at once

  logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it writes
  run(CONFIG.value, WORKDIR.value, MODE.value)


def _exit(message, code):
  print(f'train.py: {message}', file=sys.stderr)
  sys.exit(code)


def _parse(argv):
  """Parses flags as absl does, with its and config_flags' errors made ours."""
  if any(a in ('--help', '-help', '-h', '--helpfull') for a in argv[1:]):
    print(_help())
    sys.exit(0)
  for argument in argv[1:]:
    name = argument.lstrip('-').partition('=')[0]
    if name.startswith('config.'):
      _check_key(name.removeprefix('config.'))
  try:
    rest = flags.FLAGS(argv)
  except (flags.Error, AttributeError, OSError, ImportError, SyntaxError) as e:
    raise UserError(' '.join(str(e).split())) from e
  return rest


def _check_key(name):
  known = [k for k, _, _ in keys()]
  if name not in known and f'{name}.' not in {k[: len(name) + 1] for k in known}:
    raise unknown_key(name)


def _help():
  return ''
