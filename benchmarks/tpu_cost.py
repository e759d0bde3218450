"""What a training step takes on a TPU by XLA's cost model, against a plain Flax port's.

    pip install -r requirements-tpu.txt
    python benchmarks/tpu_cost.py --model=cvt-13 --size=224 --batch=64 --topology=v5e:1x1

Compiles both for a chip that need not be there, prints tables and writes them to
benchmarks/results/. See benchmarks/README.md.
"""

# ruff: noqa: E402  (the project is found before it is imported)

import pathlib
import re
import sys
import time
from collections import Counter

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp

from benchmarks import common
from benchmarks.plain import plain
from benchmarks.step import adamw, train_step
from cvt_flax import create_model
from cvt_flax.errors import UserError
from cvt_flax.models.zoo import VARIANTS
from cvt_flax.training import hlo, topology

# Kinds of layers, by the names that both give their modules; the first that is found.
KINDS = {
  'depthwise convolution': r'/conv_proj_\w+/conv/',
  'batch norm': r'/conv_proj_\w+/bn/',
  'layer norm': r'/norm\d?/',
  'linear layers': r'/(proj_[qkv]|attn/proj|fc1|fc2|head)/',
  'embedding': r'/patch_embed/proj/',
  'attention': r'/attn/',
}
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax')


def main():
  arguments = parse()
  jax.config.update('jax_enable_compilation_cache', False)  # compiling is measured
  try:
    place = topology.find(arguments.topology)
  except UserError as e:
    sys.exit(str(e))
  model = create_model(arguments.model, drop_path_rates=(), dtype=jnp.bfloat16)
  results = {}
  for name, network in {'cvt_flax': model, 'a plain Flax port': plain(model)}.items():
    results[name] = cost(network, arguments.size, arguments.batch, place)
    print(f'{name}: compiled in {results[name]["compile_seconds"]:.0f} s', file=sys.stderr)
  print(table(results))
  common.write(
    arguments,
    f'tpu-cost-{arguments.model}-{arguments.size}-{place.name.replace(":", "-")}',
    PACKAGES if place.name.startswith('cpu') else (*PACKAGES, 'libtpu'),
    None,  # other programs change nothing but the time of compiling
    {'results': results},
  )


def parse():
  parser = common.parser(__doc__)
  parser.add_argument('--model', default='cvt-13', choices=VARIANTS)
  parser.add_argument('--size', type=int, default=224, help='height and width of the images')
  parser.add_argument('--batch', type=int, default=64, help='images')
  parser.add_argument('--topology', default='v5e:1x1', help='a chip: v5e:1x1, v6e:1x1 or cpu:1')
  arguments = parser.parse_args()
  if arguments.quick:
    arguments.model, arguments.size, arguments.batch = 'cvt-nano', 32, 2
    arguments.topology = 'cpu:1'
  return arguments


def cost(model, size, batch, place):
  """Returns what the compiler says of a step on the first device of a place."""
  sharding = jax.sharding.SingleDeviceSharding(place.devices[0])
  images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32, sharding=sharding)
  labels = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=sharding)

  def begin(key):
    variables = model.init(key, jnp.zeros(images.shape[1:])[None])
    return variables, adamw().init(variables['params'])

  state = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    jax.eval_shape(begin, jax.random.key(0)),
  )
  began = time.perf_counter()
  compiled = jax.jit(train_step(model), donate_argnums=0).lower(state, images, labels).compile()
  seconds = time.perf_counter() - began
  text, analysis, memory = compiled.as_text(), compiled.cost_analysis(), compiled.memory_analysis()
  cycles = hlo.cycles(text)
  return {
    'compile_seconds': seconds,
    'cycles_an_image': cycles and cycles / batch,
    'images_a_second': batch * place.clock / cycles if cycles and place.clock else None,
    'flops_an_image': analysis['flops'] / batch,
    'bytes_accessed_an_image': analysis['bytes accessed'] / batch,
    'temporary_bytes': memory.temp_size_in_bytes,
    'cycles_an_image_by_layer': by_layer(text, batch),
  }


def by_layer(text, batch):
  """Returns the cycles an image of each kind of layer, forward and backward."""
  found = Counter()
  for cycles, name in hlo.instructions(text):
    kind = next((k for k, pattern in KINDS.items() if re.search(pattern, name + '/')), 'the rest')
    found[kind, 'backward' if 'transpose(' in name else 'forward'] += cycles
  return {f'{kind}, {way}': cycles / batch for (kind, way), cycles in sorted(found.items())}


def table(results):
  names = list(results)
  lines = [f'| | {" | ".join(names)} | ratio |', '|---|' + '---|' * (len(names) + 1)]

  def row(label, values, form):
    ours, theirs = values
    if ours is None or theirs is None:
      return
    ratio = f'{theirs / ours:.2f}x' if ours else ''
    lines.append(f'| {label} | {form(ours)} | {form(theirs)} | {ratio} |')

  for key, form in (
    ('cycles_an_image', '{:.3g}'.format),
    ('flops_an_image', '{:.3g}'.format),
    ('bytes_accessed_an_image', '{:.3g}'.format),
    ('temporary_bytes', lambda x: f'{x / 2**20:,.0f} MiB'),
  ):
    row(key.replace('_', ' '), [result[key] for result in results.values()], form)
  layers = [result['cycles_an_image_by_layer'] for result in results.values()]
  for kind in sorted(set().union(*layers), key=lambda kind: -layers[0].get(kind, 0)):
    row(f'cycles of {kind}', [found.get(kind, 0) for found in layers], '{:,.0f}'.format)
  return '\n'.join(lines)


if __name__ == '__main__':
  main()
