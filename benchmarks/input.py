"""The input pipeline of ImageNet against timm's, from JPEGs to batches of uint8, in one run.

    python benchmarks/input.py
    python benchmarks/input.py --images=DIR

Prints tables and writes what was measured to benchmarks/results/. See benchmarks/README.md. Linux
alone.
"""

# ruff: noqa: E402  (the path is set before what is ours is imported)

import contextlib
import dataclasses
import hashlib
import math
import multiprocessing
import os
import pathlib
import signal
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np

from benchmarks import common, photographs, timm_peer

# A contestant is a process that imports its own side alone, inside functions: memory is its own.

IMAGES, BATCH = 1000, 64
CHIPS = 8
TASKS = ('train', 'evaluation')
PACKAGES = ('grain', 'numpy', 'pillow', 'timm', 'torch')


@dataclasses.dataclass(frozen=True)
class Contestant:
  """Who loads what, with what.

  Attributes:
    side: 'cvt_flax' or 'timm'.
    task: one of `TASKS`.
    cores: how many it may use.
    workers: processes that decode; 0: threads.
    size: height and width of the images of a batch.
  """

  side: str
  task: str
  cores: int
  workers: int
  size: int

  def __str__(self):
    cores = '1 core' if self.cores == 1 else f'{self.cores} cores'
    return f'{self.side}, {"processes" if self.workers else "threads"}, {cores}'


def main():
  arguments = parse()
  common.refuse_busy(arguments, 'Both sides want all cores, and it is chance which gets them')
  start = common.usage()
  with contextlib.ExitStack() as stack:
    folder = arguments.images
    if folder is None:
      folder = stack.enter_context(tempfile.TemporaryDirectory())
      photographs.make(pathlib.Path(folder), arguments.most)
    paths = photographs.find(folder, BATCH, arguments.most)
    described = photographs.describe(paths)
    results = {
      task: alternate(contestants(task, arguments.size), paths, arguments.rounds) for task in TASKS
    }
  print('{images} JPEGs, mean {bytes:.0f} bytes, {width:.0f} x {height:.0f}\n'.format(**described))
  print(rate_table(results), core_table(results['train']), sep='\n\n', end='\n\n')
  print(need_table(results['train'], arguments.chip_rate))
  record = {
    'hardware': common.hardware(),
    'images': described,
    'batch_size': BATCH,
    'batches_by_round': timed_batches(len(paths)),
    'results': {task: figures(result) for task, result in results.items()},
  }
  common.write(arguments, 'input', PACKAGES, start, record)


def parse():
  parser = common.parser(__doc__, clocked=True)
  parser.add_argument('--images', help='a folder of JPEGs; without it some are made')
  parser.add_argument('--size', type=int, default=224, help='height and width in a batch')
  parser.add_argument('--rounds', type=int, default=10, help='at least 5')
  parser.add_argument(
    '--chip-rate', type=int, nargs='+', default=[500, 1000, 2000], help='images/s a chip takes'
  )
  arguments = parser.parse_args()
  if arguments.rounds < 5:
    parser.error(f'--rounds={arguments.rounds}: at least 5 are needed')
  arguments.most = IMAGES
  if arguments.quick:
    arguments.most, arguments.rounds = BATCH, 2
  return arguments


def contestants(task, size):
  """Returns who takes part in a task; training is also measured by the number of cores."""
  most = common.cores()
  counts = {most}
  if task == 'train':
    counts |= {2**n for n in range(most.bit_length())}  # none is above `most`
  ours = [Contestant('cvt_flax', task, n, 0, size) for n in sorted(counts)]
  ours += [Contestant('cvt_flax', task, n, n, size) for n in sorted(counts)]
  return [*ours, Contestant('timm', task, most, most, size)]


def timed_batches(images):
  """Returns how many batches a turn is: an epoch, but every worker makes equally many.

  A DataLoader's worker makes whole batches, so that they come out by as many as there are workers.
  """
  return -(-(images // BATCH) // common.cores()) * common.cores()


def alternate(contestants, paths, rounds):
  """Lets every contestant load in turn; returns {contestant: [(images/s, bytes of memory)]}."""
  with contextlib.ExitStack() as stack:
    runners = {who: stack.enter_context(Runner(who, paths)) for who in contestants}
    for who, runner in runners.items():
      if who.task == 'evaluation' and runner.digest != runners[contestants[0]].digest:
        sys.exit(f'{who} and {contestants[0]} do not make the same pixels of the first batch')
    turns = {who: [] for who in contestants}
    for number in range(rounds):
      for who, runner in runners.items():
        turns[who].append(runner.turn(timed_batches(len(paths))))
      line = '; '.join(f'{who} {taken[-1][0]:.0f}' for who, taken in turns.items())
      print(f'{contestants[0].task}, round {number + 1}, images/s: {line}', file=sys.stderr)
  return turns


class Runner:
  """A contestant at work, in a process group that is stopped while it is not its turn.

  Its loader runs on endlessly. Stopped and going on, it has as much under way when the clock stops
  as when it started: nothing is loaded ahead between turns.

  Attributes:
    digest: of the pixels of its first batch.
  """

  def __init__(self, contestant, paths):
    # Spawned: a fork of this process would have what others had imported.
    context = multiprocessing.get_context('spawn')
    self._connection, theirs = context.Pipe()
    self._process = context.Process(target=serve, args=(theirs, contestant, paths))
    self._process.start()
    theirs.close()
    self.digest = self._connection.recv()
    os.killpg(self._process.pid, signal.SIGSTOP)

  def turn(self, batches):
    """Loads some batches; returns images/s, and the bytes of memory at the end."""
    os.killpg(self._process.pid, signal.SIGCONT)
    self._connection.send(batches)
    rate = batches * BATCH / self._connection.recv()
    taken = memory(self._process.pid)
    os.killpg(self._process.pid, signal.SIGSTOP)
    return rate, taken

  def __enter__(self):
    return self

  def __exit__(self, *error):
    with contextlib.suppress(ProcessLookupError):  # it has ended by an error of its own
      os.killpg(self._process.pid, signal.SIGCONT)
    self._connection.close()
    self._process.join()


def memory(group):
  """Returns the resident bytes of all processes of a group; each counts what they share."""
  total = 0
  for stat in pathlib.Path('/proc').glob('[0-9]*/stat'):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
      # proc(5): after the name in brackets come state, parent and group; pages are the 22nd.
      fields = stat.read_text().rpartition(')')[2].split()
      if int(fields[2]) == group:
        total += int(fields[21]) * os.sysconf('SC_PAGE_SIZE')
  return total


def serve(connection, contestant, paths):
  """Is a contestant: sends the digest of the first batch, then for each n received a time.

  Before each turn two batches a core are not timed, as many as a DataLoader has under way.
  """
  os.setpgrp()
  every_core = sorted(os.sched_getaffinity(0))
  os.sched_setaffinity(0, every_core[: contestant.cores])
  make = {'cvt_flax': our_batches, 'timm': their_batches}[contestant.side]
  with contextlib.closing(make(contestant, paths)) as batches:
    connection.send(hashlib.sha256(np.ascontiguousarray(next(batches))).hexdigest())
    with contextlib.suppress(EOFError):  # the other end has been closed: no more turns
      while True:
        timed = connection.recv()
        for _ in range(2 * len(every_core)):
          next(batches)
        start = time.perf_counter()
        for _ in range(timed):
          next(batches)
        connection.send(time.perf_counter() - start)


def our_batches(who, paths):
  """Yields our batches, uint8 [b, h, w, 3], without end."""
  from cvt_flax.data import augment, dataset, files, stream

  stream._workers = lambda *_: 0  # 0 workers are to be threads on any machine
  packer = files.NamePacker()
  packer.extend(paths)
  labels = np.arange(len(paths), dtype=np.int32)
  split = files.FileSplit('the images', '', packer.finish(), labels)
  reading = stream.Reading(workers=who.workers)
  if who.task == 'train':
    transform = augment.Transform(
      who.size,
      crop_scale=(0.08, 1.0),
      flip=True,
      rand_augment=augment.RandAugment.parse('rand-m9-mstd0.5-inc1'),
    )
    order = stream.Order(len(paths), BATCH, seed=0)
    batches = stream.train_batches(split, transform, order, reading, start=0, stop=10**6)
  else:
    again = np.resize(labels, 2_000_000)  # the images over and over
    split = dataset.Subset(split.name, split, again)
    batches = stream.eval_batches(split, who.size, 0.875, BATCH, reading)
  with contextlib.closing(batches):
    for batch in batches:
      yield batch['image']


def their_batches(who, paths):
  """Yields the batches of timm in PyTorch's DataLoader, uint8 [b, h, w, 3], without end."""
  return timm_peer.batches(paths, who.task == 'train', who.size, who.workers, BATCH)


def median_rate(turns):
  return statistics.median(rate for rate, _ in turns)


def times(turns, base):
  """Returns how many times as fast as `base` something was: the median over the rounds."""
  return statistics.median(
    ours / theirs for (ours, _), (theirs, _) in zip(turns, base, strict=True)
  )


def one_core(who):
  """Returns the same with one core; None where it is that, or was not measured so."""
  if who.side == 'timm' or who.task != 'train' or who.cores == 1:
    return None
  return dataclasses.replace(who, cores=1, workers=min(who.workers, 1))


def peer_of(who):
  """Returns the peer that `who` is measured against; None for the peer, and with fewer cores."""
  if who.side == 'timm' or who.cores < common.cores():
    return None
  return dataclasses.replace(who, side='timm', workers=who.cores)


def rate_table(results):
  lines = [
    '| | images/s | slowest and fastest round | a core | of timm | MB after first, last round |',
    '|---|---|---|---|---|---|',
  ]
  for task, result in results.items():
    for who, turns in result.items():
      rates = [rate for rate, _ in turns]
      first, *_, last = (taken / 1e6 for _, taken in turns)
      peer = peer_of(who)
      lines.append(
        f'| {task}, {who} | {median_rate(turns):.0f} | {min(rates):.0f} to {max(rates):.0f} '
        f'| {median_rate(turns) / who.cores:.0f} '
        f'| {f"{times(turns, result[peer]):.2f}x" if peer else ""} | {first:.0f}, {last:.0f} |'
      )
  return '\n'.join(lines)


def serial_share(cores, faster):
  """Returns which share of the work is one core's alone, by Amdahl: 1/faster = s + (1-s)/cores."""
  return (cores / faster - 1) / (cores - 1)


def core_table(result):
  """Returns what more cores give to training."""
  lines = ['| | of 1 core | would be serial |', '|---|---|---|']
  for who, turns in result.items():
    if who.side == 'cvt_flax' and who.cores > 1:
      faster = times(turns, result[one_core(who)])
      lines.append(f'| {who} | {faster:.2f}x | {serial_share(who.cores, faster):.0%} |')
  return '\n'.join(lines)


def need_table(result, chip_rates):
  """Returns how many cores of this kind feed `CHIPS` chips, by what a chip takes."""
  head = ' | '.join(f'{rate} a chip' for rate in chip_rates)
  lines = [f'| cores for {CHIPS} chips, images/s: | {head} |', '|---' * (len(chip_rates) + 1) + '|']
  for who, turns in result.items():
    if who.cores == common.cores():
      a_core = median_rate(turns) / who.cores
      needs = ' | '.join(f'{math.ceil(CHIPS * rate / a_core)}' for rate in chip_rates)
      lines.append(f'| {who} | {needs} |')
  return '\n'.join(lines)


def figures(result):
  """Returns what is stored of a task."""
  return {
    str(who): {
      'images_per_second_by_round': [rate for rate, _ in turns],
      'memory_bytes_by_round': [taken for _, taken in turns],
      'median_images_per_second': median_rate(turns),
    }
    | ({'median_ratio_to_timm': times(turns, result[peer_of(who)])} if peer_of(who) else {})
    | ({'median_ratio_to_1_core': times(turns, result[one_core(who)])} if one_core(who) else {})
    for who, turns in result.items()
  }


if __name__ == '__main__':
  main()
