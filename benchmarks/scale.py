"""What training takes on slices of TPU v5e, which need not be there.

    pip install -r requirements-tpu.txt
    python benchmarks/scale.py
    python benchmarks/scale.py --file=benchmarks/results/DATE-scale.json

Compiles the training step of every row below, each by `train.py --mode=compile` in a process of its
own, and prints the tables of results/scale.md. The file has what each said; with one that is there
only the rows that it lacks are compiled. See benchmarks/README.md.
"""

# ruff: noqa: E402  (the project is found before it is imported)

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import common
from cvt_flax import storage
from cvt_flax.training.hardware import matrix_rate
from cvt_flax.training.shipped import get_config


@dataclasses.dataclass(frozen=True)
class Row:
  """A step: of a config, for a topology, with so many images of all chips, and of a batch norm."""

  config: str
  topology: str
  batch_size: int
  bn_group_size: int

  def __str__(self):
    return f'{self.config}, {self.topology}, {self.batch_size}, groups of {self.bn_group_size}'


# The limits that a pod is to hold: the authors' groups, and groups within a chip.
LIMITS = (
  Row('cvt13_imagenet', 'v5e:1x1', 64, 64),
  Row('cvt13_imagenet', 'v5e:16x16', 4096, 256),
  Row('cvt13_imagenet', 'v5e:16x16', 4096, 16),
  Row('cvtw24_imagenet_384', 'v5e:16x16', 2048, 128),
  Row('cvtw24_imagenet_384', 'v5e:16x16', 2048, 8),
  Row('cvt13_imagenet', '4xv5e:16x16', 16384, 16),
)
# The official configs with their own batch, on chips enough to end within a day.
OFFICIAL = (
  Row('cvt13_imagenet', 'v5e:8x8', 2048, 32),
  Row('cvt21_imagenet', 'v5e:8x8', 2048, 32),
  Row('cvt13_imagenet_384', 'v5e:8x16', 2048, 16),
  Row('cvt21_imagenet_384', 'v5e:8x16', 2048, 16),
  Row('cvtw24_imagenet_384', 'v5e:16x16', 2048, 8),
  Row('cvt13_imagenet22k', 'v5e:8x8', 2048, 32),
  Row('cvt21_imagenet22k', 'v5e:8x8', 2048, 32),
  Row('cvtw24_imagenet22k', 'v5e:16x16', 2048, 8),
)
# The same work for each of more and more chips.
GROWTH = (
  Row('cvt13_imagenet', 'v5e:1x1', 16, 16),
  Row('cvt13_imagenet', 'v5e:4x4', 256, 16),
  Row('cvt13_imagenet', 'v5e:8x8', 1024, 16),
  Row('cvt13_imagenet', 'v5e:16x16', 4096, 16),
  Row('cvt13_imagenet', '4xv5e:16x16', 16384, 16),
)
QUICK = (Row('digits', 'cpu:1', 32, 32), Row('digits', 'cpu:4', 32, 8))

# Training images, and the classes of ImageNet-22k: 21,841 synsets of its release in 2011.
IMAGES = {'imagenet': 1_281_167, 'imagenet22k': 14_197_122}
CLASSES_22K = 21_841
# Of a v5e, by https://cloud.google.com/tpu/docs/v5e: a 4-chip host's vCPUs, as slices of several
# hosts have them, and the bytes a second of one link one way, 1,600 Gbit/s of a chip over four.
CHIPS_A_HOST, VCPUS_A_HOST, LINK = 4, 112, 50e9
KIND = 'TPU v5 lite'
# Images that a core decodes and augments in a second, by size: input.py's processes on 2 cores, and
# what it augments by.
DECODED, DECODED_BY = {224: 280, 384: 155}, 'rand-m9-mstd0.5-inc1'
PACKAGES = ('jax', 'jaxlib', 'libtpu')


def main():
  arguments = parse()
  tables = {limits: QUICK, growth: QUICK} if arguments.quick else TABLES
  plans = {} if arguments.quick else read(arguments.file)
  for row in dict.fromkeys(row for rows in tables.values() for row in rows):
    if row not in plans:
      print(f'compiling {row}', file=sys.stderr)
      plans[row] = compile_step(row)
      if not arguments.quick:
        write(arguments.file, plans)
  print('\n\n'.join(table(plans, rows) for table, rows in tables.items()))


def parse():
  parser = common.parser(__doc__)
  now = datetime.datetime.now().astimezone()
  parser.add_argument(
    '--file',
    type=pathlib.Path,
    default=ROOT / 'benchmarks' / 'results' / f'{now:%Y-%m-%d-%H%M}-scale.json',
    help='where the results are, or go',
  )
  arguments = parser.parse_args()
  if not arguments.file.parent.is_dir():
    parser.error(f'--file={arguments.file}: there is no folder {arguments.file.parent}')
  return arguments


def compile_step(row):
  """Returns what --mode=compile says of a row, as its last line has it."""
  with tempfile.TemporaryDirectory() as folder:
    command = [
      sys.executable,
      ROOT / 'train.py',
      f'--config={ROOT}/configs/{row.config}.py',
      '--mode=compile',
      f'--topology={row.topology}',
      f'--config.batch_size={row.batch_size}',
      f'--config.model.bn_group_size={row.bn_group_size}',
    ]
    if row.config.endswith('22k'):
      # To compile it takes the number of classes alone: none of these images is read.
      table = pathlib.Path(folder) / 'labels.csv'
      names = (f'{c}_{i}.jpg,{c}\n' for c in range(CLASSES_22K) for i in range(4))
      table.write_text('path,label\n' + ''.join(names))
      command.append(f'--config.source=csv:{table}')
    # What has been compiled before would be read, and not timed.
    env = {name: v for name, v in os.environ.items() if name != 'JAX_COMPILATION_CACHE_DIR'}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
  if done.returncode:
    sys.exit(f'{row}: exit code {done.returncode}')
  return json.loads(done.stdout.splitlines()[-1])


def read(path):
  """Returns {row: plan} of a file, {} where there is none."""
  if not path.exists():
    return {}
  try:
    return {Row(**plan['row']): plan['said'] for plan in json.loads(path.read_text())['plans']}
  except (ValueError, KeyError, TypeError) as e:
    sys.exit(f'{path} is not what this program writes: {type(e).__name__}: {e}')


def write(path, plans):
  record = {
    'versions': {name: importlib.metadata.version(name) for name in PACKAGES},
    'hardware': common.hardware(),
    'plans': [{'row': dataclasses.asdict(row), 'said': said} for row, said in plans.items()],
  }
  storage.write_whole(path, json.dumps(record, indent=2).encode() + b'\n')


def chips(said):
  return said['mesh']['data'] * said['mesh']['fsdp']


def mebibytes(count):
  return f'{count / 2**20:,.1f} MiB'


def gibibytes(count):
  return f'{count / 2**30:.2f} GiB'


def cycles(said):
  """Returns the cycles of an image; '' where XLA's cost model has none, as for CPUs."""
  return f'{said["cycles"] / said["images_a_device"] / 1e6:.2f}e6' if said['cycles'] else ''


def rate(said):
  """Returns the images a second of a chip; '' as in `cycles`."""
  each = said['predicted_images_a_second']
  return f'{each:,.0f}' if each else ''


def collectives(said):
  found = said['collectives'].items()
  return '; '.join(f'{n} {kind}, {mebibytes(size)}' for kind, (n, size) in found) or 'none'


def limits(plans, rows):
  lines = [
    '| config | topology | batch | a chip | group | memory | of it state | flops a chip | bytes '
    'accessed | cycles an image | images/s a chip | collectives | compiled in |',
    '|' + '---|' * 13,
  ]
  for row in rows:
    said, memory = plans[row], plans[row]['memory']
    lines.append(
      f'| `{row.config}` | `{row.topology}` | {row.batch_size:,} | {said["images_a_device"]} '
      f'| {row.bn_group_size} | {gibibytes(memory["needed"])} | {gibibytes(memory["state"])} '
      f'| {said["flops"]:.2e} | {said["bytes_accessed"]:.2e} | {cycles(said)} | {rate(said)} '
      f'| {collectives(said)} | {said["compile_seconds"]:.0f} s |'
    )
  return '\n'.join(lines)


def summing(topology, said):
  """Returns the least seconds that the all-reduces of a step take, by a chip's links.

  A chip sends the bytes twice, to sum them and to hand out the sums, over as few links as a corner
  of the slice has: an axis of a v5e wraps around at 16 chips alone.
  """
  sides = [int(n) for n in topology.partition(':')[2].split('x')]
  links = sum(2 if n == 16 else 1 for n in sides if n > 1)
  return 2 * said['collectives']['all-reduce'][1] / (links * LINK)


def sizing(plans, rows):
  lines = [
    '| config | chips | batch a chip | memory | step, ms | of them sums | of the matrix rate '
    '| images/s, all | cores to decode them | of vCPUs | epochs | hours | chip-hours |',
    '|' + '---|' * 13,
  ]
  for row in rows:
    said, config = plans[row], get_config(row.config)
    count, summed = chips(said), summing(row.topology, said)
    step = said['images_a_device'] / said['predicted_images_a_second'] + summed
    images_a_second = row.batch_size / step
    operations = 6 * said['multiply_adds_an_image'] * images_a_second / count
    cores = f'{images_a_second / DECODED[config.image_size]:,.0f}'
    if config.augment.rand_augment != DECODED_BY:
      cores = f'fewer than {cores}'
    images = IMAGES['imagenet22k' if row.config.endswith('22k') else 'imagenet']
    hours = images * config.epochs / images_a_second / 3600
    lines.append(
      f'| `{row.config}` | {count} | {said["images_a_device"]} '
      f'| {gibibytes(said["memory"]["needed"])} | {1000 * step:.1f} | {1000 * summed:.1f} '
      f'| {operations / matrix_rate(KIND):.0%} | {images_a_second:,.0f} | {cores} '
      f'| {count // CHIPS_A_HOST * VCPUS_A_HOST:,} | {config.epochs} | {hours:,.1f} '
      f'| {hours * count:,.0f} |'
    )
  return '\n'.join(lines)


def growth(plans, rows):
  lines = [
    '| config | topology | batch | a chip | cycles an image | memory | collectives |',
    '|' + '---|' * 7,
  ]
  for row in rows:
    said = plans[row]
    lines.append(
      f'| `{row.config}` | `{row.topology}` | {row.batch_size:,} | {said["images_a_device"]} '
      f'| {cycles(said)} | {gibibytes(said["memory"]["needed"])} | {collectives(said)} |'
    )
  return '\n'.join(lines)


TABLES = {limits: LIMITS, sizing: OFFICIAL, growth: GROWTH}

if __name__ == '__main__':
  main()
