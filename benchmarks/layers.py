"""What every kind of layer takes by itself, against the least that the hardware allows.

    python benchmarks/layers.py --model=cvt-13 --size=224 --batch=8

The floor of a layer is the larger of two times: its multiplications and additions over the rate of
a large matrix product, and the bytes that have to be read and written over the rate at which a long
array is, both measured here. Prints a table and writes it to benchmarks/results/. See
benchmarks/README.md.
"""

# ruff: noqa: E402  (the project is found before it is imported)

import argparse
import dataclasses
import functools
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks import common
from benchmarks.step import adamw, train_step
from cvt_flax import create_model
from cvt_flax.models import cvt
from cvt_flax.models.geometry import stage_geometry
from cvt_flax.models.layers import Dense, DenseParameters, LayerNorm
from cvt_flax.models.options import StageOptions
from cvt_flax.models.zoo import VARIANTS
from cvt_flax.ops.attention import attention

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax')


@dataclasses.dataclass(frozen=True)
class Layer:
  """One layer, and how often the model has it.

  Attributes:
    kind: what it counts as.
    count: how many such layers the model has.
    apply: (parameters, *inputs) to its output.
    parameters: a tree of arrays.
    inputs: arrays.
    flops: multiplications and additions of `apply`.
  """

  kind: str
  count: int
  apply: Callable
  parameters: dict
  inputs: tuple
  flops: float


class Projection(nn.Module):
  """What makes queries of a map, or keys, or values: convolution, batch norm, linear layer."""

  options: StageOptions
  stride: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x):
    o = self.options
    kernel, bias = DenseParameters(o.embed_dim, use_bias=True)(x.shape[-1])
    return cvt.ConvProjection(o, 'dw_bn', self.stride, self.dtype)(x, kernel, bias, True)


def main():
  arguments = parse()
  common.refuse_busy(arguments, 'Everything would take longer than it does')
  start = common.usage()
  model = create_model(arguments.model, drop_path_rates=(), dtype=jnp.dtype(arguments.dtype))
  exact = arguments.dtype == 'float32'  # float32 means float32, also where there is a faster format
  with jax.default_matmul_precision('highest' if exact else 'default'):
    rates = measure_rates(arguments)
    rows = {}
    for layer in layers(model, arguments.size, arguments.batch):
      row = rows.setdefault(
        layer.kind, dict.fromkeys(('seconds', 'matrix', 'memory', 'floor'), 0.0)
      )
      for name, value in measure(layer, rates, arguments.rounds).items():
        row[name] += layer.count * value
      print(f'{layer.kind}: {1e3 * row["seconds"]:.1f} ms so far', file=sys.stderr)
    step = step_seconds(model, arguments)
  print(table(rows, rates, step))
  name = f'layers-{arguments.model}-{arguments.size}-batch{arguments.batch}-{arguments.dtype}'
  record = {
    'hardware': common.hardware(jax.devices()[0]),
    'flops_a_second': rates[0],
    'bytes_a_second': rates[1],
    'train_step_seconds': step,
    'forward_and_backward_seconds_by_layer': rows,
  }
  common.write(arguments, name, PACKAGES, start, record)


def parse() -> argparse.Namespace:
  parser = common.parser(__doc__, clocked=True)
  parser.add_argument('--model', default='cvt-13', choices=VARIANTS)
  parser.add_argument('--size', type=int, default=224, help='height and width of the images')
  parser.add_argument('--batch', type=int, default=8, help='images')
  parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'])
  parser.add_argument('--rounds', type=int, default=9, help='timed calls of each')
  arguments = parser.parse_args()
  if arguments.quick:
    arguments.model, arguments.size = 'cvt-nano', 32
    arguments.batch, arguments.rounds = 2, 1
  return arguments


def layers(model, size, batch):
  """Yields the layers of a training step of `model`, those that are alike together."""
  channels, side, key = model.in_channels, size, jax.random.key(0)
  draw = functools.partial(jax.random.normal, key, dtype=model.dtype)
  geometry = stage_geometry(model, size, size)

  def layer(kind, count, module, shape, flops, *arguments):
    x = draw(shape)
    variables = module.init(key, x, *arguments)

    def apply(params, x):
      state = {**variables, 'params': params}
      return module.apply(state, x, *arguments, mutable=['batch_stats'])[0]

    return Layer(kind, count, apply, variables['params'], (x,), batch * flops)

  for number, stage in enumerate(geometry):
    o, c = stage.options, stage.options.embed_dim
    area, tokens, keys = stage.height * stage.width, stage.tokens, stage.keys
    key_area = keys - o.cls_token
    flops = 2 * area * c * channels * o.patch_size**2
    embed = cvt.ConvEmbed(o, model.dtype)
    yield layer('embedding', 1, embed, (batch, side, side, channels), flops)
    # The last block computes its class token alone: of what it has for all tokens, keys and values.
    # The query convolution that its batch norm's statistics take is not counted.
    last = number == len(geometry) - 1 and model.pool == 'cls'
    whole = o.depth - last
    sequence, maps = (batch, tokens, c), (batch, stage.height, stage.width, c)
    norm = LayerNorm(model.dtype)
    yield layer('layer norm', o.depth + whole, norm, sequence, 0)
    for stride, count, rows in ((o.q_stride, whole, area), (o.kv_stride, 2 * o.depth, key_area)):
      flops = 2 * rows * c * (o.qkv_kernel**2 + c)
      projection = Projection(o, stride, model.dtype)
      yield layer('queries, keys, values', count, projection, maps, flops)
    heads = (o.num_heads, o.head_dim)
    inputs = tuple(draw((batch, n, *heads)) for n in (tokens, keys, keys))
    flops = 4 * batch * tokens * keys * c
    attend = functools.partial(scaled_attention, o.scale)
    yield Layer('attention', whole, attend, {}, inputs, flops)
    output = Dense(c, dtype=model.dtype)
    yield layer('output projection', whole, output, sequence, 2 * tokens * c**2)
    mlp, train = cvt.Mlp(o, model.dtype), True
    yield layer('MLP', whole, mlp, sequence, 4 * tokens * c * o.mlp_dim, train)
    channels, side = c, stage.height


def scaled_attention(scale, _, q, k, v):
  return attention(q, k, v, scale)


def measure_rates(arguments):
  """Returns the operations a second of a matrix product, and the bytes a second of an array."""
  dtype = jnp.dtype(arguments.dtype)
  n = 256 if arguments.quick else 2048 if jax.default_backend() == 'cpu' else 8192
  square = jax.random.normal(jax.random.key(0), (n, n), dtype)
  product = seconds(jax.jit(jnp.matmul), (square, square), arguments.rounds)
  long = jnp.zeros(2**20 if arguments.quick else 2**27, jnp.float32)
  add = jax.jit(lambda x: x + 1, donate_argnums=0)  # in its place: no new memory is asked for

  def copy():
    nonlocal long
    long = add(long)
    return long

  return 2 * n**3 / product, 2 * long.nbytes / seconds(copy, (), arguments.rounds)


def measure(layer, rates, rounds):
  """Returns the seconds of a layer, forward and backward, and the least that they could be.

  Forward and backward together are three times the forward's operations. Inputs and parameters are
  read twice and their gradients written, the output is written and its gradient read.
  """
  output = jax.eval_shape(layer.apply, layer.parameters, *layer.inputs)
  gradient = jnp.ones(output.shape, output.dtype)

  @jax.jit
  def both(gradient, parameters, inputs):
    y, pull = jax.vjp(layer.apply, parameters, *inputs)
    return y, pull(gradient)

  taken = seconds(both, (gradient, layer.parameters, layer.inputs), rounds)
  read = sum(x.nbytes for x in jax.tree.leaves((layer.parameters, layer.inputs)))
  matrix = 3 * layer.flops / rates[0]
  memory = (3 * read + 2 * math.prod(output.shape) * output.dtype.itemsize) / rates[1]
  return {'seconds': taken, 'matrix': matrix, 'memory': memory, 'floor': max(matrix, memory)}


def step_seconds(model, arguments):
  """Returns the seconds of the whole training step."""
  key = jax.random.key(0)
  images = jax.random.normal(key, (arguments.batch, arguments.size, arguments.size, 3))
  labels = jnp.zeros(arguments.batch, jnp.int32)
  variables = jax.jit(model.init)(key, images)
  state = variables, adamw().init(variables['params'])
  return seconds(jax.jit(train_step(model)), (state, images, labels), arguments.rounds)


def seconds(function, inputs, rounds):
  """Returns the median time of a call."""
  jax.block_until_ready(function(*inputs))
  taken = []
  for _ in range(rounds):
    start = time.perf_counter()
    jax.block_until_ready(function(*inputs))
    taken.append(time.perf_counter() - start)
  return statistics.median(taken)


def table(rows, rates, step):
  lines = [
    f'{rates[0] / 1e9:,.0f} G operations/s in a product, {rates[1] / 1e9:,.1f} GB/s of memory',
    '',
    '| forward and backward, ms | by itself | products alone | memory alone | times the floor |',
    '|---|---|---|---|---|',
  ]
  total = {name: sum(row[name] for row in rows.values()) for name in next(iter(rows.values()))}
  for kind, row in {**rows, 'together': total}.items():
    taken, matrix, memory = (1e3 * row[name] for name in ('seconds', 'matrix', 'memory'))
    times = row['seconds'] / row['floor']
    lines.append(f'| {kind} | {taken:.1f} | {matrix:.1f} | {memory:.1f} | {times:.1f} |')
  floor = step / total['floor']
  lines.append(f'| the whole training step | {1e3 * step:.1f} | | | {floor:.1f} |')
  return '\n'.join(lines)


if __name__ == '__main__':
  main()
