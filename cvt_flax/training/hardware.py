"""What a run computes on, and a warning when it is less than the machine has."""

import ctypes
import glob
import importlib.metadata
import platform
import sys

import jax
from jax.sharding import Mesh

# What says that a machine has an accelerator, and the extra that jax takes for it. TPUs up to v4
# are accel, later ones vfio.
_ACCELERATORS = (
  ('an NVIDIA GPU', '/dev/nvidia[0-9]*', 'cuda12'),
  ('a TPU', '/dev/accel[0-9]*', 'tpu'),
  ('a TPU', '/dev/vfio/[0-9]*', 'tpu'),
)
# bfloat16 operations a second of a device's matrix units, dense, by jax's name for it. Google's are
# from https://cloud.google.com/tpu/docs (v4, v5e, v5p, v6e), NVIDIA's from the data sheets.
_MATRIX_RATES = {
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5e': 197e12,
  'TPU v5': 459e12,
  'TPU v5p': 459e12,
  'TPU v6 lite': 918e12,
  'TPU v6e': 918e12,
  'NVIDIA A100-SXM4-40GB': 312e12,
  'NVIDIA A100-SXM4-80GB': 312e12,
  'NVIDIA H100 80GB HBM3': 989e12,
  'NVIDIA H200': 989e12,
}
# mallopt's parameters and values, of glibc's malloc.h: -1 switches trimming off.
_MALLOPT = {'M_MMAP_MAX': (-4, 0), 'M_TRIM_THRESHOLD': (-1, -1), 'M_ARENA_MAX': (-8, 1)}

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def describe(mesh: Mesh) -> dict:
  """Returns the versions and devices that a run's results are computed with."""
  return {
    'python': platform.python_version(),
    'machine': platform.machine(),
    'platform': jax.default_backend(),
    'devices': [d.device_kind for d in mesh.devices.flat],
    'versions': {name: importlib.metadata.version(name) for name in _PACKAGES},
  }


def matrix_rate(device_kind: str) -> float | None:
  """Returns the bfloat16 operations a second that a device can do; None where it is not known."""
  return _MATRIX_RATES.get(device_kind)


def keep_freed_memory() -> None:
  """On Linux without an accelerator, makes malloc keep what is freed; before jax sees its devices.

  XLA on a CPU allocates its buffers anew in every step. By default they go back to the system each
  time, whose pages then have to be cleared again: a good part of a small model's step
  (benchmarks/README.md). It is the whole process that keeps its memory: a program's decision, not a
  library's.
  """
  if sys.platform == 'linux' and not any(glob.glob(path) for _, path, _ in _ACCELERATORS):
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)  # musl has none
    for parameter, value in _MALLOPT.values() if mallopt else ():
      mallopt(parameter, value)


def return_freed_memory() -> None:
  """On Linux, gives back what malloc has kept, which the system then counts as available."""
  if sys.platform == 'linux' and (trim := getattr(ctypes.CDLL(None), 'malloc_trim', None)):
    trim(0)


def announce(mesh: Mesh) -> None:
  """Prints what is computed on, and what is there and left unused."""
  print(f'jax {jax.__version__} on {mesh.size} x {jax.devices()[0].device_kind}')
  if warning := unused_accelerator():
    print(warning)


def unused_accelerator() -> str:
  """Returns what to say when the machine has a GPU or TPU that jax does not see; else ''."""
  if jax.default_backend() != 'cpu':
    return ''
  for kind, path, extra in _ACCELERATORS:
    if glob.glob(path):
      return (
        f'WARNING: this machine has {kind}, but the installed jax computes on the CPU: '
        f'pip install "jax[{extra}]=={jax.__version__}"'
      )
  return ''
