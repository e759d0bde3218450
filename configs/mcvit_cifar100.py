"""mc-ViT on CIFAR-100, with the recipe of mcvit_cifar10.py.

  python train.py --config=configs/mcvit_cifar100.py

github.com/francischen0724 (Image-classification-by-CVT-based-on-Vit-from-scratch-draft) reports
47.21 % of the test images after 100 epochs.
"""

from cvt_flax.training.config import get_config as defaults


def get_config():
  config = defaults()
  config.name = 'mcvit_cifar100'
  config.source = 'tfds:cifar100'
  config.image_size = 32
  # Of the 50,000 training images.
  config.mean, config.std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
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
