"""c-ViT on CIFAR-10: a ViT of 0.12 million parameters with a class token, for a CPU.

  python train.py --config=configs/cvit_cifar10.py

The recipe is that of mcvit_cifar10.py, so that the two differ in what the classifier reads alone:
the class token here, the sequence pooling there. The network is that of
github.com/tintn/vision-transformer-from-scratch, which reports 75.5 % of the test images after 100
epochs of its own recipe.
"""

from cvt_flax.training.recipes import compact_vit


def get_config():
  config = compact_vit('cifar10', 'cvit')
  config.name = 'cvit_cifar10'
  return config
