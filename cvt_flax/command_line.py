"""What the command lines of the package share: errors in one line, exit codes."""

import argparse
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
  try:
    main()
  except UserError as e:
    print(f'{sys.argv[0].rpartition("/")[2]}: {e}', file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print('Ctrl-C', file=sys.stderr)
    sys.exit(130)
