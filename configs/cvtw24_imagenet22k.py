"""CvT-W24 on ImageNet-22k, 224x224: pretraining, by a recipe of ours.

  python train.py --config=configs/cvtw24_imagenet22k.py --config.source=folder:DIR
  python train.py --config=configs/cvtw24_imagenet22k.py --config.source=tfds:NAME

DIR/CLASS/image, or a TFDS data set in ArrayRecord form; its classes define the head. The paper
pretrains CvT-W24 so, and fine-tunes (configs/finetune.py) to 87.7 % on ImageNet-1k at 384, without
saying for how long or at which rate. Not run here: 90 epochs of 14.2 million images take 4.67e20
floating-point operations, 3,338 chip-hours of TPU v5e by the prediction in
benchmarks/results/scale.md.
"""

from cvt_flax.training.recipes import imagenet22k


def get_config():
  config = imagenet22k()
  config.name = 'cvtw24_imagenet22k'
  config.model.name = 'cvt-w24'
  config.model.bn_group_size = 128
  config.optimizer.weight_decay = 0.1
  return config
