"""cvt-nano on CIFAR-10: 0.4 million parameters, for a CPU.

  python train.py --config=configs/cvt_nano_cifar10.py

The weights `cvt-nano-cifar10` that come along (`cvt_flax.list_pretrained()`) are of this run.
"""

from cvt_flax.training.recipes import cifar


def get_config():
  config = cifar('cifar10')
  config.name = 'cvt_nano_cifar10'
  config.batch_size = 128
  config.epochs = 20
  config.learning_rate = 2e-3
  config.model.name = 'cvt-nano'
  config.optimizer.warmup_epochs = 1
  config.optimizer.min_learning_rate = 1e-5
  config.optimizer.clip_norm = 1.0
  config.optimizer.ema_decay = 0.998
  return config
