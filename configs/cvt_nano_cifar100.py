r"""cvt-nano on CIFAR-100: 0.4 million parameters, for a CPU.

  python train.py --config=configs/cvt_nano_cifar100.py

What it trains can be gone on from, on pictures of another folder at 64x64:

  python train.py --config=configs/transfer_folder.py --config.source=folder:DIR \
    --config.init_from=runs/cvt_nano_cifar100-seed0 --config.model.name=cvt-nano \
    --config.image_size=64

The recipe is that of cvt_nano_cifar10.py.
"""

from cvt_flax.training.recipes import nano


def get_config():
  config = nano('cifar100', 20)
  config.name = 'cvt_nano_cifar100'
  return config
