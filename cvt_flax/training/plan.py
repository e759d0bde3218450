"""--mode=compile: what a training step takes, on devices that need not be there.

XLA compiles the very step of a run for the devices of a topology. What it says of the result is
told: memory, collectives, and for TPUs the cycles that its cost model predicts.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time

import jax
import jax.numpy as jnp
from flax import traverse_util
from ml_collections import ConfigDict

from cvt_flax.data import sources
from cvt_flax.errors import UserError
from cvt_flax.models.geometry import multiply_adds
from cvt_flax.training import hlo, sharding
from cvt_flax.training import topology as topologies
from cvt_flax.training.config import freeze
from cvt_flax.training.engines import ENGINES
from cvt_flax.training.freeze import find_frozen
from cvt_flax.training.network import build_model, check_attention, num_logits
from cvt_flax.training.program import make_program
from cvt_flax.training.shipped import get_config

# The schedule's length is a constant in the step, and changes nothing of what is told here.
_STEPS_PER_EPOCH = 1000


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is known of a compiled step; flops, bytes and cycles are a device's. None is not known.

  str() of it is for people.

  Attributes:
    topology: its name.
    device: what jax calls its devices.
    mesh: how many devices by axis.
    batch_size: images of all devices.
    images_a_device: of them.
    parameters: of the model.
    multiply_adds_an_image: of its forward pass.
    compile_seconds: what compiling took, here.
    memory: in bytes, of a device: what is 'needed', of which 'arguments' and 'temporary', and of
      the arguments the 'state'; 'limit' is what there is.
    images_that_fit: of a batch, a device, by proportion; where the limit is known.
    flops, bytes_accessed: of a step; None with optimizer.accumulate_steps, as XLA counts one round.
    cycles: likewise, by XLA's cost model for TPUs; what devices wait for each other is not in them.
    predicted_images_a_second: by these cycles at the chip's clock.
    collectives: {kind: (count, bytes)} of a step; with optimizer.accumulate_steps a loop over
      microbatches counts as one round.
    largest: the largest arrays that are alive in it, and what they are of.
  """

  topology: str
  device: str
  mesh: dict[str, int]
  batch_size: int
  images_a_device: int
  parameters: int
  multiply_adds_an_image: int
  compile_seconds: float
  memory: dict[str, int | None]
  images_that_fit: int | None
  flops: float | None
  bytes_accessed: float | None
  cycles: int | None
  predicted_images_a_second: float | None
  collectives: dict[str, tuple[int, int]]
  largest: list[str]

  def __str__(self):
    of, each = self.memory, self.images_a_device
    limit = f' of {_bytes(of["limit"])}' if of['limit'] else ''
    fit = f'; about {self.images_that_fit} images would fit' if of['limit'] else ''
    lines = [
      f'{self.topology}: {math.prod(self.mesh.values())} x {self.device}, mesh '
      + ' x '.join(f'{name} {size}' for name, size in self.mesh.items()),
      f'batch {self.batch_size}, {each} images a device; compiled in {self.compile_seconds} s',
      f'memory a device: {_bytes(of["needed"])}{limit}{fit}',
      f'  state {_bytes(of["state"])}, arguments {_bytes(of["arguments"])}, '
      f'temporary {_bytes(of["temporary"])}',
    ]
    if self.flops and self.bytes_accessed:
      lines.append(
        f'a step, a device: {self.flops:.3g} flops, {self.bytes_accessed:.3g} bytes accessed'
      )
    if self.cycles:
      rate = self.predicted_images_a_second
      lines.append(
        f"predicted by XLA's cost model: {self.cycles:.3g} cycles, "
        + f'{self.cycles / each:.3g} an image'
        + (f', {rate:,.0f} images/s a device' if rate else '')
      )
    lines += [
      f'{count} x {kind}, {size / 2**20:,.1f} MiB'
      for kind, (count, size) in self.collectives.items()
    ] or ['no collectives']
    lines += ['largest:', *(f'  {line}' for line in self.largest)]
    return '\n'.join(lines)


def plan(config: ConfigDict | str, topology: str = '') -> Plan:
  """Compiles the training step of a config, for devices that need not be there. Nothing runs.

      print(plan('cvt13_imagenet', 'v5e:16x16'))

  Args:
    config: of a run, or a name in configs/; a TFDS data set that is streamed need not be prepared.
    topology: KIND:SHAPE in chips, 'v4:2x2x1', 'v5e:16x16', 'v5p:2x2x1', 'v6e:1x1';
      '4xv5e:16x16' is four slices of that, 'cpu:8' so many CPU devices, '' the devices attached.

  Where jax has not started, a topology that is not attached leaves it on the CPU: train before, or
  in another process.

  Raises:
    UserError: there is no such topology, the compiler for it is not installed, the batch does not
      divide, or the step does not fit.
  """
  config = freeze(get_config(config) if isinstance(config, str) else config)
  place = topologies.find(topology)
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, place.devices)
  sharding.check_batch('batch_size', config.batch_size, mesh, sharding.FEWER)
  classes, images = _extent(config)
  model = build_model(config.model, num_logits(config, classes), config.image_size)
  check_attention(model, config.image_size)
  size = config.image_size
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
  params = traverse_util.flatten_dict(shapes['params'])
  engine = ENGINES[config.engine](config, mesh)
  program = make_program(
    config,
    model,
    params,
    find_frozen(config.optimizer.freeze, params),
    engine,
    mesh,
    total_steps=config.steps or config.epochs * _STEPS_PER_EPOCH,
    steps_per_epoch=_STEPS_PER_EPOCH,
  )
  began = time.perf_counter()
  compiled = _compiled(config, program.step.lower(program.state, *engine.abstract_feed(images)))
  seconds = time.perf_counter() - began
  text, cost, memory = compiled.as_text(), compiled.cost_analysis(), compiled.memory_analysis()
  arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  needed = arguments + memory.output_size_in_bytes - memory.alias_size_in_bytes + temporary
  state, each = sharding.bytes_a_device(program.state), config.batch_size // mesh.size
  # The resident engine's arguments are the whole split, however many images a batch has.
  fixed = arguments if config.engine == 'resident' else state
  largest = hlo.largest(text)
  # A loop's body is counted once.
  counted = config.optimizer.accumulate_steps == 1
  cycles = hlo.cycles(text) if counted else None
  if place.memory and needed > place.memory:
    raise _too_large(config, f'{_bytes(needed)} of {_bytes(place.memory)}', largest)
  return Plan(
    topology=place.name,
    device=place.devices[0].device_kind,
    mesh=dict(mesh.shape),
    batch_size=config.batch_size,
    images_a_device=each,
    parameters=sum(math.prod(x.shape) for x in params.values()),
    multiply_adds_an_image=multiply_adds(model, size, size),
    compile_seconds=round(seconds, 1),
    memory={
      'needed': needed,
      'state': state,
      'arguments': arguments,
      'temporary': temporary,
      'limit': place.memory,
    },
    # By proportion: all else is taken to grow with the images of a batch.
    images_that_fit=place.memory and (place.memory - fixed) * each // (needed - fixed),
    flops=cost.get('flops') if counted else None,
    bytes_accessed=cost.get('bytes accessed') if counted else None,
    cycles=cycles,
    predicted_images_a_second=each * place.clock / cycles if place.clock and cycles else None,
    collectives=hlo.collectives(text),
    largest=largest,
  )


def _extent(config):
  """Returns how many classes and training images there are; images are 0 where that is open."""
  classes, images = sources.extent(
    config.source,
    data_dir=config.data_dir,
    holdout=config.eval.holdout,
    test_holdout=config.eval.test_holdout,
    train_share=config.train_share,
    seed=config.seed,
  )
  if config.engine == 'resident' and not images:
    raise UserError(f'{config.source} is not prepared: what its images take is not known')
  return classes, images


def _compiled(config, lowered):
  try:
    return lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    used = re.search(r'Used ([\d.]+\w?) of ([\d.]+\w?) hbm', str(e))
    largest = re.findall(r'Size: ([\d.]+\w).*?Shape: (\S+)', str(e), re.DOTALL)
    memory = f'{used[1]} of {used[2]}' if used else ' '.join(str(e).split())[:300]
    raise _too_large(config, memory, [f'{shape} {size}' for size, shape in largest[:8]]) from e


def _too_large(config, memory, largest):
  return UserError(
    f'batch_size={config.batch_size} does not fit, a device needs {memory}; the largest are '
    f'{"; ".join(largest)}'
  )


def _bytes(count):
  return f'{count / 2**30:.2f} GiB' if count >= 2**30 else f'{count / 2**20:.1f} MiB'
