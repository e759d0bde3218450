r"""Fine-tuning at 384x384 as the paper does it, on ImageNet-1k, CIFAR-10 and -100, Pets or Flowers.

  python train.py --config=configs/finetune.py:imagenet --config.init_from=WEIGHTS
  python train.py --config=configs/finetune.py:flowers --config.init_from=WEIGHTS \
    --config.model.name=cvt-w24

The variants are imagenet, cifar10, cifar100, pets and flowers. WEIGHTS are a .pth file, a folder of
weights, hf:NAME or a run folder; by default those that configs/cvt13_imagenet22k.py trains. A head
for other classes starts anew. Top-1 in the paper, pretrained on ImageNet-22k:

          ImageNet-1k  CIFAR-10  CIFAR-100   Pets  Flowers
  CvT-13         83.3     98.83      91.11  93.25    99.50
  CvT-21         84.9     99.16      92.88  94.03    99.62
  CvT-W24        87.7     99.39      94.09  94.73    99.72

SGD with momentum 0.9, 512 images a step, and 20,000 steps for ImageNet, 10,000 for CIFAR, 500 for
the others are the paper's. The learning rate is not published: ours is in recipes.fine_tuning, with
where it comes from. It says 384 of ImageNet, and implies it of the others. Not run here: 20,000
steps of CvT-13 take 1.0e18 floating-point operations, 9.5 chip-hours of TPU v5e at the rate that
benchmarks/results/scale.md predicts for cvt13_imagenet_384.
"""

from cvt_flax.errors import UserError
from cvt_flax.training.recipes import fine_tuning


def get_config(variant='imagenet'):
  match variant:
    case 'imagenet':
      source, steps, every_epochs = 'tfds:imagenet2012', 20_000, 1
    case 'cifar10':
      source, steps, every_epochs = 'tfds:cifar10', 10_000, 5
    case 'cifar100':
      source, steps, every_epochs = 'tfds:cifar100', 10_000, 5
    case 'pets':
      source, steps, every_epochs = 'tfds:oxford_iiit_pet', 500, 10
    case 'flowers':
      source, steps, every_epochs = 'tfds:oxford_flowers102', 500, 50
    case _:
      raise UserError(
        f'finetune.py:{variant}: one of imagenet, cifar10, cifar100, pets and flowers is needed'
      )
  config = fine_tuning(steps)
  config.name = f'finetune_{variant}'
  config.source = source
  config.init_from = 'runs/cvt13_imagenet22k-seed0'
  config.model.name = 'cvt-13'
  config.eval.every_epochs = every_epochs
  return config
