"""CvT-13 on ImageNet-1k, 224x224, from scratch: the authors' recipe.

  python train.py --config=configs/cvt13_imagenet.py --config.data_dir=DIR
  python train.py --config=configs/cvt13_imagenet.py:imagenette --config.source=folder:imagenette2

The paper reports 81.6 % top-1, 86.7 ReaL, 70.4 V2. It has not been run here: 300 epochs take
1.05e19 floating-point operations, 99 chip-hours of TPU v5e by the prediction in
benchmarks/results/scale.md. The authors have 8 GPUs with 256 images each, and so their batch norms
see 256 images.

This is experiments/imagenet/cvt/cvt-13-224x224.yaml. It and the paper differ in the learning rate:
0.002 in effect, 0.02 in the text.

The variant imagenette is ImageNet for everyone: ten of its classes, 9,469 JPEGs to train on and
3,925 to validate with (https://github.com/fastai/imagenette, imagenette2.tgz; tfds:imagenette
prepared by TFDS does as well), the same recipe with 128 images a step.
"""

from cvt_flax.errors import UserError
from cvt_flax.training.recipes import imagenet


def get_config(variant=''):
  config = imagenet()
  config.name = 'cvt13_imagenet'
  config.model.name = 'cvt-13'
  config.model.bn_group_size = 256
  config.optimizer.weight_decay = 0.05
  match variant:
    case '':
      pass
    case 'imagenette':
      config.name = 'cvt13_imagenette'
      config.source = 'tfds:imagenette/full-size-v2'
      config.batch_size = 128
      config.model.bn_group_size = 128
    case _:
      raise UserError(f'cvt13_imagenet.py:{variant}: the one variant is imagenette')
  return config
