"""The mesh, and batches that it divides."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

from cvt_flax.errors import UserError
from cvt_flax.training.sharding import check_batch, make_mesh, replicated, split_batch


@pytest.mark.parametrize(('data', 'devices'), [(0, 8), (1, 1), (3, 3), (8, 8)])
def test_the_mesh_has_the_devices_asked_for(data, devices):
  mesh = make_mesh(data)
  assert dict(mesh.shape) == {'data': devices}
  assert list(mesh.devices.flat) == jax.devices()[:devices]
  assert mesh.axis_types == (AxisType.Auto,)


def test_more_devices_than_there_are_is_the_users_error():
  with pytest.raises(UserError, match='^mesh.data=9: there are 8 devices'):
    make_mesh(9)


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
    check_batch('eval.batch_size', batch_size, make_mesh(devices))
  assert str(error.value) == (
    f'eval.batch_size={batch_size} does not divide over {devices} devices: {near} would, '
    'or fewer devices with --config.mesh.data=N'
  )
