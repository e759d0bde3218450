"""The two data engines as a run sees them: what is fed to a jitted step, and the batch made of it.

`Resident` puts whole splits on the devices and makes batches in the step; `Streaming` reads batches
on the host. What they open, feed and make of it are the same methods of both.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cvt_flax import terminal
from cvt_flax.data import augment, dataset, resident, stream
from cvt_flax.errors import UserError
from cvt_flax.training import sharding
from cvt_flax.training.config import TrainConfig

Batch = dict[str, jax.Array]


class Resident:
  """The images of a split, decoded, on every device. What is opened are `resident.Arrays`."""

  def __init__(self, config: TrainConfig, mesh: Mesh):
    self._config, self._mesh = config, mesh
    a = config.augment
    self._augment = resident.Augment(a.crop_padding, a.flip, a.trivial_augment)

  def open(self, split: dataset.Split) -> resident.Arrays:
    """Decodes a split and puts it on the devices.

    Raises:
      UserError: it does not fit there, or an image cannot be decoded.
    """
    c = self._config
    arrays, skipped = resident.read_arrays(
      split, c.image_size, crop_ratio=c.crop_ratio, skip_unreadable=c.skip_unreadable
    )
    for name in skipped:
      print(f'left out {name}, which cannot be read')
    stats = jax.local_devices()[0].memory_stats() or {}
    memory = stats.get('bytes_limit', math.inf) - stats.get('bytes_in_use', 0)
    if arrays.image.nbytes > memory:
      raise UserError(
        f'{split.name}: {arrays.image.nbytes / 2**30:.1f} GiB of images do not fit into the '
        f'{memory / 2**30:.1f} GiB that a device has left: set engine=stream, or make the images '
        'smaller'
      )
    return sharding.place(arrays, sharding.replicated(self._mesh))

  def count(self, arrays: resident.Arrays) -> int:
    """Returns how many images there are."""
    return len(arrays.label)

  def decoded(self, arrays: resident.Arrays) -> str:
    """Returns a digest of the images that could be decoded: their labels and places."""
    return dataset.sha256([np.asarray(arrays.label), np.asarray(arrays.index)])

  def feed_training(
    self, arrays: resident.Arrays, start: int, stop: int
  ) -> Iterator[tuple[Any, ...]]:
    """Yields, for the steps from `start` to before `stop`, what `train_batch` takes."""
    steps_per_epoch = self.count(arrays) // self._config.batch_size
    order_of = jax.jit(
      lambda epoch: resident.epoch_order(self._config.seed, epoch, self.count(arrays)),
      out_shardings=sharding.replicated(self._mesh),
    )
    order = None
    for step in range(start, stop):
      epoch, position = divmod(step, steps_per_epoch)
      if order is None or position == 0:
        order = order_of(epoch)
      yield arrays, order

  def train_batch(self, step: jax.Array, arrays: resident.Arrays, order: jax.Array) -> Batch:
    """Returns the batch of a step, inside of jit."""
    batch_size = self._config.batch_size
    epoch, position = jnp.divmod(step, self.count(arrays) // batch_size)
    batch = resident.train_batch(
      arrays,
      order,
      position,
      batch_size=batch_size,
      seed=self._config.seed,
      epoch=epoch,
      augment=self._augment,
    )
    return jax.lax.with_sharding_constraint(batch, sharding.split_batch(self._mesh))

  def abstract_feed(self, images: int) -> tuple[Any, ...]:
    """Returns what `feed_training` yields as shapes, for a split of so many images."""
    size, everywhere = self._config.image_size, sharding.replicated(self._mesh)

    def of(*shape, dtype=jnp.int32):
      return jax.ShapeDtypeStruct((images, *shape), dtype, sharding=everywhere)

    return resident.Arrays(of(size, size, 3, dtype=jnp.uint8), of(), of()), of()

  def feed_evaluation(self, arrays: resident.Arrays, batch_size: int) -> Iterator[tuple[Any, ...]]:
    """Yields what `eval_batch` takes, so that every image comes once."""
    for position in range(math.ceil(self.count(arrays) / batch_size)):
      yield arrays, position

  def eval_batch(self, batch_size: int, arrays: resident.Arrays, position: jax.Array) -> Batch:
    """Returns a batch of an evaluation, inside of jit."""
    batch = resident.eval_batch(arrays, position, batch_size=batch_size)
    return jax.lax.with_sharding_constraint(batch, sharding.split_batch(self._mesh))


class Streaming:
  """The images of a split, read as they come. What is opened is the split itself."""

  def __init__(self, config: TrainConfig, mesh: Mesh):
    self._config, self._mesh = config, mesh
    a = config.augment
    self._transform = augment.Transform(
      size=config.image_size,
      crop_scale=a.crop_scale,
      crop_aspect=a.crop_aspect,
      crop_margin=a.crop_margin,
      crop_ratio=config.crop_ratio,
      interpolation=a.interpolation,
      flip=a.flip,
      rand_augment=augment.RandAugment.parse(a.rand_augment) if a.rand_augment else None,
      color_jitter=a.color_jitter,
      fill=tuple(min(255, round(255 * m)) for m in config.mean),
    )
    self._reading = stream.Reading(
      jax.process_index(),
      jax.process_count(),
      config.stream.workers,
      config.skip_unreadable,
    )
    self._unreadable = set()

  def open(self, split: dataset.Split) -> dataset.Split:
    """Returns the split: nothing is read yet."""
    return split

  def count(self, split: dataset.Split) -> int:
    """Returns how many images there are."""
    return len(split)

  def decoded(self, split: dataset.Split) -> str:
    """Returns '': an image that cannot be decoded keeps its place."""
    return ''

  def feed_training(self, split: dataset.Split, start: int, stop: int) -> Iterator[tuple[Any, ...]]:
    """Yields, for the steps from `start` to before `stop`, what `train_batch` takes."""
    c = self._config
    groups = c.batch_size // (c.model.bn_group_size or c.batch_size)
    order = stream.Order(len(split), c.batch_size, c.seed, c.augment.repeats, groups)
    batches = stream.train_batches(
      split, self._transform, order, self._reading, start=start, stop=stop
    )
    return self._fed(split, batches)

  def train_batch(self, step: jax.Array, batch: Batch) -> Batch:
    """Returns the batch of a step, inside of jit."""
    return batch

  def abstract_feed(self, images: int) -> tuple[Any, ...]:
    """Returns what `feed_training` yields as shapes; `images` of the split do not matter."""
    size, count = self._config.image_size, self._config.batch_size
    split = sharding.split_batch(self._mesh)

    def of(*shape, dtype):
      return jax.ShapeDtypeStruct((count, *shape), dtype, sharding=split)

    return (
      {
        'image': of(size, size, 3, dtype=jnp.uint8),
        'label': of(dtype=jnp.int32),
        'mask': of(dtype=jnp.float32),
        'index': of(dtype=jnp.int32),
      },
    )

  def feed_evaluation(
    self, split: dataset.Split, batch_size: int, num_classes: int = 0
  ) -> Iterator[tuple[Any, ...]]:
    """Yields what `eval_batch` takes; `num_classes` is of a split with several labels an image."""
    c = self._config
    batches = stream.eval_batches(
      split, c.image_size, c.crop_ratio, batch_size, self._reading, num_classes
    )
    return self._fed(split, batches)

  def eval_batch(self, batch_size: int, batch: Batch) -> Batch:
    """Returns a batch of an evaluation, inside of jit."""
    return batch

  def _fed(self, split, batches):
    for batch in sharding.prefetch(self._watched(split, batches), self._mesh):
      yield (batch,)

  def _watched(self, split, batches):
    """Tells, once each, of images that cannot be read."""
    with contextlib.closing(batches):
      for batch in batches:
        for index in batch['index'][(batch['mask'] == 0) & (batch['index'] >= 0)].tolist():
          if (split.name, index) not in self._unreadable:
            self._unreadable.add((split.name, index))
            words = f'left out {split.name_of(index)}, which cannot be read'
            terminal.say(sys.stdout, words)
        yield batch


Engine = Resident | Streaming
ENGINES: dict[str, type[Engine]] = {'resident': Resident, 'stream': Streaming}
