"""The tiny run of tests/training, and run folders that nobody trained."""

import json

import numpy as np
import pytest

from cvt_flax.report.predictions import Predictions
from cvt_flax.training.config import get_config
from tests.training.conftest import config, config_file, npz, trained  # noqa: F401  (fixtures)

IMAGES = 60


@pytest.fixture
def make_run(tmp_path):
  """make_run('a', seed=1, hits=50) writes a run folder of that name, as a finished run has it."""

  def make(name, seed=0, hits=50, names=('cat', 'dog', 'eel'), finished=True, **changes):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    made = get_config()
    made.update(dict(name='made', source='npz:gone.npz', seed=seed) | changes)
    record = {'config': made.to_dict(), 'class_names': names, 'data': '', 'decoded': ''}
    record['hardware'] = {'devices': ['cpu'], 'versions': {'jax': '0'}}
    (folder / 'experiment.json').write_text(json.dumps(record))
    lines = [{'step': 5, 'epoch': 0.5, 'train/loss': 2.0 - seed / 9, 'train/learning_rate': 0.1}]
    if finished:
      share = hits / IMAGES
      lines += [
        {'step': 10, 'epoch': 1.0, 'val/loss': 1.0, 'val/top1': share, 'val/images': IMAGES},
        {'step': 20, 'epoch': 2.0, 'checkpoint': 10, 'test/top1': share, 'test/images': IMAGES},
      ]
      label = np.arange(IMAGES, dtype=np.int32) % len(names)
      # The first `hits` images are right.
      prediction = np.where(np.arange(IMAGES) < hits, label, (label + 1) % len(names))
      p = np.linspace(0.5, 0.9, IMAGES).astype(np.float32)
      Predictions(
        'test', 10, np.arange(IMAGES, dtype=np.int32), label, prediction.astype(np.int32), p, 1 - p
      ).save(folder / 'predictions.npz')
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return folder

  return make
