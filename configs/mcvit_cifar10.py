"""mc-ViT on CIFAR-10: a ViT of 0.12 million parameters with sequence pooling, for a CPU.

  python train.py --config=configs/mcvit_cifar10.py

The network is that of github.com/francischen0724
(Image-classification-by-CVT-based-on-Vit-from-scratch-draft), which reports 77.25 % of the test
images after 100 epochs: AdamW at a constant 0.01, weight decay 0.01, batches of 256, flips and
random crops, and the test images scored after every epoch. Here the rate warms up and falls with a
cosine, the parameters are averaged, and held-out training images choose the checkpoint that the
test images are scored with. A network this small underfits, so there is little regularisation.
"""

from cvt_flax.training.config import get_config as defaults


def get_config():
  config = defaults()
  config.name = 'mcvit_cifar10'
  config.source = 'tfds:cifar10'
  config.image_size = 32
  # Of the 50,000 training images.
  config.mean, config.std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
  config.batch_size = 256
  config.epochs = 100
  config.learning_rate = 3e-3
  config.model.name = 'mcvit'
  config.optimizer.weight_decay = 0.02
  config.optimizer.warmup_epochs = 5
  config.optimizer.min_learning_rate = 1e-5
  config.optimizer.clip_norm = 1.0
  config.optimizer.ema_decay = 0.998
  config.augment.crop_padding = 4
  config.augment.flip = True
  config.augment.label_smoothing = 0.05
  return config
