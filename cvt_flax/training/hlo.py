"""What the text of a compiled program says: its collectives, its cycles, its largest tensors."""

import math
import re
from collections import Counter

_COLLECTIVES = 'all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute'
_BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2, 's64': 8, 'u64': 8}


def cycles(text: str) -> int | None:
  """Returns the cycles that XLA's cost model predicts; None where it says nothing, as on CPUs."""
  return sum(count for count, _ in instructions(text)) or None


def instructions(text: str) -> list[tuple[int, str]]:
  """Returns [(predicted cycles, name of the operation, '' where it has none)]; [] as above."""
  found = []
  for line in _entry(text).splitlines():
    if count := re.search(r'"estimated_cycles":"(\d+)"', line):
      name = re.search(r'op_name="([^"]*)"', line)
      found.append((int(count[1]), name[1] if name else ''))
  return found


def collectives(text: str) -> dict[str, list[int]]:
  """Returns {kind: [how many, bytes of their results]}."""
  counts, sizes = Counter(), Counter()
  kinds = '|'.join(_COLLECTIVES)
  # One that is started and awaited counts where it is awaited: there its result is alone.
  for shape, kind in re.findall(rf' = (.*?) ({kinds})(?:-done)?\(', text):
    counts[kind] += 1
    sizes[kind] += _size(shape)
  return {kind: [counts[kind], sizes[kind]] for kind in _COLLECTIVES if counts[kind]}


def largest(text: str, count: int = 8) -> list[str]:
  """Returns the largest results of a program's own instructions: 'SHAPE N MiB of OPERATION'."""
  found = {}
  lines = re.findall(r' = (\w+\[[\d,]*\])\S* [\w-]+\(.*?op_name="([^"]*)"', _entry(text))
  for shape, name in lines:
    found.setdefault((_size(shape), shape), name.replace(r'\'', "'"))
  rows = sorted(found.items(), reverse=True)[:count]
  return [f'{shape} {size / 2**20:,.1f} MiB of {name}' for (size, shape), name in rows]


def _entry(text):
  """Returns the instructions that are not inside of others."""
  return text[text.index('\nENTRY ') :] if '\nENTRY ' in text else text


def _size(shape):
  """Returns the bytes of a shape, or of a tuple of them."""
  return sum(
    _BYTES.get(kind, 4) * math.prod(int(n) for n in sizes.split(',') if n)
    for kind, sizes in re.findall(r'(\w+)\[([\d,]*)\]', shape)
  )
