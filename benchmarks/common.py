"""What the benchmarks share: whether the machine is quiet, what it is, and where results go."""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Cores' worth of work by other programs that still counts as a quiet machine.
QUIET = 0.1


def parser(description):
  """Returns a parser with what all programs here understand."""
  parser = argparse.ArgumentParser(
    description=description, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--quick',
    action='store_true',
    help='try the tool: all in small, on a busy machine too; nothing is written',
  )
  return parser


def cores():
  """Returns how many cores this process may use: what XLA takes, and PyTorch is given."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def usage():
  """Returns (seconds of the clock, of all processors' work, of ours); None where it is unknown.

  Work includes what the host of a virtual machine took away; ours includes that of child processes
  once they have ended.
  """
  stat = pathlib.Path('/proc/stat')
  if not stat.exists():
    return None
  user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
  ticks = user + nice + system + irq + softirq + steal
  return time.perf_counter(), ticks / os.sysconf('SC_CLK_TCK'), sum(os.times()[:4])


def taken_by_others(start):
  """Returns how many cores other programs kept busy since `start`, on average."""
  if start is None:
    return None
  clock, work, ours = (now - then for now, then in zip(usage(), start, strict=True))
  return max(0.0, (work - ours) / clock)


def refuse_busy(why):
  """Ends this program where others are at work; `why` says what that would do to the figures."""
  start = usage()
  time.sleep(2)
  busy = taken_by_others(start)
  if busy is not None and busy > QUIET:
    sys.exit(
      f'other programs take {busy:.1f} cores. {why}. Wait, or try the tool with --busy, which '
      'writes no result'
    )


def processor():
  """Returns the name of the processor."""
  if pathlib.Path('/proc/cpuinfo').exists():
    for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines():
      if line.startswith('model name'):
        return line.partition(':')[2].strip()
  return platform.processor()


def write(name, packages, start, record):
  """Writes `record` to results/, with the date and versions, unless the machine was busy.

  Args:
    name: what the file's name ends with.
    packages: whose versions matter.
    start: `usage()` of when the measurement began.
    record: what was measured.
  """
  busy = taken_by_others(start)
  if busy is not None and busy > QUIET:
    print(f'NOT A RESULT: other programs took {busy:.1f} cores meanwhile; nothing is written')
    return
  now = datetime.datetime.now().astimezone()
  versions = {package: importlib.metadata.version(package) for package in packages}
  record = {
    'date': now.isoformat(timespec='seconds'),
    'cores_taken_by_others': busy,
    'versions': {'python': platform.python_version(), **versions},
    **record,
  }
  path = ROOT / 'benchmarks' / 'results' / f'{now:%Y-%m-%d-%H%M}-{name}.json'
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps(record, indent=2) + '\n')
  print(f'written to {path.relative_to(ROOT)}', file=sys.stderr)
