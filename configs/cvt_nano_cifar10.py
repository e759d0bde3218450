"""cvt-nano on CIFAR-10: half a million parameters, for a CPU and an afternoon.

  python train.py --config=configs/cvt_nano_cifar10.py
"""

from cvt_flax.training.config import get_config as defaults


def get_config():
  config = defaults()
  config.name = 'cvt_nano_cifar10'
  config.source = 'tfds:cifar10'
  config.image_size = 32
  # Of the 50,000 training images.
  config.mean, config.std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
  config.batch_size = 128
  config.epochs = 20
  config.learning_rate = 2e-3
  config.model.name = 'cvt-nano'
  config.optimizer.warmup_epochs = 1
  config.optimizer.min_learning_rate = 1e-5
  config.optimizer.clip_norm = 1.0
  config.optimizer.ema_decay = 0.998
  config.augment.crop_padding = 4
  config.augment.flip = True
  config.augment.label_smoothing = 0.1
  return config
