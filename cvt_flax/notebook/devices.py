"""What jax computes on, in words, and in which precision it is best done."""

from collections import Counter

import jax

from cvt_flax.data import machine
from cvt_flax.training.hardware import unused_accelerator

# Compute capability; CUDA C++ Programming Guide, throughput of native arithmetic instructions.
_BFLOAT16_FROM = 8


def describe_devices() -> str:
  """Returns what jax computes on, and what to expect of it."""
  devices = jax.devices()
  kinds = ', '.join(f'{n} x {kind}' for kind, n in Counter(d.device_kind for d in devices).items())
  if devices[0].platform != 'cpu':
    return (
      f'jax {jax.__version__} computes on {kinds}, in {compute_dtype()}. What is trained below has '
      'a size for it.'
    )
  lines = [
    f'jax {jax.__version__} computes on the CPU, {machine.cores()} cores. All below works, with a '
    'smaller network to train.'
  ]
  lines.append(unused_accelerator() or 'On Colab: Runtime > Change runtime type > a TPU or a GPU.')
  return '\n'.join(lines)


def compute_dtype() -> str:
  """Returns the `model.dtype` that suits the devices.

  'bfloat16' for TPUs and for NVIDIA GPUs that have its arithmetic, from compute capability 8.0 on
  (Colab's T4 has 7.5); 'float32' for others and for CPUs.
  """
  device = jax.devices()[0]
  match device.platform:
    case 'tpu':
      return 'bfloat16'
    case 'gpu':
      major = str(getattr(device, 'compute_capability', '')).partition('.')[0]
      return 'bfloat16' if major.isdigit() and int(major) >= _BFLOAT16_FROM else 'float32'
    case _:
      return 'float32'
