"""Numbers of a report, against what can be worked out by hand."""

import numpy as np
import pytest

from cvt_flax.report import statistics
from cvt_flax.report.predictions import Predictions


def made(label, prediction, probability=None, index=None, split='test'):
  label, prediction = np.asarray(label), np.asarray(prediction)
  p = np.full(len(label), 0.9) if probability is None else np.asarray(probability)
  index = np.arange(len(label)) if index is None else np.asarray(index)
  return Predictions(split, 1, index, label, prediction, p, 1 - p)


def test_mean_and_deviation():
  assert statistics.mean_and_deviation([1.0, 2.0, 6.0]) == (3.0, pytest.approx(7**0.5))
  assert statistics.mean_and_deviation([2.0]) == (2.0, None)


def test_paired_t_is_over_the_seeds_that_both_have():
  # Differences 1 and 3: t = 2 / (sqrt(2) / sqrt(2)) = 2 with one degree of freedom, where
  # p = 1 - 2 atan(t) / pi.
  found = statistics.paired_t({0: 1.0, 1: 5.0, 7: 9.0}, {1: 8.0, 0: 2.0, 8: 0.0})
  assert (found.difference, found.n) == (2.0, 2)
  assert found.p == pytest.approx(1 - 2 * np.arctan(2) / np.pi)


@pytest.mark.parametrize('b', [{0: 2.0}, {5: 1.0}], ids=['one', 'none'])
def test_paired_t_needs_two_seeds(b):
  assert statistics.paired_t({0: 1.0, 1: 2.0}, b) is None


def test_paired_t_has_no_p_without_spread():
  found = statistics.paired_t({0: 0.8, 1: 0.81, 2: 0.82}, {0: 0.85, 1: 0.86, 2: 0.87})
  assert found == statistics.PairedT(pytest.approx(0.05), None, 3)


def test_mcnemar_counts_what_only_one_has_right():
  label = [0, 1, 0, 1, 0, 1]
  a = made(label, [0, 1, 0, 1, 1, 0])  # the first four
  b = made(label, [1, 0, 1, 1, 0, 0])  # the fourth and fifth
  found = statistics.mcnemar(a, b)
  assert (found.only_first, found.only_second, found.n) == (3, 1, 6)
  assert found.p == pytest.approx(2 * (1 + 4) / 16)


def test_mcnemar_matches_images_by_index():
  a = made([0, 1, 0], [0, 0, 1], index=[5, 6, 7])
  shuffled = made([0, 0, 1], [1, 0, 0], index=[7, 5, 6])
  found = statistics.mcnemar(a, shuffled)
  assert (found.only_first, found.only_second, found.p, found.n) == (0, 0, 1.0, 3)
  assert statistics.mcnemar(a, made([0, 1, 0], [0, 0, 1])) is None
  assert statistics.mcnemar(a, made([0, 1, 1], [0, 0, 1], index=[5, 6, 7])) is None
  assert statistics.mcnemar(a, made([0, 1, 0], [0, 0, 1], index=[5, 6, 7], split='val')) is None


def test_interval_is_wilsons():
  z, n, p = 1.959964, 20, 0.9
  middle, half = p + z**2 / 2 / n, z * (p * (1 - p) / n + z**2 / 4 / n**2) ** 0.5
  expected = [(middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)]
  assert statistics.interval(18, 20) == pytest.approx(expected, rel=1e-6)


def test_calibration_is_over_bins_that_have_images():
  """Two images at 0.3 of which one is right, two at 0.9 and 0.92, both right, one sure mistake."""
  p = made([0, 0, 1, 1, 0], [0, 1, 1, 1, 1], [0.3, 0.3, 0.9, 0.92, 1.0])
  found = statistics.calibration(p, bins=5)
  np.testing.assert_allclose(found.probability, [0.3, (0.9 + 0.92 + 1.0) / 3])
  np.testing.assert_allclose(found.accuracy, [1 / 2, 2 / 3])
  np.testing.assert_allclose(found.share, [0.4, 0.6])
  assert found.error == pytest.approx(0.4 * 0.2 + 0.6 * (2.82 / 3 - 2 / 3))
  np.testing.assert_allclose(
    np.transpose([found.low, found.high]), [statistics.interval(1, 2), statistics.interval(2, 3)]
  )
  assert statistics.calibration(made([0, 1], [0, 1], [1.0, 1.0])).error == 0
  assert statistics.calibration(made([0, 1], [0, 1], [0.5, np.nan])) is None


def test_calibration_is_told_from_chance():
  """Hits that are drawn by the probabilities, and networks that are surer than they should be."""
  rng = np.random.default_rng(1)
  below = 0
  for _ in range(40):
    sure = rng.uniform(0.2, 1, 400)
    right = rng.random(400) < sure
    found = statistics.calibration(made(np.zeros(400, int), ~right, sure))
    assert 0.02 < found.by_chance < 0.1
    below += found.error <= found.by_chance
    surer = statistics.calibration(made(np.zeros(400, int), ~right, sure**0.5))
    assert surer.error > surer.by_chance
  assert 34 <= below <= 40


def test_confusion_has_right_classes_as_rows():
  p = made([0, 0, 0, 2, 2], [0, 2, 2, 0, 2])
  matrix = statistics.confusion(p, 4)
  expected = np.zeros((4, 4), int)
  expected[0, 0], expected[0, 2], expected[2, 0], expected[2, 2] = 1, 2, 1, 1
  assert np.array_equal(matrix, expected)
  assert statistics.most_confused(p, 10) == [(0, 2, 2), (2, 0, 1)]
  assert statistics.most_confused(p, 1) == [(0, 2, 2)]


def test_worst_mistakes_are_the_surest():
  p = made([0, 0, 1, 1], [1, 0, 0, 0], [0.6, 0.99, 0.9, 0.7])
  assert statistics.worst_mistakes(p, 2).tolist() == [2, 3]
  assert statistics.worst_mistakes(p, 9).tolist() == [2, 3, 0]
