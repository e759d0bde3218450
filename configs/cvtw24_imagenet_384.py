"""CvT-W24 on ImageNet-1k, 384x384, from scratch: the authors' yaml.

  python train.py --config=configs/cvtw24_imagenet_384.py --config.data_dir=DIR

This is experiments/imagenet/cvt/cvt-w24-384x384.yaml, which trains 300 epochs at 384 from scratch.
The paper's 87.7 % for this model come from fine-tuning after pretraining on ImageNet-22k:
configs/finetune.py:imagenet. No accuracy is known of this recipe. It has not been run here: it
takes 4.48e20 floating-point operations, 2,364 chip-hours of TPU v5e by the prediction in
benchmarks/results/scale.md. The authors have 16 GPUs with 128 images each.
"""

from cvt_flax.training.recipes import imagenet_384


def get_config():
  config = imagenet_384()
  config.name = 'cvtw24_imagenet_384'
  config.model.name = 'cvt-w24'
  config.model.bn_group_size = 128
  config.optimizer.weight_decay = 0.1
  return config
