"""CvT-13 from weights to Food-11, at 224x224: all of it, or a new head alone.

  python train.py --config=configs/transfer_food11.py --config.init_from=WEIGHTS
  python train.py --config=configs/transfer_food11.py:frozen --config.init_from=WEIGHTS

Food-11 is eleven kinds of food (https://www.epfl.ch/labs/mmspg/downloads/food-image-datasets/), in
folders food11/training/CLASS, food11/validation/CLASS and food11/evaluation/CLASS; elsewhere it is
--config.source=folder:DIR. These three splits are used as they are: evaluation is the test split.
The archive has no folders of classes, but names, CLASS_NUMBER.jpg: --config.source=csv:FILE takes a
list of them, with the columns path, label and split.

WEIGHTS and the variants, full and frozen, are those of configs/transfer_folder.py. Not run here.
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
      raise UserError(f'transfer_food11.py:{variant}: one of full and frozen is needed')
  config.name = f'transfer_food11_{variant}'
  config.source = 'folder:food11'
  config.model.name = 'cvt-13'
  return config
