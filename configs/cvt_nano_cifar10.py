"""cvt-nano on CIFAR-10: 0.4 million parameters, for a CPU.

  python train.py --config=configs/cvt_nano_cifar10.py

The weights `cvt-nano-cifar10` that come along (`cvt_flax.list_pretrained()`) are of this run.
"""

from cvt_flax.training.recipes import nano


def get_config():
  config = nano('cifar10', 20)
  config.name = 'cvt_nano_cifar10'
  return config
