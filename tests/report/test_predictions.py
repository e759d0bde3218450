"""predictions.npz is what the run's own last evaluation saw."""

import numpy as np
import pytest

from cvt_flax.errors import UserError
from cvt_flax.report import predictions
from cvt_flax.report.predictions import Predictions


def made(n=5):
  rng = np.random.default_rng(0)
  ints = [rng.integers(0, 3, n, np.int32) for _ in range(3)]
  return Predictions('val', 7, *ints, *rng.random((2, n), np.float32))


def test_they_come_back(tmp_path):
  before = made()
  before.save(tmp_path / 'p.npz')
  after = predictions.read(tmp_path / 'p.npz')
  assert (after.split, after.step, len(after)) == ('val', 7, 5)
  for name in ('index', 'label', 'prediction', 'probability', 'label_probability'):
    a, b = getattr(before, name), getattr(after, name)
    assert a.dtype == b.dtype and np.array_equal(a, b)
  assert [p.name for p in tmp_path.iterdir()] == ['p.npz']


def test_where_there_are_none(tmp_path):
  assert predictions.read(tmp_path / 'p.npz') is None


def test_a_damaged_file_is_told(tmp_path):
  path = tmp_path / 'p.npz'
  made().save(path)
  path.write_bytes(path.read_bytes()[:-30])
  with pytest.raises(UserError, match='p.npz is damaged'):
    predictions.read(path)
  path.write_bytes(b'')
  with pytest.raises(UserError, match='p.npz is damaged'):
    predictions.read(path)
  np.savez(path, split='test', step=1, index=[1])
  with pytest.raises(UserError, match='p.npz is damaged'):
    predictions.read(path)


def test_a_run_writes_those_of_its_test_images(trained, npz):
  _, folder, metrics = trained
  found = predictions.read(folder / 'predictions.npz')
  labels = np.load(npz)['y_test']
  assert found.split == 'test' and found.step == metrics['checkpoint']
  assert np.array_equal(found.index, np.arange(50))  # the last batch is padded
  assert np.array_equal(found.label, labels)
  assert np.mean(found.hits) == pytest.approx(metrics['test/top1'])
  loss = -np.mean(np.log(found.label_probability))
  assert loss == pytest.approx(metrics['test/loss'], rel=1e-4)
  # Two classes: the right one is the prediction, or what is left.
  expected = np.where(found.hits, found.probability, 1 - found.probability)
  np.testing.assert_allclose(found.label_probability, expected, atol=1e-6)
