"""What experiments share: training on ImageNet, the paper's fine-tuning, CIFAR, transfer.

Files in configs/ start from one of these and say what is theirs. Sources are the code and the
experiments/imagenet/cvt/*.yaml of github.com/microsoft/CvT at f851e68, and the paper
(https://arxiv.org/abs/2103.15808), section 4.1; what neither says is marked as ours.
"""

import ml_collections

from cvt_flax.training.config import get_config


def imagenet() -> ml_collections.ConfigDict:
  """Returns what all of the authors' experiments on ImageNet-1k share, at 224x224.

  Their rate is 2.5e-4 for each of 8 GPUs with 256 images, or 1.25e-4 for each of 16 with 128: 0.002
  at 2,048 images a step. It scales with the number of GPUs there, whatever each of them holds; here
  with the images of a step. The paper's text has 0.02.
  """
  config = get_config()
  config.source = 'tfds:imagenet2012'
  config.engine = 'stream'
  config.image_size = 224
  config.crop_ratio = 0.875
  config.batch_size = 2048
  config.epochs = 300
  config.learning_rate = 0.002
  config.model.dtype = 'bfloat16'  # theirs is float16 with a scaled loss
  config.optimizer.reference_batch = 2048
  config.optimizer.schedule_per = 'epoch'
  config.optimizer.warmup_epochs = 5
  config.optimizer.warmup_learning_rate = 1e-6
  config.optimizer.min_learning_rate = 1e-5
  config.augment.crop_scale = (0.08, 1.0)
  config.augment.flip = True
  config.augment.rand_augment = 'rand-m9-mstd0.5-inc1'
  config.augment.erase_prob = 0.25
  config.augment.mixup = 0.8
  config.augment.cutmix = 1.0
  config.augment.label_smoothing = 0.1
  return config


def imagenet_384() -> ml_collections.ConfigDict:
  """Returns what their experiments at 384x384 share: evaluation squashes and cuts nothing."""
  config = imagenet()
  config.image_size = 384
  config.crop_ratio = 0.0
  return config


def imagenet22k() -> ml_collections.ConfigDict:
  """Returns pretraining on ImageNet-22k at 224x224, of which nothing is published but that it is.

  Ours: the recipe of ImageNet-1k for 90 epochs, which is what ViT
  (https://arxiv.org/abs/2010.11929) and Swin (https://arxiv.org/abs/2103.14030) take there. The
  classes are those of the source, which has to be given; of its training images 5,000 are held out.
  """
  config = imagenet()
  config.source = ''
  config.epochs = 90
  return config


def fine_tuning(steps: int) -> ml_collections.ConfigDict:
  """Returns the paper's fine-tuning: SGD with momentum 0.9, 512 images a step, 384x384.

  The paper has these and the number of steps. The learning rate is not published: 0.003, the
  FINETUNE.BASE_LR which the authors' lib/config/default.py declares and no code reads. Cosine and
  clipping are ViT's fine-tuning, which the paper says it follows. The images are squashed to 416
  and cut at random, as the FINETUNE branch of the authors' transforms does. The rest is ours.

  Args:
    steps: how many.
  """
  config = get_config()
  config.engine = 'stream'
  config.image_size = 384
  config.crop_ratio = 0.0
  config.batch_size = 512
  config.steps = steps
  config.learning_rate = 0.003
  config.model.dtype = 'bfloat16'
  config.model.bn_group_size = 64
  config.optimizer.name = 'sgd'
  config.optimizer.weight_decay = 0.0
  config.optimizer.clip_norm = 1.0
  config.augment.crop_margin = 32
  config.augment.interpolation = 'bilinear'
  config.augment.flip = True
  return config


def cifar(name: str) -> ml_collections.ConfigDict:
  """Returns 'cifar10' or 'cifar100' at 32x32, normalised by the pixels of its training images."""
  config = get_config()
  config.source = f'tfds:{name}'
  config.image_size = 32
  config.mean, config.std = {
    'cifar10': ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    'cifar100': ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
  }[name]
  config.augment.crop_padding = 4
  config.augment.flip = True
  config.augment.label_smoothing = 0.1
  return config


def nano(name: str, epochs: int) -> ml_collections.ConfigDict:
  """Returns so many epochs of cvt-nano on 'cifar10' or 'cifar100'. Ours, chosen without trials."""
  config = cifar(name)
  config.batch_size = 128
  config.epochs = epochs
  config.learning_rate = 2e-3
  config.model.name = 'cvt-nano'
  config.optimizer.warmup_epochs = 1
  config.optimizer.min_learning_rate = 1e-5
  config.optimizer.clip_norm = 1.0
  config.optimizer.ema_decay = 0.998
  return config


def compact_vit(name: str, model: str) -> ml_collections.ConfigDict:
  """Returns 100 epochs of 'cvit' or 'mcvit' on 'cifar10' or 'cifar100'.

  Batches and epochs are those of github.com/tintn/vision-transformer-from-scratch; the rest is
  ours. A network this small underfits, so there is little regularisation. Of the rates 3e-3 and
  8e-3, tried for 12 epochs with mcvit on 'cifar10', the second was ahead, 65.9 to 61.1 % of
  the validation images.
  """
  config = cifar(name)
  config.batch_size = 256
  config.epochs = 100
  config.learning_rate = 8e-3
  config.model.name = model
  config.optimizer.weight_decay = 0.02
  config.optimizer.warmup_epochs = 5
  config.optimizer.min_learning_rate = 1e-5
  config.optimizer.clip_norm = 1.0
  config.optimizer.ema_decay = 0.998
  config.augment.label_smoothing = 0.05
  return config


def small_images(name: str) -> ml_collections.ConfigDict:
  """Returns 300 epochs of cvt-small on 'cifar10' or 'cifar100', strongly augmented. All of it ours.

  For comparison, the recipe of CCT-7/3x1 (https://github.com/SHI-Labs/Compact-Transformers,
  configs/pretrained/cct_7-3x1_cifar10_300epochs.yml) has AdamW at 5.5e-4 for 128 images, decay
  0.06, RandAugment, Mixup 0.8 up to epoch 175 and CutMix 1.0.
  """
  config = cifar(name)
  config.batch_size = 128
  config.epochs = 300
  config.learning_rate = 1e-3
  config.model.name = 'cvt-small'
  config.model.dtype = 'bfloat16'
  config.optimizer.weight_decay = 0.06
  config.optimizer.warmup_epochs = 10
  config.optimizer.min_learning_rate = 1e-5
  config.optimizer.clip_norm = 1.0
  config.optimizer.ema_decay = 0.9995
  config.augment.trivial_augment = True
  config.augment.mixup = 0.8
  config.augment.cutmix = 1.0
  config.eval.every_epochs = 5
  return config


def transfer(frozen: bool) -> ml_collections.ConfigDict:
  """Returns training of a new head on weights: SGD with momentum 0.9 and a cosine, at 224x224.

  All numbers are ours, chosen without trials. Without weight decay a head that is trained alone is
  logistic regression on the features of the backbone.

  Args:
    frozen: whether the head alone is trained.
  """
  config = get_config()
  config.engine = 'stream'
  config.init_from = 'runs/cvt13_imagenet-seed0'
  config.image_size = 224
  config.crop_ratio = 0.875
  config.batch_size = 64
  config.epochs = 20
  config.optimizer.name = 'sgd'
  config.optimizer.weight_decay = 0.0
  config.augment.crop_scale = (0.25, 1.0)
  config.augment.flip = True
  if frozen:
    config.learning_rate = 0.1
    config.optimizer.freeze = 'backbone'
  else:
    config.learning_rate = 0.01
    config.optimizer.warmup_epochs = 1
    config.optimizer.clip_norm = 1.0
  return config
