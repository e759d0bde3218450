"""Devices that need not be there: a compiler knows what it compiles for."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re

import jax
from jax.experimental import topologies

from cvt_flax.errors import UserError, nearest
from cvt_flax.training.hardware import matrix_rate


@dataclasses.dataclass(frozen=True)
class _Kind:
  """Of a kind of TPU, by https://cloud.google.com/tpu/docs/v5e and its sisters.

  Attributes:
    memory: bytes of a device that a program may take, as the compiler says when one is too large.
    clock: cycles a second of its matrix units: a chip's bfloat16 rate, by the multiply-adds of its
      units of 128 x 128. None where the two figures do not go together.
  """

  memory: int
  clock: float | None


# The compiler has two devices for a chip of v4, with half of its memory each.
_GIB = 2**30
_KINDS = {
  'v4': _Kind(int(15.25 * _GIB), matrix_rate('TPU v4') / (8 * 2 * 128**2)),
  'v5e': _Kind(int(15.75 * _GIB), matrix_rate('TPU v5e') / (4 * 2 * 128**2)),
  'v5p': _Kind(int(95.74 * _GIB), matrix_rate('TPU v5p') / (8 * 2 * 128**2)),
  'v6e': _Kind(int(31.25 * _GIB), None),
}
# libtpu would ask Google's cloud where it is, and say at length that nobody answers; and it would
# let one process at a time have it, as if that had a TPU.
_NOWHERE = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_MIN_LOG_LEVEL': '3',
  'TPU_STDERR_LOG_LEVEL': '3',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """What a step is compiled for.

  Attributes:
    name: 'v5e:16x16', 'cpu:8' or 'attached'.
    devices: whether they are there or not.
    memory: bytes of each; None where it is not known.
    clock: cycles a second; None where it is not known.
  """

  name: str
  devices: list[jax.Device]
  memory: int | None
  clock: float | None


def find(name: str) -> Topology:
  """Returns a topology.

  Args:
    name: KIND:SHAPE in chips, such as 'v5e:4x4'; '4xv5e:16x16' is four slices of that; 'cpu:8' so
      many CPU devices; '' the devices attached.

  Raises:
    UserError: there is no such topology, or the compiler for it is not installed.
  """
  if not name:
    devices = jax.devices()
    limit = (devices[0].memory_stats() or {}).get('bytes_limit')
    return Topology('attached', devices, None if devices[0].platform == 'cpu' else limit, None)
  kind, _, shape = name.partition(':')
  # Nothing is computed, so no accelerator is needed. Where jax has started this changes nothing.
  jax.config.update('jax_platforms', 'cpu')
  if kind == 'cpu':
    return Topology(name, _cpu(name, shape), None, None)
  slices, kind = re.fullmatch(r'(?:(\d+)x)?(.*)', kind).groups()
  if kind not in _KINDS or not re.fullmatch(r'\d+(x\d+)*', shape):
    hint = '' if kind in _KINDS else nearest(kind, [*_KINDS, 'cpu'])
    raise UserError(
      f'--topology={name}: KIND:SHAPE is needed, such as v5e:4x4, or 4xv5e:16x16 for four slices, '
      f'with a KIND of {", ".join(_KINDS)} or cpu{hint}'
    )
  return Topology(name, _tpu(name, kind, shape, slices), _KINDS[kind].memory, _KINDS[kind].clock)


def _cpu(name, shape):
  if not shape.isdigit() or not int(shape):
    raise UserError(f'--topology={name}: a number of devices is needed, such as cpu:8')
  with contextlib.suppress(RuntimeError):  # jax has started
    jax.config.update('jax_num_cpu_devices', int(shape))
  devices = jax.devices('cpu')
  if len(devices) < int(shape):
    raise UserError(f'--topology={name}: jax has started with {len(devices)} CPU devices')
  return devices[: int(shape)]


def _tpu(name, kind, shape, slices):
  # libtpu takes a host to have four chips; only a slice of a single one is on a smaller host.
  arguments = {'chips_per_host_bounds': (1, 1, 1)} if set(shape.split('x')) == {'1'} else {}
  if slices:
    arguments['num_slices'] = int(slices)
  try:
    with _nowhere():
      return list(
        topologies.get_topology_desc(
          platform='tpu', topology_name=f'{kind}:{shape}', **arguments
        ).devices
      )
  except Exception as e:
    words = ' '.join(str(e).split())
    if 'not installed' in words:
      words = f'the compiler for TPUs is needed: pip install "jax[tpu]=={jax.__version__}"'
    raise UserError(f'--topology={name}: {words}') from e


@contextlib.contextmanager
def _nowhere():
  """Sets what is missing of `_NOWHERE` in the environment, while the block lasts."""
  missing = _NOWHERE.keys() - os.environ.keys()
  os.environ.update({name: _NOWHERE[name] for name in missing})
  try:
    yield
  finally:
    for name in missing:
      del os.environ[name]
