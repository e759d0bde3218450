r"""CvT-13 on your own images, 224x224, from scratch or from weights.

  python train.py --config=configs/own_images.py --config.source=folder:DIR
  python train.py --config=configs/own_images.py --config.source=csv:FILE
  python train.py --config=configs/own_images.py --config.source=folder:DIR \
    --config.init_from=WEIGHTS --config.learning_rate=1e-4

DIR/CLASS/image.jpg, or DIR/train/CLASS/image.jpg with DIR/val and DIR/test; FILE has lines of
path,label and, if you like, split. Without a validation split a tenth of train is held out.
"""

from cvt_flax.training.config import get_config as defaults


def get_config():
  config = defaults()
  config.name = 'own_images'
  config.engine = 'stream'
  config.image_size = 224
  config.crop_ratio = 0.875
  config.batch_size = 64
  config.epochs = 30
  config.learning_rate = 5e-4
  config.optimizer.warmup_epochs = 2
  config.optimizer.clip_norm = 1.0
  config.augment.crop_scale = (0.25, 1.0)  # ImageNet's 0.08 asks for more epochs
  config.augment.flip = True
  config.augment.rand_augment = 'rand-m9-mstd0.5-inc1'
  config.augment.label_smoothing = 0.1
  return config
