"""mc-ViT on CIFAR-100, with the recipe of mcvit_cifar10.py.

  python train.py --config=configs/mcvit_cifar100.py

github.com/francischen0724 (Image-classification-by-CVT-based-on-Vit-from-scratch-draft) reports
47.21 % of the test images after 100 epochs.
"""

from cvt_flax.training.recipes import compact_vit


def get_config():
  config = compact_vit('cifar100', 'mcvit')
  config.name = 'mcvit_cifar100'
  return config
