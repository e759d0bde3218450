"""CvT-13 on ImageNet-1k, 224x224: the authors' network and optimizer.

  python train.py --config=configs/cvt13_imagenet.py --config.data_dir=DIR

The numbers are those of the authors' experiments/imagenet/cvt/cvt-13-224x224.yaml and of the code
that reads it (github.com/microsoft/CvT at f851e68). Their learning rate is 2.5e-4 for each of 8
GPUs, 0.002 at 2,048 images a step; their batch norms see the 256 images of a GPU.

Flips, Mixup, CutMix and random erasing are the authors' too. Not here yet are RandomResizedCrop,
RandAugment, and a way to stream images: all of them are kept, decoded, in the memory of every
device, which ImageNet at this size (180 GiB) does not fit. Until then this config is for subsets.
"""

from cvt_flax.training.config import get_config as defaults


def get_config():
  config = defaults()
  config.name = 'cvt13_imagenet'
  config.source = 'tfds:imagenet2012'
  config.image_size = 224
  config.crop_ratio = 0.875
  config.batch_size = 2048
  config.epochs = 300
  config.learning_rate = 0.002
  config.model.name = 'cvt-13'
  config.model.dtype = 'bfloat16'
  config.model.bn_group_size = 256
  config.optimizer.reference_batch = 2048
  config.optimizer.weight_decay = 0.05
  config.optimizer.schedule_per = 'epoch'
  config.optimizer.warmup_epochs = 5
  config.optimizer.warmup_learning_rate = 1e-6
  config.optimizer.min_learning_rate = 1e-5
  config.augment.flip = True
  config.augment.mixup = 0.8
  config.augment.cutmix = 1.0
  config.augment.label_smoothing = 0.1
  config.augment.erase_prob = 0.25
  return config
