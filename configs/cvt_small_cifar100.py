"""cvt-small on CIFAR-100 from nothing, for 300 epochs.

  python train.py --config=configs/cvt_small_cifar100.py

4.8 million parameters on 32x32, 16x16 and 8x8 maps, 0.5 billion multiply-adds an image: use a GPU
or TPU. To compare with: CCT-7/3x1, 3.8 million parameters, 80.92 % after 300 epochs
(https://github.com/SHI-Labs/Compact-Transformers).
"""

from cvt_flax.training.recipes import small_images


def get_config():
  config = small_images('cifar100')
  config.name = 'cvt_small_cifar100'
  return config
