"""mc-ViT on CIFAR-10: a ViT of 0.12 million parameters with sequence pooling, for a CPU.

  python train.py --config=configs/mcvit_cifar10.py

The network is that of github.com/francischen0724
(Image-classification-by-CVT-based-on-Vit-from-scratch-draft), which reports 77.25 % of the test
images after 100 epochs: AdamW at a constant 0.01, weight decay 0.01, batches of 256, flips and
random crops, and the test images scored after every epoch. Here the rate warms up and falls with a
cosine, the parameters are averaged, and held-out training images choose the checkpoint that the
test images are scored with. A network this small underfits, so there is little regularisation.

On a GPU an epoch may be over before its checkpoint is written: --config.eval.every_epochs=5.
"""

from cvt_flax.training.recipes import compact_vit


def get_config():
  config = compact_vit('cifar10', 'mcvit')
  config.name = 'mcvit_cifar10'
  return config
