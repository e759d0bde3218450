"""What a terminal can do that a log cannot: colour, and a line that is written over."""

import os
import shutil
import sys
from typing import TextIO

_WIDEST = 100


def is_terminal(stream: TextIO) -> bool:
  """Whether control characters have an effect there: not in a file, a notebook or TERM=dumb."""
  return stream.isatty() and os.environ.get('TERM') != 'dumb'


def red(text: str, stream: TextIO) -> str:
  """Returns the text in red where the stream shows colours and NO_COLOR (no-color.org) is unset."""
  if is_terminal(stream) and not os.environ.get('NO_COLOR'):
    return f'\x1b[31m{text}\x1b[0m'
  return text


def columns() -> int:
  """Returns how wide text may be: as the terminal, 100 at most."""
  return min(shutil.get_terminal_size().columns, _WIDEST)


def say(stream: TextIO, text: str) -> None:
  """Shows a line that stays, in place of one that is written over where there is one."""
  stream.write(f'\r\x1b[K{text}\n' if is_terminal(stream) else f'{text}\n')
  stream.flush()


def write_over(stream: TextIO, text: str) -> None:
  """Shows a line in place of the terminal's last; cut to its width, as no part of it may wrap."""
  stream.write(f'\r\x1b[K{text[: columns() - 1]}')
  stream.flush()


def count(text: str, last: bool) -> None:
  """Shows on standard error, if that is a terminal, how far something is; the last line stays."""
  if is_terminal(sys.stderr):
    write_over(sys.stderr, text)
    if last:
      print(file=sys.stderr)
