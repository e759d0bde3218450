"""CvT (https://arxiv.org/abs/2103.15808) in JAX and Flax.

    from cvt_flax import create_model
    model = create_model('cvt-13', num_classes=1000)

The public names are loaded when they are first used: `import cvt_flax` alone imports no library.
"""

import importlib
import sys
import typing

if sys.version_info < (3, 11):  # noqa: UP036  (the one place that tells a person so)
  raise ImportError(f'cvt_flax needs Python 3.11 or newer, this is {sys.version.split()[0]}')

if typing.TYPE_CHECKING:  # what editors and type checkers read
  from cvt_flax.models.attention_maps import attention_maps
  from cvt_flax.models.compact import CompactViT
  from cvt_flax.models.cvt import CvT
  from cvt_flax.models.fold import fold
  from cvt_flax.models.head import replace_head
  from cvt_flax.models.positions import resize_positions
  from cvt_flax.models.zoo import create_model, list_models
  from cvt_flax.predict import predict_images
  from cvt_flax.training.loop import run as train
  from cvt_flax.training.plan import plan
  from cvt_flax.training.predict import predict_dataset
  from cvt_flax.training.shipped import get_config
  from cvt_flax.weights.compiled import compile_predict
  from cvt_flax.weights.conversion import convert_weights
  from cvt_flax.weights.preprocessing import Preprocessing
  from cvt_flax.weights.pretrained import list_pretrained, load_pretrained
  from cvt_flax.weights.pretrained import load as load_weights
  from cvt_flax.weights.saving import save_pretrained

__version__ = '0.1.0.dev0'

# On GitHub. Whoever moves it changes this, and a test names every link that has to follow.
REPOSITORY = 'OWNER/cvt_flax'

__all__ = [
  'CompactViT',
  'CvT',
  'Preprocessing',
  'attention_maps',
  'compile_predict',
  'convert_weights',
  'create_model',
  'fold',
  'get_config',
  'list_models',
  'list_pretrained',
  'load_pretrained',
  'load_weights',
  'plan',
  'predict_dataset',
  'predict_images',
  'replace_head',
  'resize_positions',
  'save_pretrained',
  'train',
]

# Public name -> the module that has it, and its name there.
_PLACES = {
  'CompactViT': ('cvt_flax.models.compact', 'CompactViT'),
  'CvT': ('cvt_flax.models.cvt', 'CvT'),
  'Preprocessing': ('cvt_flax.weights.preprocessing', 'Preprocessing'),
  'attention_maps': ('cvt_flax.models.attention_maps', 'attention_maps'),
  'compile_predict': ('cvt_flax.weights.compiled', 'compile_predict'),
  'convert_weights': ('cvt_flax.weights.conversion', 'convert_weights'),
  'create_model': ('cvt_flax.models.zoo', 'create_model'),
  'fold': ('cvt_flax.models.fold', 'fold'),
  'get_config': ('cvt_flax.training.shipped', 'get_config'),
  'list_models': ('cvt_flax.models.zoo', 'list_models'),
  'list_pretrained': ('cvt_flax.weights.pretrained', 'list_pretrained'),
  'load_pretrained': ('cvt_flax.weights.pretrained', 'load_pretrained'),
  'load_weights': ('cvt_flax.weights.pretrained', 'load'),
  'plan': ('cvt_flax.training.plan', 'plan'),
  'predict_dataset': ('cvt_flax.training.predict', 'predict_dataset'),
  'predict_images': ('cvt_flax.predict', 'predict_images'),
  'replace_head': ('cvt_flax.models.head', 'replace_head'),
  'resize_positions': ('cvt_flax.models.positions', 'resize_positions'),
  'save_pretrained': ('cvt_flax.weights.saving', 'save_pretrained'),
  'train': ('cvt_flax.training.loop', 'run'),
}


def __getattr__(name: str):
  if name not in _PLACES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module, attribute = _PLACES[name]
  value = getattr(importlib.import_module(module), attribute)
  globals()[name] = value  # from now on without this function
  return value


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
