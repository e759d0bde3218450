"""What a run computes on, and a warning when it is less than the machine has."""

import glob
import importlib.metadata
import platform

import jax

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def describe() -> dict:
  """Returns the versions and devices that a run's results were computed with."""
  return {
    'python': platform.python_version(),
    'machine': platform.machine(),
    'platform': jax.default_backend(),
    'devices': [d.device_kind for d in jax.devices()],
    'versions': {name: importlib.metadata.version(name) for name in _PACKAGES},
  }


def unused_accelerator() -> str:
  """Returns what to say when the machine has a GPU or TPU that jax does not see; else ''."""
  if jax.default_backend() != 'cpu':
    return ''
  for kind, pattern, requirements in (
    ('an NVIDIA GPU', '/dev/nvidia[0-9]*', 'requirements-cuda.txt'),
    ('a TPU', '/dev/accel[0-9]*', 'requirements-tpu.txt'),
  ):
    if glob.glob(pattern):
      return (
        f'WARNING: this machine has {kind}, but the installed jax computes on the CPU: '
        f'pip install -r {requirements}'
      )
  return ''
