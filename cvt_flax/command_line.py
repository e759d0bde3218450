"""What the command lines of the package share: errors in one line, exit codes."""

import argparse
import os
import sys
from collections.abc import Callable

from absl import logging

from cvt_flax.errors import UserError


class Parser(argparse.ArgumentParser):
  """An ArgumentParser whose errors are one line, and exit code 2."""

  def __init__(self, **kwargs):
    super().__init__(allow_abbrev=False, **kwargs)

  def error(self, message):
    raise UserError(f'{message}; --help explains')


def run(main: Callable[[], None]) -> None:
  """Runs a command line and exits: 0 done, 2 the input is wrong, 130 Ctrl-C, 1 anything else."""
  logging.set_verbosity(logging.ERROR)  # Orbax tells of every folder that it only reads
  # A terminal that lacks a letter of a file's name is no reason to stop.
  sys.stdout.reconfigure(errors='backslashreplace')
  try:
    main()
    sys.stdout.flush()
  except UserError as e:
    _exit(e, 2)
  except BrokenPipeError:  # whoever read the output has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)
  except OSError as e:
    _exit(f'{e.filename or "output"}: {e.strerror}', 2)
  except KeyboardInterrupt:
    _exit('Ctrl-C', 130)


def _exit(error, code):
  print(f'{os.path.basename(sys.argv[0])}: {error}', file=sys.stderr)
  sys.exit(code)
