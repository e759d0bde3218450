"""CvT-13 on ImageNet-1k, 384x384, from scratch: the authors' yaml.

  python train.py --config=configs/cvt13_imagenet_384.py --config.data_dir=DIR

This is experiments/imagenet/cvt/cvt-13-384x384.yaml, which trains 300 epochs at 384 from scratch.
The paper's 83.0 % for this model come from fine-tuning: configs/finetune.py:imagenet. No accuracy
is known of this recipe. It has not been run here: it takes 3.75e19 floating-point operations, 358
chip-hours of TPU v5e by the prediction in benchmarks/results/scale.md. The authors have 8 GPUs
with 256 images each.
"""

from cvt_flax.training.recipes import imagenet_384


def get_config():
  config = imagenet_384()
  config.name = 'cvt13_imagenet_384'
  config.model.name = 'cvt-13'
  config.model.bn_group_size = 256
  config.optimizer.weight_decay = 0.05
  return config
