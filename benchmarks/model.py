"""CvT against Hugging Face's in PyTorch and a plain Flax port: inference and training step.

    python benchmarks/model.py --model=cvt-13 --size=224 --batch=8

Prints a table and writes what was measured to benchmarks/results/. See benchmarks/README.md.
"""

# ruff: noqa: E402  (the environment is set before JAX and transformers are imported)

import contextlib
import functools
import os
import pathlib
import statistics
import sys
import time

os.environ.setdefault('HF_HUB_OFFLINE', '1')  # nothing is downloaded: weights are random
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Nothing here needs torchvision, and one built for another PyTorch takes transformers down.
sys.modules['torchvision'] = None

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import common
from benchmarks.plain import plain
from benchmarks.step import LEARNING_RATE, WEIGHT_DECAY, lower_train_step, step_taker
from cvt_flax import create_model, fold
from cvt_flax.models.zoo import VARIANTS
from cvt_flax.weights import parity
from cvt_flax.weights.layouts import HUGGING_FACE

COMPILATIONS = 3  # rounds of them
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'torch', 'transformers')


def main():
  arguments = parse()
  jax.config.update('jax_enable_compilation_cache', False)  # compiling is measured
  common.refuse_busy(
    arguments,
    "PyTorch's threads wait for each other by spinning, which then costs it many times the work: "
    'ratios would be wrong',
  )
  torch.set_num_threads(common.cores())
  # float32 means float32 on both sides, also where the hardware has a faster format.
  torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

  attributes = {'drop_path_rates': (), 'activation': arguments.activation}
  if arguments.quick:
    attributes['depths'] = (1, 2, 3)
  model = create_model(arguments.model, **attributes)
  device = {'cpu': 'cpu', 'gpu': 'cuda'}[jax.default_backend()]
  rng = np.random.default_rng(0)
  images = rng.normal(size=(arguments.batch, 3, arguments.size, arguments.size))
  images = images.astype(np.float32)
  labels = rng.integers(model.num_classes, size=arguments.batch)
  variables = jax.jit(model.init)(jax.random.key(0), nhwc(images[:1]))
  peer = parity.torch_model(model.clone(activation='gelu'), variables, HUGGING_FACE).to(device)
  with jax.default_matmul_precision('highest'):
    difference = compare_logits(model, variables, peer, images)
  print(f'logits with the exact GELU on all sides agree to {difference:.1e}', file=sys.stderr)

  if device == 'cuda':
    peer.to(memory_format=torch.channels_last)  # convolutions there are faster so
  theirs = {'PyTorch eager': Torch(peer, device, arguments.dtype)}
  if arguments.compile:
    theirs['PyTorch compiled'] = Torch(torch.compile(peer), device, arguments.dtype)
  model = model.clone(dtype=jnp.dtype(arguments.dtype))
  exact = arguments.dtype == 'float32'
  with jax.default_matmul_precision('highest') if exact else contextlib.nullcontext():
    start = common.usage()
    results, memory = compete(model, variables, theirs, images, labels, arguments)
  print(common.table(results, 'cvt_flax'), memory_table(memory), sep='\n\n')
  write(arguments, results, memory, difference, start)


def compete(model, variables, theirs, images, labels, arguments):
  """Returns {what: {name: [seconds a call, a round]}}, and {name: bytes} of a training step."""
  networks = {'cvt_flax': (model, variables), 'a plain Flax port': (plain(model), variables)}
  inputs = nhwc(images), jnp.asarray(labels)
  rounds, steps = arguments.rounds, arguments.steps
  results = {
    'forward': {
      'cvt_flax': forward(*fold(model, variables), inputs),
      'cvt_flax, not folded': forward(model, variables, inputs),
      'a plain Flax port': forward(*networks['a plain Flax port'], inputs),
    }
    | {name: each.forward(images) for name, each in theirs.items()},
  }
  results['forward'] = alternate('forward', results['forward'], rounds, steps)

  lower = {
    name: functools.partial(lower_train_step, *network, *inputs)
    for name, network in networks.items()
  }
  compiled = {name: each().compile() for name, each in lower.items()}
  memory = {name: each.memory_analysis().temp_size_in_bytes for name, each in compiled.items()}
  contestants = {
    name: step_taker(compiled[name], network[1], *inputs) for name, network in networks.items()
  } | {name: each.train_step(images, labels) for name, each in theirs.items()}
  results['train step'] = alternate('train step', contestants, rounds, steps)
  memory |= {name: each.peak for name, each in theirs.items() if each.peak}
  contestants.clear()

  what = 'trace and compile the train step'
  contestants = {name: functools.partial(compile_again, each) for name, each in lower.items()}
  results[what] = common.alternate(
    what, contestants, 1 if arguments.quick else COMPILATIONS, 1, warm=False
  )
  return results, memory


def parse():
  parser = common.parser(__doc__, clocked=True)
  # transformers takes the drop path rate of a block by its stage's number: a stage with fewer
  # blocks than that is an error there.
  names = [
    name for name in VARIANTS if all(depth > s for s, depth in enumerate(create_model(name).depths))
  ]
  parser.add_argument('--model', default='cvt-13', choices=names)
  parser.add_argument('--size', type=int, default=224, help='height and width of the images')
  parser.add_argument('--batch', type=int, default=8, help='images')
  parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'])
  parser.add_argument('--rounds', type=int, default=7, help='at least 5')
  parser.add_argument('--steps', type=int, default=3, help='timed calls of each, in each round')
  parser.add_argument('--activation', default='quick_gelu', choices=['quick_gelu', 'gelu'])
  parser.add_argument('--compile', action='store_true', help='also against torch.compile')
  arguments = parser.parse_args()
  if arguments.rounds < 5:
    parser.error(f'--rounds={arguments.rounds}: at least 5 are needed')
  if arguments.quick:
    arguments.size, arguments.batch, arguments.rounds, arguments.steps = 32, 2, 1, 1
  return arguments


def compare_logits(model, variables, peer, images):
  """Returns max|difference| / max|logit| of the first two images, and stops if it is not 1e-5."""
  with torch.no_grad():
    expected = peer.eval()(torch.tensor(images[:2]).to(peer.device)).logits.cpu().numpy()
  exact = model.clone(activation='gelu')
  logits = [jax.jit(m.apply)(variables, nhwc(images[:2])) for m in (exact, plain(exact))]
  difference = max(np.abs(x - expected).max() for x in logits) / np.abs(expected).max()
  if not difference <= 1e-5:
    sys.exit(f'they do not compute the same logits: they differ by {difference:.1e}')
  return float(difference)


def nhwc(images):
  return jnp.asarray(images.transpose(0, 2, 3, 1))


def forward(model, variables, inputs):
  """Returns a function that computes the logits and waits for them."""
  apply = jax.jit(model.apply)
  variables = jax.device_put(variables)
  return lambda: jax.block_until_ready(apply(variables, inputs[0]))


def compile_again(lower):
  jax.clear_caches()  # of what was traced before
  lower().compile()


class Torch:
  """A module of PyTorch, run as its users do: autocast for bfloat16, in training too.

  Attributes:
    peak: the most bytes that a training step allocated beside parameters and optimizer; 0 where
      PyTorch does not count, on a CPU.
  """

  def __init__(self, module, device, dtype):
    self._module, self._device, self.peak = module, device, 0
    self._cast = functools.partial(
      torch.autocast, device, torch.bfloat16, enabled=dtype == 'bfloat16'
    )

  def forward(self, images):
    images = self._put(images)

    def run():
      self._module.eval()
      with torch.no_grad(), self._cast():
        self._module(images)
      self._synchronize()

    return run

  def train_step(self, images, labels):
    parameters = self._module.parameters()
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    images, labels = self._put(images), torch.tensor(labels).to(self._device)

    def run():
      optimizer.zero_grad()
      if self._device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
      self._module.train()
      with self._cast():
        loss = torch.nn.functional.cross_entropy(self._module(images).logits, labels)
      loss.backward()
      optimizer.step()
      self._synchronize()
      if self._device == 'cuda':
        self.peak = torch.cuda.max_memory_allocated() - before

    return run

  def _put(self, images):
    images = torch.tensor(images).to(self._device)
    if self._device == 'cuda':
      images = images.contiguous(memory_format=torch.channels_last)
    return images

  def _synchronize(self):
    if self._device == 'cuda':
      torch.cuda.synchronize()


def alternate(what, contestants, rounds, steps):
  """`common.alternate`, after a first call of each."""
  for name, run in contestants.items():
    start = time.perf_counter()
    run()
    print(f'{what}, {name}: first call {time.perf_counter() - start:.1f} s', file=sys.stderr)
  return common.alternate(what, contestants, rounds, steps)


def memory_table(memory):
  lines = ['| the train step allocates beside its state | MiB |', '|---|---|']
  lines += [f'| {name} | {size / 2**20:,.0f} |' for name, size in memory.items()]
  return '\n'.join(lines)


def write(arguments, results, memory, difference, start):
  record = {
    'logits_differ_by': difference,
    'hardware': common.hardware(jax.devices()[0]) | {'pytorch_threads': torch.get_num_threads()},
    'train_step_temporary_bytes': memory,
    'results': {
      what: {
        'seconds_a_call_by_round': seconds,
        'median_seconds': {name: statistics.median(times) for name, times in seconds.items()},
        'median_ratio': {
          name: statistics.median(common.ratios(seconds, 'cvt_flax', name))
          for name in seconds
          if name != 'cvt_flax'
        },
      }
      for what, seconds in results.items()
    },
  }
  name = f'{arguments.model}-{arguments.size}-batch{arguments.batch}-{arguments.dtype}'
  common.write(arguments, name, PACKAGES, start, record)


if __name__ == '__main__':
  main()
