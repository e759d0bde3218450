"""The input pipeline of ImageNet against timm's, from JPEGs to batches of uint8, in one run.

    python benchmarks/input.py
    python benchmarks/input.py --images=DIR

Prints tables and writes what was measured to benchmarks/results/. See benchmarks/README.md. Linux
alone.
"""

# ruff: noqa: E402  (the path is set before what is ours is imported)

import ast
import contextlib
import dataclasses
import hashlib
import importlib.resources
import importlib.util
import io
import itertools
import math
import multiprocessing
import os
import pathlib
import signal
import statistics
import sys
import tempfile
import time
import types

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from PIL import Image

from benchmarks import common

# A contestant is a process that imports its own side alone, inside functions: memory is its own.

IMAGES, BATCH = 1000, 64
CHIPS = 8
TASKS = ('train', 'evaluation')
PACKAGES = ('grain', 'numpy', 'pillow', 'timm', 'torch')

# The photographs in the wheels of scikit-image and scikit-learn, and the quality at which cuts of
# them at the sizes of ImageNet have the mean of ImageNet's bytes, 110 kB.
SKIMAGE_FILES = (
  'astronaut.png',
  'chelsea.png',
  'coffee.png',
  'hubble_deep_field.jpg',
  'ihc.png',
  'motorcycle_left.png',
  'motorcycle_right.png',
  'retina.jpg',
  'rocket.jpg',
)
SKLEARN_FILES = ('china.jpg', 'flower.jpg')
SIZES = ((500, 375), (500, 375), (500, 333), (375, 500))
QUALITY = 98


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
      make_images(pathlib.Path(folder), arguments.most)
    paths = find_images(folder, arguments.most)
    described = describe(paths)
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


def make_images(folder, count):
  """Writes `count` JPEGs like ImageNet's in size and bytes: cuts of photographs, some mirrored."""
  from sklearn import datasets

  from cvt_flax.data import augment

  data = importlib.resources.files('skimage') / 'data'
  photographs = [Image.open(io.BytesIO((data / name).read_bytes())) for name in SKIMAGE_FILES]
  photographs += [Image.fromarray(datasets.load_sample_image(name)) for name in SKLEARN_FILES]
  rng = np.random.default_rng(0)
  for number in range(count):
    photograph = photographs[number % len(photographs)]
    width, height = SIZES[rng.integers(len(SIZES))]
    aspect = (width / height, width / height)
    box = augment.random_box(*photograph.size, (0.6, 1.0), aspect, rng)
    image = photograph.crop(box).resize((width, height), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
      image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image.save(folder / f'{number:04}.jpg', quality=QUALITY)


def find_images(folder, most):
  """Returns the paths of at most `most` JPEGs below a folder, spread over all there are."""
  paths = sorted(
    str(path.absolute())
    for path in pathlib.Path(folder).rglob('*')
    if path.suffix.lower() in ('.jpg', '.jpeg')
  )
  if len(paths) < BATCH:
    sys.exit(f'{len(paths)} JPEGs below {folder}, which do not make a batch of {BATCH}')
  places = np.linspace(0, len(paths) - 1, min(len(paths), most)).astype(int)
  return [paths[place] for place in places]


def describe(paths):
  """Returns number and mean size of the images, all of which are read: no disk is measured."""
  data = [pathlib.Path(path).read_bytes() for path in paths]
  width, height = np.mean([Image.open(io.BytesIO(each)).size for each in data], axis=0)
  return {
    'images': len(paths),
    'bytes': statistics.mean(map(len, data)),
    'width': float(width),
    'height': float(height),
  }


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
  """Yields the batches of timm in PyTorch's DataLoader, uint8 [b, h, w, 3], without end.

  The sampler goes on from epoch to epoch, as timm's MultiEpochsDataLoader does; else the workers
  would wait for each other at the end of each.
  """
  import torch

  transform = timm_train_transform if who.task == 'train' else timm_eval_transform
  folder = Folder(paths, transform(who.size))
  loader = torch.utils.data.DataLoader(
    folder,
    batch_size=BATCH,
    sampler=torch.utils.data.RandomSampler(folder, num_samples=10**9)
    if who.task == 'train'
    else itertools.cycle(range(len(folder))),
    num_workers=who.workers,
    collate_fn=timm_collate(),
    drop_last=True,
    multiprocessing_context='fork',  # its own choice, but for this process being a spawned one
  )
  for images, _ in loader:
    yield images.permute(0, 2, 3, 1).numpy()


class Folder:
  """Images and labels for a DataLoader, read as torchvision's ImageFolder and timm's dataset do."""

  def __init__(self, paths, transform):
    self.paths, self.transform = paths, transform

  def __len__(self):
    return len(self.paths)

  def __getitem__(self, index):
    with open(self.paths[index], 'rb') as file:
      image = Image.open(file).convert('RGB')
    return self.transform(image), index


def timm_train_transform(size):
  """Returns what timm's transforms_factory.py puts together for the official training.

  Where its magnitude is at the limit, for one image in 650, it posterizes to 0 bits: to black, as
  Pillow once did, but Pillow 13 refuses. This is mended, so that the peer gets through.
  """
  import torch

  crops, policies = timm_file('data/transforms.py'), timm_file('data/auto_augment.py')
  refusing = policies.NAME_TO_OP['PosterizeIncreasing']
  policies.NAME_TO_OP['PosterizeIncreasing'] = lambda image, bits, **options: (
    refusing(image, bits, **options) if bits else Image.new(image.mode, image.size)
  )
  crop = crops.RandomResizedCropAndInterpolation(size, interpolation='bicubic')
  options = {
    'translate_const': int(size * 0.45),
    'img_mean': (124, 116, 104),
    'interpolation': crops.str_to_pil_interp('bicubic'),
  }
  policy = policies.rand_augment_transform('rand-m9-mstd0.5-inc1', options)
  to_tensor = crops.MaybePILToTensor()

  def transform(image):
    image = crop(image)
    if torch.rand(1) < 0.5:  # torchvision's RandomHorizontalFlip
      image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return to_tensor(policy(image))

  return transform


def timm_eval_transform(size):
  """Returns Resize and CenterCrop, as torchvision does them in Pillow, to timm's tensor."""
  to_tensor = timm_file('data/transforms.py').MaybePILToTensor()
  shorter = int(size / 0.875)

  def transform(image):
    width, height = image.size
    if width <= height:
      width, height = shorter, int(shorter * height / width)
    else:
      width, height = int(shorter * width / height), shorter
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return to_tensor(image.crop((left, top, left + size, top + size)))

  return transform


def timm_collate():
  """Returns timm's fast_collate, cut out of its file: all of that needs torchvision."""
  import torch

  tree = ast.parse(timm_path('data/loader.py').read_text())
  tree.body = [node for node in tree.body if getattr(node, 'name', '') == 'fast_collate']
  names = {'np': np, 'torch': torch, 'default_collate': torch.utils.data.default_collate}
  exec(compile(tree, 'fast_collate', 'exec'), names)
  return names['fast_collate']


def timm_path(path):
  (folder,) = importlib.util.find_spec('timm').submodule_search_locations
  return pathlib.Path(folder, path)


def timm_file(path):
  """Loads one file of timm as a module of its own.

  timm as a whole needs torchvision, which fails to import beside a PyTorch built otherwise; these
  files need a few of its names, which are stand-ins that do on Pillow images what it does.
  """
  import torch

  torchvision = types.ModuleType('torchvision')
  transforms = types.ModuleType('torchvision.transforms')
  functional = types.ModuleType('torchvision.transforms.functional')
  torchvision.transforms, transforms.functional = transforms, functional
  transforms.ToTensor = object  # a base class there
  functional.get_image_size = lambda image: image.size

  def resized_crop(image, top, left, height, width, size, interpolation):
    cropped = image.crop((left, top, left + width, top + height))
    return cropped.resize(size[::-1], interpolation)

  functional.resized_crop = resized_crop
  functional.pil_to_tensor = lambda image: torch.as_tensor(np.array(image)).permute(2, 0, 1)
  for module in (torchvision, transforms, functional):
    sys.modules[module.__name__] = module
  spec = importlib.util.spec_from_file_location(path, timm_path(path))
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


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
