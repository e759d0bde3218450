"""mc-ViT with one projection for the queries, keys and values of all heads, against one each.

    python benchmarks/attention_heads.py

Prints a table and writes what was measured to benchmarks/results/. See benchmarks/README.md.
"""

# ruff: noqa: E402  (the project is found before it is imported)

import pathlib
import statistics
import sys
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from benchmarks import common
from benchmarks.step import lower_train_step, step_taker
from cvt_flax import create_model
from cvt_flax.models import compact
from cvt_flax.models.layers import Dense
from cvt_flax.ops.attention import attention

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy')
MERGED, APART = 'merged', 'a projection each'
_KINDS = ('query', 'key', 'value')


class HeadsApart(nn.Module):
  """`compact.Attention`, each head on its own: three linear layers, then the same attention."""

  options: compact.CompactOptions
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x, train, cls_only=False):
    o, heads = self.options, []
    for i in range(o.num_heads):
      q, k, v = (Dense(o.embed_dim // o.num_heads, name=f'{n}_{i}')(x) for n in _KINDS)
      q = q[:, -1:] if cls_only else q
      heads.append(attention(*(y[:, :, None] for y in (q, k, v)), o.scale)[:, :, 0])
    return Dense(o.embed_dim, name='proj')(jnp.concatenate(heads, axis=-1))


def apart(params, heads):
  """Returns the parameters of the model with `HeadsApart`, from those of the merged one."""
  leaves = {}
  for path, leaf in traverse_util.flatten_dict(params).items():
    if 'qkv' not in path:
      leaves[path] = leaf
      continue
    *block, _, name = path
    for kind, part in zip(_KINDS, np.split(leaf, 3, axis=-1), strict=True):
      for i, head in enumerate(np.split(part, heads, axis=-1)):
        leaves[*block, f'{kind}_{i}', name] = head
  return traverse_util.unflatten_dict(leaves)


def main():
  arguments = parse()
  common.refuse_busy(arguments, 'They would take turns with both contestants')
  model = create_model('mcvit', 10)
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.normal(size=(arguments.batch, 32, 32, 3)), jnp.float32)
  labels = jnp.asarray(rng.integers(10, size=arguments.batch))
  merged = jax.device_get(jax.jit(model.init)(jax.random.key(0), images)['params'])
  params = {MERGED: merged, APART: apart(merged, model.heads)}

  compiled, logits = {'forward': {}, 'train step': {}}, {}
  for name, module in ((MERGED, compact.Attention), (APART, HeadsApart)):
    with mock.patch.object(compact, 'Attention', module):  # what is compiled here has it
      compiled['forward'][name], logits[name] = forward(model, params[name], images)
      variables, inputs = {'params': params[name]}, (images, labels)
      step = lower_train_step(model, variables, *inputs).compile()
      compiled['train step'][name] = step_taker(step, variables, *inputs)
  difference = np.abs(logits[APART] - logits[MERGED]).max() / np.abs(logits[MERGED]).max()
  if not difference <= 1e-6:
    sys.exit(f'the two do not compute the same logits: they differ by {difference:.1e}')
  print(f'logits agree to {difference:.1e}', file=sys.stderr)

  start = common.usage()
  results = {
    what: common.alternate(what, contestants, arguments.rounds, arguments.steps)
    for what, contestants in compiled.items()
  }
  print(common.table(results, MERGED))
  record = {
    'logits_differ_by': float(difference),
    'hardware': common.hardware(jax.devices()[0]),
    'results': {
      what: {
        'seconds_a_call_by_round': seconds,
        'median_ratio': statistics.median(common.ratios(seconds, MERGED, APART)),
      }
      for what, seconds in results.items()
    },
  }
  common.write(arguments, 'attention-heads', PACKAGES, start, record)


def parse():
  parser = common.parser(__doc__, clocked=True)
  parser.add_argument('--batch', type=int, default=256, help='images')
  parser.add_argument('--rounds', type=int, default=9, help='at least 5')
  parser.add_argument('--steps', type=int, default=5, help='timed calls of each, in each round')
  arguments = parser.parse_args()
  if arguments.rounds < 5:
    parser.error(f'--rounds={arguments.rounds}: at least 5 are needed')
  if arguments.quick:
    arguments.batch, arguments.rounds, arguments.steps = 8, 1, 1
  return arguments


def forward(model, params, images):
  """Returns a function that computes the logits and waits for them, and the logits."""
  apply = jax.jit(model.apply).lower({'params': params}, images).compile()
  params = jax.device_put(params)

  def run():
    return jax.block_until_ready(apply({'params': params}, images))

  return run, np.asarray(run())


if __name__ == '__main__':
  main()
