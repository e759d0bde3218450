"""The mesh, and batches that it divides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from cvt_flax.errors import UserError
from cvt_flax.training.sharding import (
  FEWER,
  check_batch,
  make_mesh,
  place,
  replicated,
  split_batch,
  split_state,
)


@pytest.mark.parametrize(
  ('data', 'fsdp', 'shape'),
  [(0, 1, (8, 1)), (1, 1, (1, 1)), (3, 1, (3, 1)), (0, 4, (2, 4)), (1, 4, (1, 4)), (0, 8, (1, 8))],
)
def test_the_mesh_has_the_devices_asked_for(data, fsdp, shape):
  mesh = make_mesh(data, fsdp)
  assert tuple(mesh.shape.items()) == (('data', shape[0]), ('fsdp', shape[1]))
  assert list(mesh.devices.flat) == jax.devices()[: shape[0] * shape[1]]
  assert mesh.axis_types == (AxisType.Auto,) * 2


@pytest.mark.parametrize(
  ('data', 'fsdp', 'message'),
  [
    (9, 1, 'mesh.data=9: there are 8 devices'),
    (3, 4, 'mesh.data=3 x mesh.fsdp=4: there are 8 devices'),
    (0, 3, 'mesh.fsdp=3 does not divide the 8 devices'),
  ],
)
def test_devices_that_are_not_there_are_the_users_error(data, fsdp, message):
  with pytest.raises(UserError) as error:
    make_mesh(data, fsdp)
  assert str(error.value) == message


def test_several_processes_use_all_devices(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(UserError, match='mesh.data=4: 4 of 8 devices; several processes use all'):
    make_mesh(4)


@pytest.mark.parametrize(
  ('shape', 'spec'),
  [
    ((64, 256), (None, 'fsdp')),
    ((256, 64), ('fsdp',)),
    ((257, 64), (None, 'fsdp')),  # of the axes that 4 divides
    ((257, 65), ()),
    ((127, 128), ()),  # small
    ((2**14,), ('fsdp',)),
    ((), ()),
  ],
)
def test_the_largest_axis_that_divides_is_split(shape, spec):
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  (sharding,) = split_state(make_mesh(2, 4), [x])
  assert sharding.spec == jax.P(*spec)
  assert split_state(make_mesh(8), x).spec == jax.P()


def test_a_batch_is_split_over_both_axes():
  mesh = make_mesh(2, 4)
  images = place(np.arange(24.0).reshape(8, 3), split_batch(mesh))
  assert [float(s.data[0, 0]) for s in images.addressable_shards] == list(range(0, 24, 3))


def test_what_is_placed_is_there_under_its_sharding():
  mesh = make_mesh(2, 4)
  tree = {'a': np.arange(2**14), 'b': jnp.ones(3), 'c': np.float32(2)}
  placed = place(tree, split_state(mesh, tree))
  assert [s.data.shape for s in placed['a'].addressable_shards] == [(2**12,)] * 8
  assert placed['b'].sharding == replicated(mesh)
  for name, x in tree.items():
    np.testing.assert_array_equal(placed[name], x)
    assert placed[name].dtype == jnp.asarray(x).dtype


def test_what_is_there_already_is_copied_where_it_is(monkeypatch):
  spread = split_batch(make_mesh(4))
  there = jax.device_put(np.arange(8.0), spread)
  monkeypatch.delattr(jax, 'make_array_from_callback')  # of several processes none has it whole
  placed = place({'a': there}, {'a': spread})['a']
  assert placed.sharding == spread
  before = {shard.data.unsafe_buffer_pointer() for shard in there.addressable_shards}
  assert not before & {shard.data.unsafe_buffer_pointer() for shard in placed.addressable_shards}


def test_a_batch_is_split_and_parameters_are_whole():
  mesh = make_mesh(4)
  images = jax.device_put(jnp.arange(24.0).reshape(8, 3), split_batch(mesh))
  assert [s.data.shape for s in images.addressable_shards] == [(2, 3)] * 4
  assert [float(s.data[0, 0]) for s in images.addressable_shards] == [0, 6, 12, 18]
  kernel = jax.device_put(jnp.zeros((8, 3)), replicated(mesh))
  assert [s.data.shape for s in kernel.addressable_shards] == [(8, 3)] * 4
  assert kernel.is_fully_replicated and not images.is_fully_replicated


def test_a_batch_that_the_devices_divide_passes():
  check_batch('batch_size', 16, make_mesh(8))
  check_batch('batch_size', 5, make_mesh(1))


@pytest.mark.parametrize(
  ('batch_size', 'devices', 'near'), [(20, 8, '16 or 24'), (7, 3, '6 or 9'), (5, 8, '8')]
)
def test_a_batch_that_they_do_not_divide_is_the_users_error(batch_size, devices, near):
  with pytest.raises(UserError) as error:
    check_batch('eval.batch_size', batch_size, make_mesh(devices), FEWER)
  assert str(error.value) == (
    f'eval.batch_size={batch_size} does not divide over {devices} devices: {near} would, '
    'or fewer devices with --config.mesh.data=N'
  )
