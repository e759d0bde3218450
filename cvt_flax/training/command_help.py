"""What train.py --help and --list-configs print."""

import ast
import dataclasses
import functools
import itertools
import operator
import pathlib
import shlex
import sys
import textwrap
import typing
from collections.abc import Iterable, Mapping

import ml_collections

from cvt_flax import terminal
from cvt_flax.errors import UserError
from cvt_flax.training.config import TrainConfig, get_config, keys

_USAGE = """\
usage: python train.py --config=configs/NAME.py[:VARIANT] [--workdir=DIR]
                       [--mode=train|eval|compile] [--config.KEY=VALUE ...]
                       [--distributed=auto|HOST:PORT,I,N]
       python train.py [--config=configs/NAME.py[:VARIANT]] --help
       python train.py --list-configs
"""
_ABOUT = (
  'Trains a CvT, or evaluates it. Where the run folder holds an unfinished run of the same '
  'config, that one is gone on with.'
)
_FLAGS = {
  '--config=FILE[:VARIANT]': 'the experiment; with --help, its own values are listed',
  '--config.KEY=VALUE': 'changes a key of it; all keys stand below',
  '--workdir=DIR': 'the run folder; by default runs/NAME-seedN, and runs/NAME where seeds is '
  'above 1',
  '--mode=train|eval|compile': 'eval: the metrics of the best checkpoint, or of init_from; '
  'compile: memory, collectives and predicted cycles of a step, for --topology',
  '--topology=v5e:16x16': 'TPUs (v4, v5e, v5p, v6e) or cpu:8, that need not be there; by default '
  'those attached',
  '--distributed=auto|HOST:PORT,I,N': 'one of several processes: auto where jax finds the '
  'others (Cloud TPU, TPUs of GKE, Slurm, Open MPI), or number I of N, at the address of number 0',
  '--list-configs': 'the experiments that come along, and their variants',
}
_EXIT_CODES = {
  '0': 'done',
  '2': 'the input is wrong: one line says what is',
  '3': 'the loss is not finite any more; the last good checkpoint is kept',
  '75': 'SIGTERM: the state is saved, run the same command again',
  '130': 'Ctrl-C: the state is saved; a second one stops at once',
  '141': 'whoever read the output has gone',
  '1': 'anything else: with a traceback, or with a line where another try may succeed',
}


def help_text(
  path: pathlib.Path | None = None, config: ml_collections.ConfigDict | None = None
) -> str:
  """Returns what --help prints, for the terminal's width.

  Args:
    path: the file of --config, whose docstring comes along; None where none is given.
    config: what it and the flags make of the keys; None for their defaults.

  Raises:
    UserError: the config lacks a key.
  """
  config = config or get_config()
  width = terminal.columns()
  lines = [_USAGE]
  if path and (doc := _docstring(path)):
    lines += [doc, '']
  lines += [textwrap.fill(_ABOUT, width), '', 'Flags']
  lines += _table(_FLAGS, 27, width)
  lines += ['', 'Exit codes']
  lines += _table(_EXIT_CODES, 7, width)
  lines += ['', f'Keys, as {path} and the flags have them' if path else 'Keys and their defaults']
  groups = typing.get_type_hints(TrainConfig)
  for group, members in itertools.groupby(keys(), lambda key: key[0].rpartition('.')[0]):
    about = ' '.join(groups.get(group, TrainConfig).__doc__.split())
    lines += ['', textwrap.fill(f'{group or "top level"}: {about}', width)]
    entries = {}
    for name, field, _ in members:
      value = _value(config, name)
      entries[f'--config.{name}={_as_argument(value)}'] = _meaning(field, value)
    lines += _table(entries, 40, width)
  return '\n'.join(lines)


def list_text(paths: Iterable[pathlib.Path]) -> str:
  """Returns what --list-configs prints: a config's name, what it is, and its variants.

  In a terminal what does not fit is wrapped; elsewhere each has one line.
  """
  entries = {}
  for path in paths:
    variants = ', '.join(variants_of(path))
    about = _docstring(path).partition('\n')[0]
    entries[str(path)] = f'{about} Variants: {variants}.' if variants else about
  column = max(map(len, entries), default=0) + 2
  width = terminal.columns() if terminal.is_terminal(sys.stdout) else sys.maxsize
  return '\n'.join(_table(entries, column, width, indent=''))


def variants_of(path: pathlib.Path) -> list[str]:
  """Returns what a config takes after the colon: the strings that its `match` statements name."""
  cases = (node for node in ast.walk(_parsed(path)) if isinstance(node, ast.MatchValue))
  return [case.value.value for case in cases if case.value.value]


def _parsed(path):
  return ast.parse(path.read_text(encoding='utf-8'))


def _docstring(path):
  return ast.get_docstring(_parsed(path)) or ''


def _value(config, name):
  try:
    return functools.reduce(operator.getitem, name.split('.'), config)
  except KeyError as e:
    raise UserError(f'config lacks the key {name!r}: start from a config that is there') from e


def _meaning(field: dataclasses.Field, value: object) -> str:
  """Returns a key's doc, with what it may be, when it counts, and what it is by default."""
  doc, allowed, used = (field.metadata[name] for name in ('doc', 'allowed', 'used'))
  notes = []
  if allowed and any(word not in doc for word in allowed):
    notes.append(f'one of {", ".join(allowed)}')
  if used:
    notes.append(f'used when {used[1]}')
  if value != field.default:
    notes.append(f'by default {_as_argument(field.default)}')
  return f'{doc} ({"; ".join(notes)})' if notes else doc


def _as_argument(value):
  """Returns a value as a shell takes it; a text of several lines is cut short."""
  return shlex.quote(textwrap.shorten(value, 60) if '\n' in str(value) else str(value))


def _table(entries: Mapping[str, str], column: int, width: int, indent: str = '  ') -> list[str]:
  """Returns two columns as lines: the second starts at `column`, or in the line below.

  A terminal that is too narrow for both has the second below the first throughout.
  """
  if width < 2 * column:
    column = 8
  lines = []
  for name, text in entries.items():
    wrapped = textwrap.wrap(text, width - column, break_on_hyphens=False) or ['']
    first = f'{indent}{name}'
    if len(first) + 2 <= column:
      lines.append(f'{first:{column}}{wrapped.pop(0)}')
    else:
      lines.append(first)
    lines += [' ' * column + line for line in wrapped]
  return lines
