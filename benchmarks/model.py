"""CvT against Hugging Face's in PyTorch and a plain Flax port: forward pass and training step.

    python benchmarks/model.py --model=cvt-13 --size=224 --batch=8

Prints a table and writes what was measured to benchmarks/results/. See benchmarks/README.md.
"""

# ruff: noqa: E402  (the environment is set before JAX and transformers are imported)

import argparse
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
import transformers

from benchmarks import common
from benchmarks.plain import plain
from benchmarks.step import LEARNING_RATE, WEIGHT_DECAY, adamw, train_step
from cvt_flax import create_model
from cvt_flax.models.zoo import VARIANTS
from cvt_flax.weights.layouts import HUGGING_FACE

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'torch', 'transformers')


def main():
  arguments = parse()
  if not arguments.busy:
    common.refuse_busy(
      "PyTorch's threads wait for each other by spinning, which then costs it many times the work: "
      'ratios would be wrong'
    )
  torch.set_num_threads(common.cores())
  # float32 means float32 on both sides, also where the hardware has a faster format.
  jax.config.update('jax_default_matmul_precision', 'highest')
  torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

  model = create_model(arguments.model, drop_path_rates=(), activation=arguments.activation)
  device = {'cpu': 'cpu', 'gpu': 'cuda'}[jax.default_backend()]
  peer = huggingface(model).to(device)
  state = {name: tensor.cpu().numpy() for name, tensor in peer.state_dict().items()}
  shapes = {name: tensor.shape for name, tensor in state.items()}
  variables = HUGGING_FACE.unpack(model, shapes, state.__getitem__, 'the peer')
  rng = np.random.default_rng(0)
  images = rng.normal(size=(arguments.batch, 3, arguments.size, arguments.size))
  images = images.astype(np.float32)
  labels = rng.integers(model.num_classes, size=arguments.batch)
  difference = compare_logits(model, variables, peer, images)
  print(f'logits with the exact GELU on all sides agree to {difference:.1e}', file=sys.stderr)

  theirs = {'PyTorch eager': peer}
  if arguments.compile:
    theirs['PyTorch compiled'] = torch.compile(peer)
  ours = {'cvt_flax': model, 'a plain Flax port': plain(model)}
  results, start = {}, common.usage()
  for what, our, their in (
    ('forward', our_forward, their_forward),
    ('train step', our_train_step, their_train_step),
  ):
    contestants = {
      **{name: our(network, variables, images, labels) for name, network in ours.items()},
      **{name: their(module, images, labels, device) for name, module in theirs.items()},
    }
    results[what] = alternate(what, contestants, arguments.rounds, arguments.steps)

  print(table(results))
  write(arguments, results, difference, start)


def parse():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  # transformers takes the drop path rate of a block by its stage's number: a stage with fewer
  # blocks than that is an error there.
  names = [
    name for name in VARIANTS if all(depth > s for s, depth in enumerate(create_model(name).depths))
  ]
  parser.add_argument('--model', default='cvt-13', choices=names)
  parser.add_argument('--size', type=int, default=224, help='height and width of the images')
  parser.add_argument('--batch', type=int, default=8, help='images')
  parser.add_argument('--rounds', type=int, default=7, help='at least 5')
  parser.add_argument('--steps', type=int, default=3, help='timed calls of each, in each round')
  parser.add_argument('--activation', default='quick_gelu', choices=['quick_gelu', 'gelu'])
  parser.add_argument('--compile', action='store_true', help='also against torch.compile')
  parser.add_argument('--busy', action='store_true', help='run though the machine is busy')
  arguments = parser.parse_args()
  if arguments.rounds < 5:
    parser.error(f'--rounds={arguments.rounds}: at least 5 are needed')
  return arguments


def huggingface(model):
  """Returns Hugging Face's model of the same geometry, with random weights."""
  torch.manual_seed(0)
  config = transformers.CvtConfig(
    num_labels=model.num_classes,
    embed_dim=model.embed_dims,
    depth=model.depths,
    num_heads=model.num_heads,
    patch_sizes=model.patch_sizes,
    patch_stride=model.patch_strides,
    patch_padding=model.patch_paddings,
    mlp_ratio=model.mlp_ratios,
    cls_token=model.cls_token,
    drop_path_rate=(0.0,) * len(model.depths),
  )
  return transformers.CvtForImageClassification(config)


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


def our_forward(model, variables, images, labels):
  del labels
  apply = jax.jit(model.apply)
  images = nhwc(images)
  return lambda: jax.block_until_ready(apply(variables, images))


def our_train_step(model, variables, images, labels):
  step = jax.jit(train_step(model), donate_argnums=0)
  variables = jax.tree.map(jnp.array, variables)  # a copy: the step overwrites its state
  state = variables, adamw().init(variables['params'])
  images, labels = nhwc(images), jnp.asarray(labels)

  def run():
    nonlocal state
    state, loss = jax.block_until_ready(step(state, images, labels))
    return loss

  return run


def their_forward(module, images, labels, device):
  del labels
  images = torch.tensor(images).to(device)

  def run():
    module.eval()
    with torch.no_grad():
      module(images)
    synchronize(device)

  return run


def their_train_step(module, images, labels, device):
  optimizer = torch.optim.AdamW(module.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
  images, labels = torch.tensor(images).to(device), torch.tensor(labels).to(device)

  def run():
    module.train()
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(module(images).logits, labels).backward()
    optimizer.step()
    synchronize(device)

  return run


def synchronize(device):
  if device == 'cuda':
    torch.cuda.synchronize()


def alternate(what, contestants, rounds, steps):
  """Runs every contestant in turn, `rounds` times; returns {name: [seconds a call, a round]}."""
  for name, run in contestants.items():
    start = time.perf_counter()
    run()
    print(f'{what}, {name}: first call {time.perf_counter() - start:.1f} s', file=sys.stderr)
  seconds = {name: [] for name in contestants}
  for number in range(rounds):
    for name, run in contestants.items():
      run()  # not timed: the other one's threads come to rest, the caches are ours
      start = time.perf_counter()
      for _ in range(steps):
        run()
      seconds[name].append((time.perf_counter() - start) / steps)
    line = ', '.join(f'{name} {1e3 * times[-1]:.0f} ms' for name, times in seconds.items())
    print(f'{what}, round {number + 1}: {line}', file=sys.stderr)
  return seconds


def ratios(seconds, name):
  """Returns, for every round, how many times as fast as `name` cvt_flax was."""
  return [theirs / ours for ours, theirs in zip(seconds['cvt_flax'], seconds[name], strict=True)]


def table(results):
  lines = ['| | median ms | slowest and fastest round | cvt_flax is |', '|---|---|---|---|']
  for what, seconds in results.items():
    for name, times in seconds.items():
      median, low, high = (1e3 * f(times) for f in (statistics.median, min, max))
      faster = f'{statistics.median(ratios(seconds, name)):.2f}x' if name != 'cvt_flax' else ''
      lines.append(f'| {what}, {name} | {median:.0f} | {low:.0f} to {high:.0f} | {faster} |')
  return '\n'.join(lines)


def write(arguments, results, difference, start):
  record = {
    'arguments': vars(arguments),
    'logits_differ_by': difference,
    'hardware': {
      'device': jax.devices()[0].device_kind,
      'processor': common.processor(),
      'cores': common.cores(),
      'pytorch_threads': torch.get_num_threads(),
    },
    'results': {
      what: {
        'seconds_a_call_by_round': seconds,
        'median_seconds': {name: statistics.median(times) for name, times in seconds.items()},
        'median_ratio': {
          name: statistics.median(ratios(seconds, name)) for name in seconds if name != 'cvt_flax'
        },
      }
      for what, seconds in results.items()
    },
  }
  name = f'{arguments.model}-{arguments.size}-batch{arguments.batch}'
  common.write(name, PACKAGES, start, record)


if __name__ == '__main__':
  main()
