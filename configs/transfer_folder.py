r"""CvT-13 from weights to your own classes, at 224x224: all of it, or a new head alone.

  python train.py --config=configs/transfer_folder.py --config.source=folder:DIR \
    --config.init_from=WEIGHTS --config.eval.test_holdout=0.3
  python train.py --config=configs/transfer_folder.py:frozen --config.source=folder:DIR \
    --config.init_from=WEIGHTS --config.eval.test_holdout=0.3

DIR/CLASS/image.jpg, for which eval.test_holdout keeps 30 % to test on; or
DIR/train/CLASS/image.jpg with DIR/val and DIR/test, where it is left out. Without a validation
split a tenth of the rest is held out. WEIGHTS are a .pth file, a folder of weights, hf:NAME or a
run folder; by default those that configs/cvt13_imagenet.py trains. Another network than CvT-13 is
--config.model.name=NAME; one for small images wants --config.image_size=64 as well.

The variants are full, which trains everything, and frozen, which trains the head: the backbone
stays as it is byte for byte, the running statistics of its batch norms included. In between are
--config.optimizer.freeze='stage[01]/.*' and --config.optimizer.layer_decay=0.75.
"""

from cvt_flax.errors import UserError
from cvt_flax.training.recipes import transfer


def get_config(variant='full'):
  match variant:
    case 'full':
      config = transfer(frozen=False)
    case 'frozen':
      config = transfer(frozen=True)
    case _:
      raise UserError(f'transfer_folder.py:{variant}: one of full and frozen is needed')
  config.name = f'transfer_folder_{variant}'
  config.source = ''
  config.model.name = 'cvt-13'
  return config
