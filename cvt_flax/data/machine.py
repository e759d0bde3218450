"""What of the machine this process may use: cores and memory, as its container limits them; files.

Containers do so by control groups; their version 2 is read.
"""

import math
import os
import pathlib

_CGROUPS = pathlib.Path('/sys/fs/cgroup')
_OWN_CGROUP = pathlib.Path('/proc/self/cgroup')
# What the kernel drops when memory is short; MemAvailable of the whole machine counts it, too.
_RECLAIMABLE = ('inactive_file', 'active_file', 'slab_reclaimable')
_OPEN_FILES = 8_192


def cores() -> int:
  """Returns how many cores this process may use, at least 1."""
  affine = getattr(os, 'sched_getaffinity', None)
  found = len(affine(0)) if affine else os.cpu_count() or 1
  for folder in _cgroups():
    quota, _, period = _read(folder / 'cpu.max').partition(' ')  # 'max 100000' without a limit
    if quota.isdigit():
      found = min(found, math.ceil(int(quota) / int(period)))
  return found


def available_memory() -> float:
  """Returns the bytes of memory that can be had without swapping; where unknown, infinity."""
  return min([_of_machine(), *map(_left_in, _cgroups())])


def allow_open_files() -> None:
  """Raises the number of files that this process, and those it starts, may have open.

  ArrayRecord keeps every file open that it has read from, and TFDS's ImageNet has 1,024 for train;
  what processes hand each other is a file, too. Many systems allow 1,024 to a program that does not
  ask for more.
  """
  try:
    import resource
  except ImportError:  # Windows
    return
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
  if soft != resource.RLIM_INFINITY and soft < wanted:
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _of_machine():
  try:
    with open('/proc/meminfo') as file:
      sizes = dict(line.split(':') for line in file)
    return int(sizes['MemAvailable'].split()[0]) * 1024
  except (OSError, KeyError):  # not Linux
    try:
      return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    except (AttributeError, ValueError):  # Windows has no sysconf
      return math.inf


def _left_in(folder):
  """Returns what a control group may still take."""
  limit, used = _read(folder / 'memory.max'), _read(folder / 'memory.current')
  if not (limit.isdigit() and used.isdigit()):
    return math.inf
  kept = dict(line.split() for line in _read(folder / 'memory.stat').splitlines())
  return int(limit) - int(used) + sum(int(kept.get(name, 0)) for name in _RECLAIMABLE)


def _cgroups():
  """Returns the control group of this process and those above it, whose limits hold as well."""
  lines = _read(_OWN_CGROUP).splitlines()
  own = next((line[3:] for line in lines if line.startswith('0::')), None)
  if own is None:
    return []
  folder = _CGROUPS / own.strip('/')
  return [f for f in (folder, *folder.parents) if f.is_relative_to(_CGROUPS)]


def _read(path):
  try:
    return path.read_text().strip()
  except OSError:
    return ''
