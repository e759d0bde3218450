"""Trains and evaluates a CvT; `python train.py --help` explains."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  (this is the place that tells a person so)
  sys.exit(f'train.py: Python 3.11 or newer is needed, this is {sys.version.split()[0]}')

from cvt_flax import command_line  # noqa: E402  (older Pythons cannot parse it)
from cvt_flax.training.__main__ import main  # noqa: E402

if __name__ == '__main__':
  command_line.run(main)
