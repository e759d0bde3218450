"""A small CvT on scikit-learn's handwritten digits: a first run, without any download.

  python train.py --config=configs/digits.py

1,257 images to train on, 180 to choose the best checkpoint by, 360 to test. A pixel of the original
8x8 is 4x4 pixels here, so the first embedding has the official 7x7 kernel with stride 4. The mean
over the last map classifies these few images better than a class token does.
"""

import sys

from cvt_flax.training.config import get_config as defaults


def get_config():
  config = defaults()
  config.name = 'digits'
  config.source = 'digits'
  config.image_size = 32
  config.mean, config.std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
  config.batch_size = 64
  config.epochs = 40
  config.learning_rate = 2e-3
  config.model.name = 'cvt-nano'
  config.model.patch_sizes = (7, 3, 3)
  config.model.patch_strides = (4, 2, 1)
  config.model.patch_paddings = (2, 1, 1)
  config.model.kv_strides = (2, 1, 1)
  config.model.cls_token = (False, False, False)
  config.model.pool = 'mean'
  config.optimizer.warmup_epochs = 3
  config.optimizer.ema_decay = 0.98
  config.augment.crop_padding = 4
  config.augment.label_smoothing = 0.1
  config.eval.every_epochs = 10
  config.closing_note = f"""
Next, on 50,000 photographs of 10 kinds (170 MB to download, unless they are there):
  {sys.executable} train.py --config=configs/cvt13_cifar10.py
and on ImageNet, which has to be prepared first (the command says how):
  {sys.executable} train.py --config=configs/cvt13_imagenet.py"""
  return config
