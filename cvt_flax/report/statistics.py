"""What is computed of predictions and of final metrics, for a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import scipy.stats
import sklearn.metrics

from cvt_flax.report.predictions import Predictions

# Of hits, to see what calibration error chance alone makes.
_DRAWS = 200


@dataclasses.dataclass(frozen=True)
class PairedT:
  """A paired t-test over seeds.

  Attributes:
    difference: the mean of the differences.
    p: two-sided; None where all differences are equal, of which the test says nothing.
    n: pairs.
  """

  difference: float
  p: float | None
  n: int


@dataclasses.dataclass(frozen=True)
class McNemar:
  """McNemar's exact test on the same images.

  Attributes:
    only_first, only_second: images that one of the two has right, and the other wrong.
    p: two-sided.
    n: images.
  """

  only_first: int
  only_second: int
  p: float
  n: int


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
  """What the probability of a prediction is worth.

  Attributes:
    probability: float [n], the mean in each bin that has images.
    accuracy: float [n], the share of them that is right.
    low, high: float [n], its 95 % interval, as `interval`.
    share: float [n], of all images.
    error: the expected calibration error, the mean distance of the two over images.
    by_chance: what that is below in 95 % of draws on as many images, if probabilities are right.
  """

  probability: np.ndarray
  accuracy: np.ndarray
  low: np.ndarray
  high: np.ndarray
  share: np.ndarray
  error: float
  by_chance: float


def mean_and_deviation(values: list[float]) -> tuple[float, float | None]:
  """Returns the mean and the standard deviation of a sample (n - 1); None for that of one."""
  return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def paired_t(a: Mapping[int, float], b: Mapping[int, float]) -> PairedT | None:
  """Compares {seed: value} over the seeds that both have.

  Returns:
    The test, whose difference is b - a; None with fewer than two seeds.
  """
  seeds = sorted(a.keys() & b.keys())
  if len(seeds) < 2:
    return None
  found = np.array([b[s] - a[s] for s in seeds])
  same = np.ptp(found) < 1e-12
  p = None if same else float(scipy.stats.ttest_1samp(found, 0.0).pvalue)
  return PairedT(float(np.mean(found)), p, len(seeds))


def mcnemar(a: Predictions, b: Predictions) -> McNemar | None:
  """Compares two runs image by image; None where these are not the same labelled images."""
  orders = [np.argsort(x.index, kind='stable') for x in (a, b)]
  same = a.split == b.split and all(
    np.array_equal(getattr(a, name)[orders[0]], getattr(b, name)[orders[1]])
    for name in ('index', 'label')
  )
  if not same:
    return None
  first, second = a.hits[orders[0]], b.hits[orders[1]]
  only_first, only_second = int(np.sum(first & ~second)), int(np.sum(second & ~first))
  discordant = only_first + only_second
  p = scipy.stats.binomtest(only_first, discordant).pvalue if discordant else 1.0
  return McNemar(only_first, only_second, float(p), len(first))


def interval(hits: int, n: int) -> tuple[float, float]:
  """Returns Wilson's 95 % interval of a share, hits of n."""
  found = scipy.stats.binomtest(hits, n).proportion_ci(0.95, 'wilson')
  return float(found.low), float(found.high)


def calibration(p: Predictions, bins: int = 15) -> Calibration | None:
  """Returns it over bins of equal width, as in https://arxiv.org/abs/1706.04599.

  None where a probability is not finite.
  """
  if not np.isfinite(p.probability).all():
    return None
  places = np.minimum((p.probability * bins).astype(int), bins - 1)
  _, places = np.unique(places, return_inverse=True)  # of bins with images alone
  images = np.bincount(places)
  probability, hits = np.bincount(places, p.probability) / images, np.bincount(places, p.hits)
  low, high = np.transpose([interval(*pair) for pair in zip(hits.astype(int), images, strict=True)])

  def error(hits):
    return float(np.sum(abs(hits - images * probability)) / len(p))

  rng = np.random.default_rng(0)
  drawn = [error(np.bincount(places, rng.random(len(p)) < p.probability)) for _ in range(_DRAWS)]
  return Calibration(
    probability, hits / images, low, high, images / len(p), error(hits), np.quantile(drawn, 0.95)
  )


def confusion(p: Predictions, classes: int) -> np.ndarray:
  """Returns int [classes, classes]: images of each true class (rows) by their prediction."""
  return sklearn.metrics.confusion_matrix(p.label, p.prediction, labels=range(classes))


def most_confused(p: Predictions, count: int) -> list[tuple[int, int, int]]:
  """Returns the most frequent mistakes as (true class, prediction, images), most first."""
  wrong = np.stack([p.label, p.prediction], axis=1)[~p.hits]
  pairs, images = np.unique(wrong, axis=0, return_counts=True)
  order = np.argsort(-images, kind='stable')[:count]
  return [(*pairs[i].tolist(), int(images[i])) for i in order]


def worst_mistakes(p: Predictions, count: int) -> np.ndarray:
  """Returns where in `p` the mistakes are that were made with the highest probability."""
  wrong = np.flatnonzero(~p.hits)
  return wrong[np.argsort(-p.probability[wrong], kind='stable')[:count]]
