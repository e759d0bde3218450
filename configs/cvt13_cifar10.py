"""CvT-13 on CIFAR-10.

  python train.py --config=configs/cvt13_cifar10.py
  python train.py --config=configs/cvt13_cifar10.py:small_images

As it stands it is CvT-13 with the official geometry, which is made for 224x224 pixels: at 32x32 the
stages have maps of 8x8, 4x4 and 2x2, and the ten blocks of the last one see two keys, the class
token and a single pixel of the key map. It is the row to compare with earlier CvT notebooks, and
the cheap one.

The variant small_images embeds with strides 1, 2, 2, so that the last stage has an 8x8 map and
seventeen keys. It takes fourteen times the multiply-adds: use a GPU or TPU.
"""

from cvt_flax.errors import UserError
from cvt_flax.training.recipes import cifar


def get_config(variant=''):
  config = cifar('cifar10')
  config.name = 'cvt13_cifar10'
  config.batch_size = 64  # ten epochs: what counts is how many steps they have
  config.epochs = 10
  config.learning_rate = 7e-4
  config.model.name = 'cvt-13'
  config.model.drop_path_rates = (0.0, 0.0, 0.0)  # ten epochs are too few to overfit
  config.optimizer.warmup_epochs = 0.5
  config.optimizer.min_learning_rate = 1e-5
  config.optimizer.clip_norm = 1.0
  config.augment.crop_padding = 2
  match variant:
    case '':
      pass
    case 'small_images':
      config.name = 'cvt13_cifar10_small_images'
      config.model.name = 'cvt-13-small-images'
      config.model.dtype = 'bfloat16'
    case _:
      raise UserError(f'cvt13_cifar10.py:{variant}: the one variant is small_images')
  return config
