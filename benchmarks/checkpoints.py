"""What a checkpoint of a training run takes: bytes, and seconds to write it and to read it.

    python benchmarks/checkpoints.py --config=cvt13_imagenet
    python benchmarks/checkpoints.py --config=cvtw24_imagenet_384 --classes=21841

The state is that of a run which trains every parameter, of normal random numbers, which compress as
little as weights do. See benchmarks/README.md.
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

from benchmarks import common
from cvt_flax.training.checkpoint import Checkpoints
from cvt_flax.training.config import freeze
from cvt_flax.training.network import build_model
from cvt_flax.training.optimizer import make_optimizer
from cvt_flax.training.shipped import get_config
from cvt_flax.training.step import init_state

PACKAGES = ('jax', 'flax', 'orbax-checkpoint')


def main():
  arguments = parse()
  common.refuse_busy(arguments, 'Writing is compressing, which takes all cores')
  start = common.usage()
  state = random_state(freeze(get_config(arguments.config)), arguments.classes)
  rounds = [measure(state) for _ in range(arguments.rounds)]
  median = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
  print(table(arguments.config, arguments.classes, median))
  record = {'hardware': common.hardware(), 'rounds': rounds}
  name = f'checkpoints-{arguments.config}-{arguments.classes}'
  common.write(arguments, name, PACKAGES, start, record)


def parse():
  parser = common.parser(__doc__, clocked=True)
  parser.add_argument('--config', default='cvt13_imagenet', help='a name in configs/')
  parser.add_argument('--classes', type=int, default=1000)
  parser.add_argument('--rounds', type=int, default=3)
  arguments = parser.parse_args()
  if arguments.quick:
    arguments.config, arguments.classes, arguments.rounds = 'digits', 10, 1
  return arguments


def random_state(config, classes):
  """Returns the state of a run, all of whose floats are random."""
  model = build_model(config.model, classes, config.image_size)
  tx = make_optimizer(config.optimizer, lambda step: 0.0)
  shapes = jax.eval_shape(
    lambda: init_state(model, tx, 0, config.image_size, bool(config.optimizer.ema_decay))
  )
  rng = np.random.default_rng(0)

  def fill(x):
    floats = np.issubdtype(x.dtype, np.floating)
    return jax.device_put(
      rng.standard_normal(x.shape, x.dtype) if floats else np.zeros(x.shape, x.dtype)
    )

  return jax.tree.map(fill, shapes)


def measure(state):
  """Returns what one checkpoint takes, in a folder of its own."""
  with tempfile.TemporaryDirectory() as folder:
    checkpoints = Checkpoints(pathlib.Path(folder), keep=1)
    began = time.perf_counter()
    checkpoints.save(1, state, None)
    waited = time.perf_counter() - began
    checkpoints.wait()
    written = time.perf_counter() - began
    size = sum(path.stat().st_size for path in pathlib.Path(folder).rglob('*') if path.is_file())
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    began = time.perf_counter()
    jax.block_until_ready(checkpoints.restore(1, abstract))
    read = time.perf_counter() - began
    checkpoints.close()
  return {
    'state_bytes': sum(x.nbytes for x in jax.tree.leaves(state)),
    'bytes': size,
    'training_waits_seconds': waited,
    'written_seconds': written,
    'read_seconds': read,
  }


def table(config, classes, median):
  return (
    '| config | classes | state | on disk | training waits | written in | read in |\n'
    '|---|---|---|---|---|---|---|\n'
    f'| `{config}` | {classes:,} | {median["state_bytes"] / 1e6:,.0f} MB '
    f'| {median["bytes"] / 1e6:,.0f} MB | {median["training_waits_seconds"]:.2f} s '
    f'| {median["written_seconds"]:.1f} s | {median["read_seconds"]:.1f} s |'
  )


if __name__ == '__main__':
  main()
