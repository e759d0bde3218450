"""The streaming engine: images are read, decoded and augmented on the host as they come. On Grain.

The batch at a step is a pure function of (seed, step): the order of an epoch is one permutation of
the whole split, host h of n takes the h-th part of every batch, and what happens to an image is
drawn from (seed, epoch, index). So hosts, threads, processes and where a run resumes change
nothing.

A batch is a dict of NumPy arrays: 'image' uint8 [b, h, w, 3], 'label' int32 [b], 'mask' float32 [b]
(0 where there is no image) and 'index' int32 [b] (`dataset.Example.index`, -1 where there is no
image); of a split with several labels an image also 'labels' bool [b, k].
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import math
import multiprocessing
import os
import re
import signal
import threading
import typing
from collections.abc import Iterator
from multiprocessing import resource_tracker

import grain
import numpy as np
from absl import flags

from cvt_flax.data import images, machine
from cvt_flax.errors import UserError
from cvt_flax.rng import Stream

if typing.TYPE_CHECKING:
  from cvt_flax.data import augment, dataset

Batch = dict[str, np.ndarray]

_PIECE = 32  # images
_AHEAD = 4  # pieces that each thread or process may have made and not been asked for
_SHARED = 2**16  # bytes: smaller arrays are sent; a piece of shared memory is an open file
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
# With more cores, processes: by benchmarks/input.py they are faster in training from two cores on.
# In evaluation threads are as fast on few cores, and start at once, which they do each time.
_THREADS_TO_TRAIN, _THREADS_TO_EVALUATE = 1, 4  # cores


@dataclasses.dataclass(frozen=True)
class Reading:
  """Who reads, and with what.

  Attributes:
    host, hosts: which of how many hosts this is; each reads its part of every batch.
    workers: processes that decode; 0: a process a core, or threads of this one where it has a
      single core, or up to four in evaluation, or where the pixels are in memory.
    skip_unreadable: gives a black image with mask 0 for one that cannot be decoded.
  """

  host: int = 0
  hosts: int = 1
  workers: int = 0
  skip_unreadable: bool = False


@dataclasses.dataclass(frozen=True)
class Order:
  """Which image stands where in training.

  Attributes:
    images: how many the split has.
    batch_size: over all hosts.
    seed: the run's.
    repeats: how often an image comes in an epoch, which then has a share of the images as small
      (Hoffer et al. 2020, https://arxiv.org/abs/1901.09335).
    groups: a batch is dealt out to so many groups, as the authors' sampler deals to GPUs, so that
      the repeats of an image are in different ones; of no effect without repeats.
  """

  images: int
  batch_size: int
  seed: int
  repeats: int = 1
  groups: int = 1

  @property
  def steps_per_epoch(self) -> int:
    return self.images // self.batch_size

  def __call__(self, row: int) -> tuple[int, int, int]:
    """Returns (epoch, place in the split, which repeat) of a row, counted over all steps."""
    step, place = divmod(row, self.batch_size)
    epoch, step = divmod(step, self.steps_per_epoch)
    if self.repeats > 1:
      group, place = divmod(place, self.batch_size // self.groups)
      place = place * self.groups + group
    rank, repeat = divmod(step * self.batch_size + place, self.repeats)
    return epoch, self._permutation[epoch * self.images + rank], repeat

  @functools.cached_property
  def _permutation(self) -> grain.MapDataset:
    """Element e * images + i is the i-th image of epoch e; nothing of it is held in memory."""
    seed = np.random.SeedSequence((self.seed, Stream.ORDER)).generate_state(1)
    return grain.MapDataset.range(self.images).shuffle(seed=int(seed[0]))


def train_batches(
  split: dataset.Split,
  transform: augment.Transform,
  order: Order,
  reading: Reading,
  *,
  start: int,
  stop: int,
) -> Iterator[Batch]:
  """Yields this host's part of the training batches of the steps from `start` to before `stop`.

  Args:
    split: the images, encoded or as arrays.
    transform: what is done to each.
    order: which image stands where.
    reading: who reads; `reading.hosts` divides the batch.
    start, stop: steps, over all epochs.

  Yields:
    Batches of order.batch_size / reading.hosts images; to close the generator ends its threads and
    processes.

  Raises:
    UserError: an image cannot be decoded and `reading.skip_unreadable` is off.
  """
  rows = _TrainRows(split, transform, order, reading, stop)
  workers = reading.workers or _workers(split, _THREADS_TO_TRAIN)
  return _batches(rows, rows.local, start, workers)


def eval_batches(
  split: dataset.Split,
  size: int,
  crop_ratio: float,
  batch_size: int,
  reading: Reading,
  num_classes: int = 0,
) -> Iterator[Batch]:
  """Yields this host's part of the batches of an evaluation: every image once, in order.

  There are ceil(n / batch_size) batches. The last is filled up with black images of label 0, mask 0
  and index -1.

  Args:
    split: the images, encoded or as arrays.
    size, crop_ratio: as in `images.prepare`.
    batch_size: over all hosts.
    reading: as in `train_batches`.
    num_classes: k of 'labels'; of no effect for a split with one label an image.
  """
  rows = _EvalRows(split, size, crop_ratio, batch_size, reading, num_classes)
  workers = reading.workers or _workers(split, _THREADS_TO_EVALUATE)
  return _batches(rows, rows.local, 0, workers)


class _Rows:
  """What this host reads, image by image: a random-access source for Grain."""

  def __init__(self, split, batch_size, reading, steps):
    self.split, self.reading = split, reading
    self.batch_size, self.local = batch_size, batch_size // reading.hosts
    self.steps = steps

  def __len__(self) -> int:
    return self.steps * self.local

  def _global_row(self, row: int) -> int:
    step, place = divmod(row, self.local)
    return step * self.batch_size + self.reading.host * self.local + place

  def _record(self, example: dataset.Example, size: int, pixels) -> Batch:
    """Returns one row of a batch; `pixels` turns the example into uint8 [size, size, 3]."""
    try:
      image, mask = pixels(example), 1
    except UserError as error:
      if not self.reading.skip_unreadable:
        raise UserError(f'{error}; {images.SKIP}') from error
      image, mask = np.zeros((size, size, 3), np.uint8), 0
    return _row(image, example.label, mask, example.index)


def _row(image, label, mask, index) -> Batch:
  return {
    'image': image,
    'label': np.int32(label),
    'mask': np.float32(mask),
    'index': np.int32(index),
  }


class _TrainRows(_Rows):
  def __init__(self, split, transform, order, reading, stop):
    super().__init__(split, order.batch_size, reading, stop)
    self.transform, self.order = transform, order

  def __getitem__(self, row: int) -> Batch:
    epoch, place, repeat = self.order(self._global_row(row))

    def pixels(example):
      key = (self.order.seed, Stream.AUGMENT, epoch, example.index, repeat)
      image = images.decode(example.image, example.name)
      try:
        return self.transform(image, np.random.default_rng(key))
      except ValueError as error:
        raise UserError(f'{example.name}: {error}') from error

    return self._record(self.split[place], self.transform.size, pixels)


class _EvalRows(_Rows):
  def __init__(self, split, size, crop_ratio, batch_size, reading, num_classes):
    super().__init__(split, batch_size, reading, math.ceil(len(split) / batch_size))
    self.size, self.crop_ratio, self.num_classes = size, crop_ratio, num_classes

  def __getitem__(self, row: int) -> Batch:
    place, labels = self._global_row(row), ()
    if place < len(self.split):
      example = self.split[place]
      record, labels = self._record(example, self.size, self._pixels), example.labels
    else:
      record = _row(np.zeros((self.size, self.size, 3), np.uint8), 0, 0, -1)
    if self.split.multi_label:
      record['labels'] = np.isin(np.arange(self.num_classes), labels)
    return record

  def _pixels(self, example):
    return images.prepare(example.image, example.name, self.size, self.crop_ratio)


def _batches(rows: _Rows, local: int, start: int, workers: int) -> Iterator[Batch]:
  """Yields batches of `local` rows, from batch `start` on; without workers by threads."""
  # Images are made in pieces: one by one they would cost Grain more, and whole batches would each
  # wait for one worker.
  pieces = grain.MapDataset.source(rows)[start * local :].batch(_PIECE)
  if workers := min(workers, len(pieces)):
    yield from _regrouped(_from_processes(pieces, workers), local)
  else:
    threads = 2 * machine.cores()  # as they wait for the disk, too
    ahead = max(math.ceil(local / _PIECE), _AHEAD * threads)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    yield from _regrouped(_closing(pieces.to_iter_dataset(options)), local)


def _regrouped(pieces: Iterator[Batch], local: int) -> Iterator[Batch]:
  """Yields the rows of pieces in batches of `local`, copied out of the memory of who made them."""
  parts, have = [], 0
  with contextlib.closing(pieces):
    for piece in pieces:
      parts.append(piece)
      have += len(piece['index'])
      while have >= local:
        rows = {name: np.concatenate([part[name] for part in parts]) for name in piece}
        yield {name: value[:local] for name, value in rows.items()}
        have -= local
        parts = [{name: value[local:] for name, value in rows.items()}] if have else []


def _closing(pieces: grain.IterDataset) -> Iterator[Batch]:
  """Yields what a Grain data set has, and ends its threads or processes when it is closed."""
  iterator = iter(pieces)
  try:
    yield from iterator
  finally:
    iterator.close()


def _from_processes(pieces: grain.MapDataset, workers: int) -> Iterator[Batch]:
  """Yields pieces that processes make.

  Raises:
    UserError: they cannot be started, or one was ended.
  """
  if not flags.FLAGS.is_parsed():  # in a notebook; Grain asks absl for flags of its own
    flags.FLAGS.mark_as_parsed()
  machine.allow_open_files()  # each piece that is ahead is one
  made = _closing(
    grain.experimental.WithOptionsIterDataset(
      pieces.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)),
      grain.experimental.DatasetOptions(min_shm_size=_SHARED),
    ).mp_prefetch(
      grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_AHEAD),
      worker_init_fn=_start_worker,
    )
  )
  # Ctrl-C and SIGTERM often go to all processes of a run and are for the main one: the workers, and
  # the threads that start them, inherit that they are blocked.
  resource_tracker.ensure_running()  # or its start would unblock them
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
  guard = " before its first ones: a script needs `if __name__ == '__main__':` around what it does"
  try:
    with _told_of_an_end(workers, f'{guard}, or'):
      first = next(made, None)
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
  with contextlib.closing(made), _told_of_an_end(workers, ':'):
    if first is not None:
      yield first
      del first
      yield from made


@contextlib.contextmanager
def _told_of_an_end(workers: int, when: str) -> Iterator[None]:
  """Makes of Grain's error for a process that has ended one that a person can act on."""
  try:
    yield
  except RuntimeError as error:
    ended = re.search(r'terminated unexpectedly with exit code (-?\d+)', str(error))
    if not ended:  # of what the process read
      raise
    raise UserError(
      f'a process that decodes images ended with exit code {ended[1]}{when} the memory, or that '
      f'of /dev/shm, is too little for workers={workers}'
    ) from error


def _workers(split: dataset.Split, cores_for_threads: int) -> int:
  """Returns how many processes decode; 0 with at most so many cores, or if nothing is to decode.

  Some of the work holds Python's lock, so threads keep few cores busy. Processes cost a copy of
  every batch and memory of their own, for pixels that are in memory those of the whole split, and
  start more slowly.
  """
  cores = machine.cores()
  return cores if cores > cores_for_threads and not split.in_memory else 0


def _start_worker(worker: int, workers: int) -> None:
  """Prepares a process that decodes."""
  threading.Thread(target=_end_with_parent, daemon=True).start()
  # glibc would give the memory of every decoded image back to the system, which takes time to get
  # again for the next one. Elsewhere there is no mallopt.
  with contextlib.suppress(OSError, AttributeError):
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 2**25)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**27)


def _end_with_parent() -> None:
  """Ends this process when the main one is killed, which cannot say so."""
  multiprocessing.parent_process().join()
  os._exit(1)
