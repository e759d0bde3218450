"""What transformers 5.23.0 and vit-pytorch 1.26.11 compute, recorded in golden/.

Run in float32 by PyTorch 2.13.0 on CPU, with the small models of models.py, their weights drawn by
their official names and images drawn as 'images' (tests/models/torch_weights.py): a file holds
results alone. `python -m tests.weights.test_goldens` writes the files, where those are installed.

A file holds logits [1 5], and map0..2, the stage maps [1 h w c].
"""

import pathlib

import numpy as np
import pytest

from cvt_flax.weights.layouts import HUGGING_FACE, VIT_PYTORCH
from tests.models.torch_weights import assert_close, draw, drawn_variables, quick_jit
from tests.weights.models import MODELS

GOLDEN = pathlib.Path(__file__).parent / 'golden'


def images():
  """Returns an image [1 39 34 3]: not square, and maps with odd sides."""
  return draw('images', (1, 3, 39, 34)).transpose(0, 2, 3, 1)


@pytest.mark.parametrize('layout', [HUGGING_FACE, VIT_PYTORCH], ids=lambda layout: layout.name)
def test_logits_and_stage_maps(layout):
  model = MODELS[layout]

  @quick_jit
  def evaluate(variables):
    return model.apply(variables, images()), model.apply(variables, images(), method='stage_maps')

  logits, maps = evaluate(drawn_variables(model))
  with np.load(GOLDEN / f'{layout.name}.npz') as golden:
    assert_close(logits, golden['logits'])
    for s, stage_map in enumerate(maps):
      assert_close(stage_map, golden[f'map{s}'])


def write():
  from cvt_flax.weights.parity import run_torch, torch_model
  from tests.conftest import _import_peer

  _import_peer('vit_pytorch.cvt')
  for layout in (HUGGING_FACE, VIT_PYTORCH):
    model = MODELS[layout]
    module = torch_model(model, drawn_variables(model), layout)
    logits, maps = run_torch(module, layout, images())
    maps = {f'map{s}': stage_map for s, stage_map in enumerate(maps)}
    np.savez_compressed(GOLDEN / f'{layout.name}.npz', logits=logits, **maps)


if __name__ == '__main__':
  write()
