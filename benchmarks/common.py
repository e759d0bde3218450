"""What the benchmarks share: a quiet machine and what it is, taking turns, and where results go."""

import argparse
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Cores' worth of work by other programs that still counts as a quiet machine.
QUIET = 0.1


def parser(description, clocked=False):
  """Returns a parser with what all programs here understand, or all that go by the clock."""
  parser = argparse.ArgumentParser(
    description=description, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    '--quick',
    action='store_true',
    help='try the tool: all in small, on a busy machine too; nothing is written',
  )
  if clocked:
    parser.add_argument('--busy', action='store_true', help='run though the machine is busy')
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


def refuse_busy(arguments, why):
  """Ends this program where others are at work, without --busy or --quick.

  Args:
    arguments: of a `parser` that is clocked.
    why: what that would do to the figures.
  """
  if arguments.busy or arguments.quick:
    return
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


def hardware(device=None):
  """Returns what is written of the machine, and of a device of JAX's where that computes."""
  kind = {} if device is None else {'device': device.device_kind}
  return {**kind, 'processor': processor(), 'cores': cores()}


def alternate(what, contestants, rounds, steps, warm=True):
  """Runs every contestant in turn, `rounds` times; returns {name: [seconds a call, a round]}.

  With `warm` there is a call before those that are timed, in every round.
  """
  seconds = {name: [] for name in contestants}
  for number in range(rounds):
    for name, run in contestants.items():
      if warm:
        run()  # not timed: the other one's threads come to rest, the caches are ours
      start = time.perf_counter()
      for _ in range(steps):
        run()
      seconds[name].append((time.perf_counter() - start) / steps)
    line = ', '.join(f'{name} {1e3 * times[-1]:.0f} ms' for name, times in seconds.items())
    print(f'{what}, round {number + 1}: {line}', file=sys.stderr)
  return seconds


def ratios(seconds, ours, theirs):
  """Returns, for every round, how many times as fast `ours` was as `theirs`."""
  return [b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True)]


def table(results, ours):
  """Returns {what: what `alternate` returned} as a table, with how `ours` compares."""
  lines = [f'| | median ms | slowest and fastest round | {ours} is |', '|---|---|---|---|']
  for what, seconds in results.items():
    for name, times in seconds.items():
      median, low, high = (1e3 * f(times) for f in (statistics.median, min, max))
      faster = f'{statistics.median(ratios(seconds, ours, name)):.2f}x' if name != ours else ''
      lines.append(f'| {what}, {name} | {median:.0f} | {low:.0f} to {high:.0f} | {faster} |')
  return '\n'.join(lines)


def write(arguments, name, packages, start, record):
  """Writes `record` to results/, with the date, versions and arguments.

  Nothing is written with --quick, and where the machine was busy.

  Args:
    arguments: of the program.
    name: what the file's name ends with.
    packages: whose versions matter.
    start: `usage()` of when the measurement began; None where others change nothing.
    record: what was measured.
  """
  if arguments.quick:
    return
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
    'arguments': vars(arguments),
    **record,
  }
  path = ROOT / 'benchmarks' / 'results' / f'{now:%Y-%m-%d-%H%M}-{name}.json'
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps(record, indent=2) + '\n')
  print(f'written to {path.relative_to(ROOT)}', file=sys.stderr)
