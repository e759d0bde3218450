"""The in-memory engine: a small data set lies on the device and is augmented there.

A split is decoded once, before training, to one array of uint8. The order of an epoch, the batches
and their augmentation are pure functions of (seed, epoch, position), made for the inside of a
jitted step: nothing is fed from the host, and to resume takes nothing but the position. What
happens to an image depends on the seed, the epoch and its own index alone, so batch size and
devices change nothing.

A batch is a dict: 'image' uint8 [b, h, w, 3], 'label' int32 [b], 'mask' float32 [b] (0 where there
is no image) and 'index' int32 [b] (`dataset.Example.index`, -1 where there is no image).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import typing

import flax
import jax
import jax.numpy as jnp
import numpy as np

from cvt_flax.data import images, machine, trivial_augment
from cvt_flax.errors import UserError
from cvt_flax.rng import Stream, stream_key

if typing.TYPE_CHECKING:
  from cvt_flax.data import dataset

Batch = dict[str, jax.Array]

_READ_TOGETHER = 64  # images a thread asks the split for at once: some read many faster than one


@flax.struct.dataclass
class Arrays:
  """A whole split, in NumPy arrays or on the device.

  Attributes:
    image: uint8 [n, h, w, 3].
    label: int32 [n].
    index: int32 [n], `dataset.Example.index`: the place of each image in the split of its source.
  """

  image: np.ndarray | jax.Array
  label: np.ndarray | jax.Array
  index: np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True)
class Augment:
  """What is done to training images, in this order.

  Attributes:
    crop_padding: black pixels put around the image before a random crop of its own size; 0, no
      crop. 4 is the custom for CIFAR.
    flip: mirrors left and right with probability 0.5.
    trivial_augment: applies one random operation (`cvt_flax.data.trivial_augment`).
  """

  crop_padding: int = 0
  flip: bool = False
  trivial_augment: bool = False


def read_arrays(
  split: dataset.Split,
  image_size: int,
  *,
  crop_ratio: float = 1.0,
  skip_unreadable: bool = False,
) -> tuple[Arrays, list[str]]:
  """Decodes a split into NumPy arrays.

  Args:
    split: the images, encoded or as arrays, and their labels.
    image_size: height and width of the arrays, in pixels.
    crop_ratio: as in `images.prepare`.
    skip_unreadable: leaves out images that cannot be decoded.

  Returns:
    The arrays, in the order of the split, and the names of the images left out.

  Raises:
    UserError: the arrays would not fit into memory (nothing is read then), an image cannot be
      decoded and `skip_unreadable` is off, or none can.
  """
  n = len(split)
  copies = 2 if jax.default_backend() == 'cpu' else 1  # that is the device, too
  needed, available = copies * n * image_size * image_size * 3, machine.available_memory()
  if needed > available:
    raise UserError(
      f'{split.name}: {n} images of {image_size}x{image_size} need {needed / 2**30:.1f} GiB of '
      f'memory, and {available / 2**30:.1f} GiB are available: set engine=stream, make the images '
      'smaller, or use fewer'
    )
  image = np.empty((n, image_size, image_size, 3), np.uint8)
  index = np.empty(n, np.int32)

  def read(start: int) -> list[tuple[int, str]]:
    """Fills the places from `start` on; returns place and name of what cannot be decoded."""
    left_out = []
    places = range(start, min(start + _READ_TOGETHER, n))
    for place, example in zip(places, split.__getitems__(places), strict=True):
      index[place] = example.index
      try:
        image[place] = images.prepare(example.image, example.name, image_size, crop_ratio)
      except UserError as error:
        if not skip_unreadable:
          raise UserError(f'{error}; {images.SKIP}') from error
        left_out.append((place, example.name))
    return left_out

  # Threads, because Pillow lets go of the interpreter's lock while it decodes and resizes.
  with concurrent.futures.ThreadPoolExecutor(machine.cores()) as pool:
    left_out = sum(pool.map(read, range(0, n, _READ_TOGETHER)), [])
  if n and len(left_out) == n:
    raise UserError(f'{split.name}: none of its {n} images can be decoded')
  arrays = Arrays(image=image, label=np.asarray(split.labels, np.int32), index=index)
  if left_out:
    gaps = [place for place, _ in left_out]
    arrays = jax.tree.map(lambda array: np.delete(array, gaps, axis=0), arrays)
  return arrays, [name for _, name in left_out]


def epoch_order(seed: int, epoch: int | jax.Array, size: int) -> jax.Array:
  """Returns the order of an epoch's images: int32 [size], a permutation.

  Args:
    seed: the run's seed.
    epoch: the epoch from 0, an integer or a traced integer scalar.
    size: how many images there are.
  """
  key = stream_key(seed, Stream.ORDER, epoch)
  return jax.random.permutation(key, jnp.arange(size, dtype=jnp.int32))


def train_batch(
  arrays: Arrays,
  order: jax.Array,
  position: int | jax.Array,
  *,
  batch_size: int,
  seed: int,
  epoch: int | jax.Array,
  augment: Augment,
) -> Batch:
  """Returns one training batch of an epoch, augmented.

  An epoch has n // batch_size batches; the images left over differ from epoch to epoch.

  Args:
    arrays: the split, n images on the device.
    order: int32 [n], from `epoch_order` for the same seed and epoch.
    position: which batch of the epoch, below n // batch_size; it may be traced.
    batch_size: how many images a batch has.
    seed: the run's seed.
    epoch: the epoch from 0; it may be traced.
    augment: what is done to the images; static under `jax.jit`.

  Returns:
    A batch of images order[position * batch_size : (position + 1) * batch_size]; its mask is 1.

  Raises:
    ValueError: there are fewer than `batch_size` images.
  """
  if batch_size > len(order):
    raise ValueError(f'a batch of {batch_size} images cannot be taken from {len(order)}')
  rows = jax.lax.dynamic_slice(order, (position * batch_size,), (batch_size,))
  chosen = jax.tree.map(lambda array: jnp.asarray(array)[rows], arrays)
  key = stream_key(seed, Stream.AUGMENT, epoch)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, chosen.index)
  image = jax.vmap(lambda key, image: _augment(key, image, augment))(keys, chosen.image)
  return {
    'image': image,
    'label': chosen.label,
    'mask': jnp.ones(batch_size, jnp.float32),
    'index': chosen.index,
  }


def _augment(key: jax.Array, image: jax.Array, augment: Augment) -> jax.Array:
  """Augments one image, uint8 [h, w, 3]."""
  key_crop, key_trivial = jax.random.split(key)
  p = augment.crop_padding
  limits = jnp.array([2 * p + 1, 2 * p + 1, 2])
  top, left, mirrored = jax.random.randint(key_crop, (3,), 0, limits)
  if p:
    padded = jnp.pad(image, ((p, p), (p, p), (0, 0)))
    image = jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)
  if augment.flip:
    image = jnp.where(mirrored, image[:, ::-1], image)
  if augment.trivial_augment:
    image = trivial_augment.trivial_augment(key_trivial, image)
  return image


def eval_batch(arrays: Arrays, position: int | jax.Array, *, batch_size: int) -> Batch:
  """Returns one batch of an evaluation: every image once, in order, as it is.

  There are ceil(n / batch_size) batches. The last is filled up with black images of label 0, mask 0
  and index -1.

  Args:
    arrays: the split, n images on the device.
    position: which batch; it may be traced.
    batch_size: how many images a batch has.

  Returns:
    A batch.
  """
  rows = position * batch_size + jnp.arange(batch_size)

  def take(array: jax.Array, fill: int) -> jax.Array:
    return jnp.take(array, rows, axis=0, mode='fill', fill_value=fill)

  return {
    'image': take(arrays.image, 0),
    'label': take(arrays.label, 0),
    'mask': (rows < len(arrays.index)).astype(jnp.float32),
    'index': take(arrays.index, -1),
  }
