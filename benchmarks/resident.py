"""The resident engine: a training step that makes its own batches, against one that is given them.

    python benchmarks/resident.py --config=mcvit_cifar10

Both are the step of that config, on random images of CIFAR's size and number: one takes its batch
out of the images on the device and augments it, as a run does, the other has the same batch each
time. What lies between is what the data costs. Prints a table and writes what was measured to
benchmarks/results/. See benchmarks/README.md.
"""

# ruff: noqa: E402  (the project is found before it is imported)

import pathlib
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import numpy as np
from flax import traverse_util

from benchmarks import common
from cvt_flax import get_config
from cvt_flax.training import config as configs
from cvt_flax.training import hardware
from cvt_flax.training.program import make_program
from cvt_flax.training.setup import TrainingSetup

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax')
IMAGES, SIZE = 50_000, 32


def main():
  arguments = parse()
  common.refuse_busy(arguments, 'A step would take longer than it does')
  hardware.keep_freed_memory()  # as train.py does
  with tempfile.TemporaryDirectory() as folder:
    setup = make_setup(arguments, pathlib.Path(folder))
  start = common.usage()
  rates = alternate(contestants(setup), arguments, setup.config.batch_size)
  print(table(rates))
  record = {
    'batch_size': setup.config.batch_size,
    'hardware': common.hardware(jax.devices()[0]),
    'images_a_second_by_round': rates,
  }
  common.write(arguments, f'resident-{arguments.config}', PACKAGES, start, record)


def parse():
  parser = common.parser(__doc__, clocked=True)
  parser.add_argument('--config', default='mcvit_cifar10', help='of a resident run, in configs/')
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--steps', type=int, default=20, help='timed steps of each, in each round')
  arguments = parser.parse_args()
  arguments.images = IMAGES
  if arguments.quick:
    arguments.rounds, arguments.steps, arguments.images = 1, 2, 600
  return arguments


def make_setup(arguments, folder):
  """Returns the training of the config, on random images."""
  rng = np.random.default_rng(0)
  shape = (arguments.images, SIZE, SIZE, 3)
  images = rng.integers(256, size=shape, dtype=np.uint8)
  labels = np.arange(arguments.images) % 10
  np.savez(folder / 'random.npz', x_train=images, y_train=labels)
  config = get_config(arguments.config)
  config.source = f'npz:{folder / "random.npz"}'
  return TrainingSetup(configs.freeze(config), folder / 'run')


class Given:
  """In place of an engine: the batch that the step is fed."""

  def train_batch(self, step, batch):
    del step
    return batch


def contestants(setup):
  """Returns {name: a function that takes n steps and waits for them}."""
  fed = next(setup.engine.feed_training(setup.train_data, 0, 1))
  batch = jax.jit(setup.engine.train_batch)(0, *fed)
  given = make_program(
    setup.config,
    setup.model,
    traverse_util.flatten_dict(setup.program.state.params),
    setup.frozen,
    Given(),
    setup.mesh,
    total_steps=setup.total_steps,
    steps_per_epoch=setup.steps_per_epoch,
  )
  return {
    'batches made in the step': stepper(setup.program, fed),
    'one batch, again and again': stepper(given, (batch,)),
  }


def stepper(program, fed):
  state = program.init()

  def run(steps):
    nonlocal state
    for _ in range(steps):
      state, loss = program.step(state, *fed)
    jax.block_until_ready(loss)

  return run


def alternate(contestants, arguments, batch_size):
  """Lets both take steps in turn; returns {name: [images/s, a round]}."""
  rates = {name: [] for name in contestants}
  for number in range(arguments.rounds):
    for name, run in contestants.items():
      run(1)  # not timed: compiles at first, then the caches are its own
      start = time.perf_counter()
      run(arguments.steps)
      rates[name].append(arguments.steps * batch_size / (time.perf_counter() - start))
    line = ', '.join(f'{name} {each[-1]:,.0f}' for name, each in rates.items())
    print(f'round {number + 1}, images/s: {line}', file=sys.stderr)
  return rates


def table(rates):
  made, given = rates.values()
  share = statistics.median(1 - a / b for a, b in zip(made, given, strict=True))
  lines = ['| | images/s | slowest and fastest round |', '|---|---|---|']
  for name, each in rates.items():
    lines.append(
      f'| {name} | {statistics.median(each):,.0f} | {min(each):,.0f} to {max(each):,.0f} |'
    )
  return '\n'.join([*lines, '', f'The batches take {share:.1%} of the step.'])


if __name__ == '__main__':
  main()
