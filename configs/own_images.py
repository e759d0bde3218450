"""CvT-13 on your own images, 224x224, from scratch.

  python train.py --config=configs/own_images.py --config.source=folder:DIR

DIR/CLASS/image.jpg, or DIR/train/CLASS/image.jpg with DIR/val and DIR/test. Without DIR/val a tenth
of train is held out for validation.
"""

from cvt_flax.training.config import get_config as defaults


def get_config():
  config = defaults()
  config.name = 'own_images'
  config.image_size = 224
  config.crop_ratio = 0.875
  config.batch_size = 64
  config.epochs = 30
  config.learning_rate = 5e-4
  config.optimizer.warmup_epochs = 2
  config.optimizer.clip_norm = 1.0
  config.augment.crop_padding = 16
  config.augment.flip = True
  config.augment.trivial_augment = True
  config.augment.label_smoothing = 0.1
  return config
