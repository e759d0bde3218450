"""CvT on scikit-learn's 8x8 handwritten digits: a first run, without any download.

python train.py --config=configs/digits.py
"""

from cvt_flax.training.config import get_config as defaults


def get_config():
  config = defaults()
  config.name = 'digits'
  config.source = 'digits'
  config.image_size = 32
  config.mean, config.std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
  config.batch_size = 64
  config.epochs = 5
  config.learning_rate = 2e-3
  config.model.name = 'cvt-nano'
  config.optimizer.warmup_epochs = 3
  config.optimizer.ema_decay = 0.98
  config.augment.crop_padding = 4
  config.augment.label_smoothing = 0.1
  config.eval.every_epochs = 5
  return config
