"""CCT-7/3x1 on CIFAR-10, for a GPU or TPU.

  python train.py --config=configs/cct7_cifar10.py

github.com/SHI-Labs/Compact-Transformers reports 96.53 % of the test images after 300 epochs of
configs/pretrained/cct_7-3x1_cifar10_300epochs.yml. The rates, the epochs, the batch and the mixing
are of that file; drop path and attention dropout of its src/cct.py. In place of timm's RandAugment
and of crops of 80 to 100 % of the area this has TrivialAugment and a padded crop, which are made on
the device. Mixing does not stop after 175 epochs, and there are no ten epochs more at the lowest
rate. Parameters are not averaged, as theirs are not.
"""

from cvt_flax.training.recipes import cifar


def get_config():
  config = cifar('cifar10')
  config.name = 'cct7_cifar10'
  config.batch_size = 128
  config.epochs = 300
  config.learning_rate = 5.5e-4
  config.model.name = 'cct-7/3x1'
  config.model.dtype = 'bfloat16'  # theirs is mixed precision
  config.model.attn_drop_rate = 0.1
  config.model.drop_path_rate = 0.1
  config.optimizer.weight_decay = 0.06
  config.optimizer.schedule_per = 'epoch'
  config.optimizer.warmup_epochs = 10
  config.optimizer.warmup_learning_rate = 1e-5
  config.optimizer.min_learning_rate = 1e-5
  config.augment.trivial_augment = True
  config.augment.mixup = 0.8
  config.augment.cutmix = 1.0
  return config
