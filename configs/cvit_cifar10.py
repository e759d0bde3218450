"""c-ViT on CIFAR-10: a ViT of 0.12 million parameters with a class token, for a CPU.

  python train.py --config=configs/cvit_cifar10.py

The recipe is that of mcvit_cifar10.py, so that the two differ in what the classifier reads alone:
the class token here, the sequence pooling there. The network is that of
github.com/tintn/vision-transformer-from-scratch, which reports 75.5 % of the test images after 100
epochs of its own recipe.
"""

from cvt_flax.training.config import get_config as defaults


def get_config():
  config = defaults()
  config.name = 'cvit_cifar10'
  config.source = 'tfds:cifar10'
  config.image_size = 32
  # Of the 50,000 training images.
  config.mean, config.std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
  config.batch_size = 256
  config.epochs = 100
  config.learning_rate = 3e-3
  config.model.name = 'cvit'
  config.optimizer.weight_decay = 0.02
  config.optimizer.warmup_epochs = 5
  config.optimizer.min_learning_rate = 1e-5
  config.optimizer.clip_norm = 1.0
  config.optimizer.ema_decay = 0.998
  config.augment.crop_padding = 4
  config.augment.flip = True
  config.augment.label_smoothing = 0.05
  return config
