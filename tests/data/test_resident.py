"""The in-memory engine: reading, the order of an epoch, batches and their augmentation."""

import collections
import functools
import io
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cvt_flax.data import dataset, images, resident, trivial_augment
from cvt_flax.errors import UserError

PADDING = 2
CROP_AND_FLIP = resident.Augment(crop_padding=PADDING, flip=True)
ALL = resident.Augment(crop_padding=PADDING, flip=True, trivial_augment=True)


class Listed(dataset.Split):
  """A split of the given images; its examples come from every third place of some source."""

  name = 'listed train'

  def __init__(self, pictures):
    self.pictures = pictures
    self.labels = np.arange(len(pictures), dtype=np.int32) % 10

  def _read(self, index):
    return dataset.Example(
      self.pictures[index], int(self.labels[index]), 3 * index, f'picture {index}'
    )


def noise(h, w, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def png(picture):
  file = io.BytesIO()
  Image.fromarray(picture).save(file, 'PNG')
  return file.getvalue()


def make_arrays(n, size=12):
  """Returns images whose channels are the row and column of each pixel, from 1, and the image."""
  y, x, number = np.meshgrid(
    np.arange(1, size + 1), np.arange(1, size + 1), np.arange(n) % 250 + 1, indexing='ij'
  )
  image = np.stack([y, x, number], -1).transpose(2, 0, 1, 3).astype(np.uint8)
  index = np.arange(n, dtype=np.int32)
  return resident.Arrays(image=image, label=index % 10, index=index)


@functools.partial(jax.jit, static_argnames=('batch_size', 'augment'))
def train_batch(arrays, position, *, batch_size, seed=0, epoch=0, augment):
  order = resident.epoch_order(seed, epoch, len(arrays.index))
  return resident.train_batch(
    arrays, order, position, batch_size=batch_size, seed=seed, epoch=epoch, augment=augment
  )


def whole_epoch(arrays, **settings):
  """Returns images and indices of all batches of an epoch, joined."""
  batch_size = settings['batch_size']
  batches = [train_batch(arrays, i, **settings) for i in range(len(arrays.index) // batch_size)]
  return (
    np.concatenate([batch['image'] for batch in batches]),
    np.concatenate([batch['index'] for batch in batches]),
  )


# ----- Reading ---------------------------------------------------------------------------------


def test_reads_encoded_images_and_arrays_of_any_size_in_order():
  pictures = [noise(8 + i % 5, 9, i) for i in range(150)]  # more than one thread's share
  split = Listed([png(p) if i % 2 else p for i, p in enumerate(pictures)])
  arrays, skipped = resident.read_arrays(split, 8, crop_ratio=0.9)
  assert skipped == []
  assert (arrays.image.dtype, arrays.label.dtype, arrays.index.dtype) == ('uint8', 'int32', 'int32')
  np.testing.assert_array_equal(arrays.label, np.arange(150) % 10)
  np.testing.assert_array_equal(arrays.index, 3 * np.arange(150))
  for picture, image in zip(pictures, arrays.image, strict=True):
    expected = images.resize_and_crop(Image.fromarray(picture), 8, 0.9)
    np.testing.assert_array_equal(image, expected)


def test_an_image_that_cannot_be_decoded_is_named_or_skipped():
  pictures = [png(noise(8, 8, i)) for i in range(5)]
  pictures[1] = pictures[1][:40]
  pictures[3] = b'no image'
  split = Listed(pictures)
  with pytest.raises(UserError, match='picture [13]'):
    resident.read_arrays(split, 8)
  arrays, skipped = resident.read_arrays(split, 8, skip_unreadable=True)
  assert skipped == ['picture 1', 'picture 3']
  np.testing.assert_array_equal(arrays.label, [0, 2, 4])
  np.testing.assert_array_equal(arrays.index, [0, 6, 12])
  np.testing.assert_array_equal(arrays.image, [noise(8, 8, i) for i in (0, 2, 4)])


def test_nothing_but_unreadable_images_is_an_error_even_when_they_are_skipped():
  with pytest.raises(UserError, match='listed train: none of its 2 images'):
    resident.read_arrays(Listed([b'no', b'neither']), 8, skip_unreadable=True)


def test_what_does_not_fit_into_memory_is_refused_before_reading(monkeypatch):
  class Endless(Listed):
    def __len__(self):
      return 10**10

    def _read(self, index):
      raise AssertionError('read before the check')

  with pytest.raises(UserError, match='2803802.5 GiB of memory') as refusal:
    resident.read_arrays(Endless([]), 224)
  assert '\n' not in str(refusal.value)
  split = Listed([noise(8, 8)] * 4)
  needed = 2 * 4 * 8 * 8 * 3  # here the device is the same memory
  monkeypatch.setattr(resident.machine, 'available_memory', lambda: needed)
  resident.read_arrays(split, 8)
  monkeypatch.setattr(resident.machine, 'available_memory', lambda: needed - 1)
  with pytest.raises(UserError, match='4 images of 8x8'):
    resident.read_arrays(split, 8)


# ----- Order -----------------------------------------------------------------------------------


def test_the_order_is_a_permutation_of_seed_and_epoch():
  order = np.asarray(resident.epoch_order(3, 5, 101))
  assert order.dtype == np.int32
  np.testing.assert_array_equal(np.sort(order), np.arange(101))
  traced = jax.jit(resident.epoch_order, static_argnums=(0, 2))(3, 5, 101)
  np.testing.assert_array_equal(traced, order)
  assert np.any(order != resident.epoch_order(3, 6, 101))
  assert np.any(order != resident.epoch_order(4, 5, 101))


def test_an_epoch_has_no_image_twice_and_leaves_out_others_each_time():
  arrays = make_arrays(21)
  left_out = set()
  for epoch in range(6):
    order = resident.epoch_order(0, epoch, 21)
    image, index = whole_epoch(arrays, batch_size=4, epoch=epoch, augment=resident.Augment())
    np.testing.assert_array_equal(index, order[:20])
    np.testing.assert_array_equal(image, arrays.image[index])
    left_out.add(int(order[20]))
  assert len(left_out) > 1


def test_a_training_batch_has_the_contract_of_both_engines():
  arrays = make_arrays(21)
  arrays = arrays.replace(index=arrays.index + 1000)  # held-out images leave gaps in a source
  batch = train_batch(arrays, 2, batch_size=4, augment=CROP_AND_FLIP)
  assert {name: (value.shape, str(value.dtype)) for name, value in batch.items()} == {
    'image': ((4, 12, 12, 3), 'uint8'),
    'label': ((4,), 'int32'),
    'mask': ((4,), 'float32'),
    'index': ((4,), 'int32'),
  }
  rows = resident.epoch_order(0, 0, 21)[8:12]
  np.testing.assert_array_equal(batch['index'], rows + 1000)
  np.testing.assert_array_equal(batch['label'], rows % 10)
  np.testing.assert_array_equal(batch['mask'], 1)


def test_a_batch_larger_than_the_data_set_is_refused():
  with pytest.raises(ValueError, match='batch of 8 .* from 7'):
    train_batch(make_arrays(7), 0, batch_size=8, augment=resident.Augment())


# ----- Augmentation ----------------------------------------------------------------------------


def test_crops_and_flips_are_windows_of_the_padded_image_and_uniform():
  arrays = make_arrays(3000)
  results, index = whole_epoch(arrays, batch_size=1000, augment=CROP_AND_FLIP)
  counts = collections.Counter()
  for result, i in zip(results, index, strict=True):
    middle, right = result[6, 6].astype(int), result[6, 7].astype(int)
    flip = right[1] < middle[1]
    top = middle[0] - 1 - 6 + PADDING
    left = middle[1] - 1 - (5 if flip else 6) + PADDING
    padded = np.pad(arrays.image[i], ((PADDING, PADDING), (PADDING, PADDING), (0, 0)))
    window = padded[top : top + 12, left : left + 12]
    np.testing.assert_array_equal(result, window[:, ::-1] if flip else window)
    counts[int(top), int(left), bool(flip)] += 1
  outcomes = 2 * (2 * PADDING + 1) ** 2
  assert len(counts) == outcomes
  expected = 3000 / outcomes
  chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
  assert abs(chi_squared - (outcomes - 1)) < 4 * math.sqrt(2 * (outcomes - 1))


def test_without_flip_or_crop_that_part_of_the_image_stays():
  arrays = make_arrays(40)
  image, index = whole_epoch(arrays, batch_size=40, augment=resident.Augment(crop_padding=PADDING))
  assert np.all(np.diff(image[:, 6, 3:9, 1].astype(int)) == 1)  # columns ascend: nothing mirrored
  assert np.any(image != arrays.image[index])
  image, index = whole_epoch(arrays, batch_size=40, augment=resident.Augment(flip=True))
  mirrored = np.all(image == arrays.image[index][:, :, ::-1], axis=(1, 2, 3))
  same = np.all(image == arrays.image[index], axis=(1, 2, 3))
  assert np.all(mirrored ^ same) and 8 < mirrored.sum() < 32


def test_trivial_augment_comes_last():
  arrays = make_arrays(48)
  before = train_batch(arrays, 0, batch_size=16, augment=CROP_AND_FLIP)['image']
  after = train_batch(arrays, 0, batch_size=16, augment=ALL)['image']
  assert np.any(after != before, axis=(1, 2, 3)).sum() > 3
  grid = np.stack(np.meshgrid(range(14), range(31), range(2), indexing='ij')).reshape(3, -1)
  every_case = jax.jit(jax.vmap(trivial_augment.apply, (None, 0, 0, 0)))
  for start, end in zip(before, after, strict=True):
    assert np.any(np.all(every_case(start, *grid) == end, axis=(1, 2, 3)))


def test_augmentation_depends_on_seed_epoch_and_image_alone():
  arrays = make_arrays(48)

  def by_index(**changed):
    image, index = whole_epoch(arrays, augment=ALL, **{'batch_size': 16, **changed})
    return image[np.argsort(index)]

  expected = by_index()
  np.testing.assert_array_equal(by_index(batch_size=8), expected)
  for changed in ({'epoch': 1}, {'seed': 1}):
    differ = np.any(by_index(**changed) != expected, axis=(1, 2, 3))
    assert differ.mean() > 0.9


def test_devices_change_nothing_and_need_not_communicate():
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  replicated = jax.NamedSharding(mesh, jax.P())
  over_batch = jax.NamedSharding(mesh, jax.P('data'))

  @jax.jit
  def sharded(arrays, position):
    batch = train_batch(arrays, position, batch_size=16, augment=ALL)
    return jax.lax.with_sharding_constraint(batch, over_batch)

  arrays = make_arrays(48)
  compiled = sharded.lower(jax.device_put(arrays, replicated), jnp.int32(1)).compile()
  for collective in ('all-reduce', 'all-gather', 'all-to-all', 'collective-permute'):
    assert collective not in compiled.as_text()
  batch = compiled(jax.device_put(arrays, replicated), jax.device_put(jnp.int32(1), replicated))
  assert batch['image'].sharding.spec == jax.P('data')
  jax.tree.map(
    np.testing.assert_array_equal, batch, train_batch(arrays, 1, batch_size=16, augment=ALL)
  )


# ----- Evaluation ------------------------------------------------------------------------------


@pytest.mark.parametrize('n', [21, 24])
def test_an_evaluation_has_every_image_once(n):
  arrays = make_arrays(n)
  arrays = arrays.replace(index=arrays.index + 1000)
  take = jax.jit(resident.eval_batch, static_argnames='batch_size')
  batches = [take(arrays, i, batch_size=8) for i in range(3)]
  batch = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
  np.testing.assert_array_equal(batch['image'][:n], arrays.image)
  np.testing.assert_array_equal(batch['label'][:n], arrays.label)
  np.testing.assert_array_equal(batch['index'][:n], arrays.index)
  np.testing.assert_array_equal(batch['mask'], np.arange(24) < n)
  assert not batch['image'][n:].any() and not batch['label'][n:].any()
  assert np.all(batch['index'][n:] == -1)
  assert {name: str(value.dtype) for name, value in batch.items()} == {
    'image': 'uint8', 'label': 'int32', 'mask': 'float32', 'index': 'int32'
  }  # fmt: skip
