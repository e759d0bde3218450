"""CvT-13 on ImageNet-22k, 224x224: pretraining, by a recipe of ours.

  python train.py --config=configs/cvt13_imagenet22k.py --config.source=folder:DIR
  python train.py --config=configs/cvt13_imagenet22k.py --config.source=tfds:NAME

DIR/CLASS/image, or a TFDS data set in ArrayRecord form; its classes define the head. The paper
pretrains CvT-13 so, and fine-tunes (configs/finetune.py) to 83.3 % on ImageNet-1k at 384, without
saying for how long or at which rate. Not run here: 90 epochs of 14.2 million images take 3.50e19
floating-point operations, 342 chip-hours of TPU v5e by the prediction in
benchmarks/results/scale.md.
"""

from cvt_flax.training.recipes import imagenet22k


def get_config():
  config = imagenet22k()
  config.name = 'cvt13_imagenet22k'
  config.model.name = 'cvt-13'
  config.model.bn_group_size = 256
  config.optimizer.weight_decay = 0.05
  return config
