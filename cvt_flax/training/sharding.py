"""The mesh of devices, and which arrays are split over it."""

import collections
import contextlib
from collections.abc import Generator, Iterator

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cvt_flax.errors import UserError


def make_mesh(data: int = 0) -> Mesh:
  """Returns a mesh with one axis, 'data', over the first `data` devices; 0 means all.

  Raises:
    UserError: when there are fewer devices.
  """
  devices = jax.devices()
  if data > len(devices):
    raise UserError(f'mesh.data={data}: there are {len(devices)} devices')
  # Auto: the compiler propagates shardings; the default since jax 0.9, Explicit, refuses to join
  # a replicated class token to a sharded map.
  count = data or len(devices)
  return jax.make_mesh((count,), ('data',), (AxisType.Auto,), devices=devices[:count])


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of what every device holds whole: parameters, the resident data set."""
  return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch: its first axis over the 'data' axis."""
  return NamedSharding(mesh, PartitionSpec('data'))


def check_batch(name: str, batch_size: int, mesh: Mesh) -> None:
  """Raises a UserError when the devices do not divide the batch of the config key `name`."""
  devices = mesh.shape['data']
  if batch_size % devices:
    lower = batch_size // devices * devices
    near = ' or '.join(str(n) for n in (lower, lower + devices) if n)
    raise UserError(
      f'{name}={batch_size} does not divide over {devices} devices: {near} would, '
      'or fewer devices with --config.mesh.data=N'
    )


def prefetch(
  batches: Generator[dict[str, np.ndarray]], mesh: Mesh, ahead: int = 2
) -> Iterator[dict[str, jax.Array]]:
  """Yields batches on the devices; the copies run while earlier batches are computed with.

  Args:
    batches: this process's part of each batch, arrays of equal length; closed in the end.
    mesh: the batch is split over its 'data' axis.
    ahead: how many batches lie on the devices before they are asked for.
  """
  sharding = split_batch(mesh)
  queue = collections.deque()
  with contextlib.closing(batches):
    for batch in batches:
      queue.append(
        {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
      )
      if len(queue) > ahead:
        yield queue.popleft()
    yield from queue
