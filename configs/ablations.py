"""The paper's ablations (its tables 5 to 8, made on ImageNet), on CIFAR-10 in small.

  python train.py --config=configs/ablations.py:base --config.seeds=3
  python train.py --config=configs/ablations.py:linear --config.seeds=3
  python -m cvt_flax.report runs/ablations_base runs/ablations_linear

The base is cvt-nano, for ten epochs. A variant differs from it in one thing:

  base             depthwise convolutions before queries, keys and values; kv stride 2; no position
                   embedding
  avg              average pooling of keys and values in place of the convolutions
  linear           neither: linear projections alone, of keys and values of the full map
  stride1          keys and values of the full map, by convolutions
  patches          embeddings whose patches do not overlap
  position         a learnt position embedding in every stage
  position_first   one in the first stage alone
  position_linear  linear and position: how far a position embedding makes up for convolutions
"""

from cvt_flax.errors import UserError
from cvt_flax.training.recipes import nano


def get_config(variant='base'):
  config = nano('cifar10', 10)
  config.name = f'ablations_{variant}'
  maps = (16, 8, 8)
  match variant:
    case 'base':
      pass
    case 'avg':
      config.model.projection = 'avg'
    case 'linear':
      config.model.projection = 'linear'
    case 'stride1':
      config.model.kv_strides = (1, 1, 1)
    case 'patches':
      config.model.patch_sizes = (2, 2, 1)
      config.model.patch_paddings = (0, 0, 0)
    case 'position':
      config.model.pos_embed = maps
    case 'position_first':
      config.model.pos_embed = (maps[0], 0, 0)
    case 'position_linear':
      config.model.projection = 'linear'
      config.model.pos_embed = maps
    case _:
      raise UserError(
        f'ablations.py:{variant}: the variants are base, avg, linear, stride1, patches, position, '
        'position_first and position_linear'
      )
  return config
