"""The mesh of devices, and which arrays are split over it."""

import collections
import contextlib
import math
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cvt_flax.errors import UserError

_AXES = ('data', 'fsdp')
FEWER = '--config.mesh.data=N'  # the flag of a run for fewer devices
_SMALL = 2**14


def make_mesh(data: int = 0, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns a mesh with the axes 'data' and 'fsdp' over the first data x fsdp devices.

  The batch is split over both, what a training step carries over 'fsdp' alone. The devices of a
  process lie next to each other: it reads one part of every batch.

  Args:
    data: 0 means all devices.
    fsdp: devices that share one copy of parameters, optimizer state and averages.
    devices: to choose from; None means all that there are.

  Raises:
    UserError: there are fewer devices, 'fsdp' does not divide them, or a process would have none.
  """
  devices = sorted(devices or jax.devices(), key=lambda device: device.process_index)
  if len(devices) % fsdp:
    raise UserError(f'mesh.fsdp={fsdp} does not divide the {len(devices)} devices')
  count = (data or len(devices) // fsdp) * fsdp
  if count > len(devices):
    words = f'mesh.data={data}' + (f' x mesh.fsdp={fsdp}' if fsdp > 1 else '')
    raise UserError(f'{words}: there are {len(devices)} devices')
  if jax.process_count() > 1 and count < len(devices):
    raise UserError(
      f'mesh.data={data}: {count} of {len(devices)} devices; several processes use all of them'
    )
  # Auto: the compiler propagates shardings; the default since jax 0.9, Explicit, refuses to join
  # a replicated class token to a sharded map.
  grid = np.array(devices[:count]).reshape(-1, fsdp)
  return Mesh(grid, _AXES, axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of what every device holds whole: the resident data set, metrics."""
  return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch: its first axis over all devices."""
  return NamedSharding(mesh, PartitionSpec(_AXES))


def split_microbatches(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of microbatches, one after another: each of them over all devices."""
  return NamedSharding(mesh, PartitionSpec(None, _AXES))


def split_state(mesh: Mesh, tree: Any) -> Any:
  """Returns the shardings of parameters, optimizer state or averages: over 'fsdp'.

  Of each array its largest axis is split, of those that 'fsdp' divides; arrays of fewer than 2^14
  numbers, and those without such an axis, are replicated.

  Args:
    tree: arrays or jax.ShapeDtypeStructs.
  """
  fsdp = mesh.shape['fsdp']

  def of(x):
    sizes = [(size, axis) for axis, size in enumerate(x.shape) if size % fsdp == 0]
    if fsdp == 1 or x.size < _SMALL or not sizes:
      return replicated(mesh)
    _, axis = max(sizes)
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, 'fsdp'))

  return jax.tree.map(of, tree)


def abstract(shapes: Any, shardings: Any) -> Any:
  """Returns jax.ShapeDtypeStructs with shardings: what a step is compiled, a state restored for."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
  )


def bytes_a_device(tree: Any) -> int:
  """Returns what each device holds of arrays, or of jax.ShapeDtypeStructs with shardings."""
  leaves = jax.tree.leaves(tree)
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def place(tree: Any, sharding: Any) -> Any:
  """Returns arrays that every process has whole, or its part of, as arrays on the devices.

  Args:
    tree: of arrays; each on its own buffers afterwards, so that all can be donated.
    sharding: one, or a tree of them.
  """
  shardings = jax.tree.broadcast(sharding, tree)

  def put(x, s):
    if isinstance(x, jax.Array) and x.sharding == s:
      return jnp.copy(x)  # there already; of several processes none may have it whole
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, s, lambda index: x[index])

  return jax.tree.map(put, tree, shardings)


def check_batch(name: str, batch_size: int, mesh: Mesh, fewer: str = '') -> None:
  """Raises a UserError when the devices do not divide a batch.

  Args:
    name: what the batch size is called.
    batch_size: what it is.
    mesh: the devices.
    fewer: the flag for fewer devices.
  """
  devices = mesh.size
  if batch_size % devices:
    lower = batch_size // devices * devices
    near = ' or '.join(str(n) for n in (lower, lower + devices) if n)
    also = f', or fewer devices with {fewer}' if fewer and jax.process_count() == 1 else ''
    raise UserError(
      f'{name}={batch_size} does not divide over {devices} devices: {near} would{also}'
    )


def prefetch(
  batches: Generator[dict[str, np.ndarray]], mesh: Mesh, ahead: int = 2
) -> Iterator[dict[str, jax.Array]]:
  """Yields batches on the devices; the copies run while earlier batches are computed with.

  Args:
    batches: this process's part of each batch, arrays of equal length; closed in the end.
    mesh: the batch is split over its devices.
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
