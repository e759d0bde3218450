"""CvT-21 on ImageNet-1k, 384x384, from scratch: the authors' yaml.

  python train.py --config=configs/cvt21_imagenet_384.py --config.data_dir=DIR

This is experiments/imagenet/cvt/cvt-21-384x384.yaml, which trains 300 epochs at 384 from scratch.
The paper's 83.3 % for this model come from fine-tuning: configs/finetune.py:imagenet. No accuracy
is known of this recipe. It has not been run here: it takes 5.73e19 floating-point operations, 507
chip-hours of TPU v5e by the prediction in benchmarks/results/scale.md. The authors have 16 GPUs
with 128 images each.
"""

from cvt_flax.training.recipes import imagenet_384


def get_config():
  config = imagenet_384()
  config.name = 'cvt21_imagenet_384'
  config.model.name = 'cvt-21'
  config.model.bn_group_size = 128
  config.optimizer.weight_decay = 0.1
  return config
