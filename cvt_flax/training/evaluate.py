"""Exact metrics over a split: every image once."""

from collections.abc import Callable, Iterable

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from clu import metrics

from cvt_flax.ops.pixels import normalize_pixels


@flax.struct.dataclass
class PerClass(metrics.Metric):
  """The share of hits among the images of every class.

  Attributes:
    hits: int32 [k].
    count: int32 [k].
  """

  hits: jax.Array
  count: jax.Array

  @classmethod
  def from_model_output(cls, correct, labels, mask, num_classes, **_):
    member = jax.nn.one_hot(labels, num_classes, dtype=jnp.int32) * mask[:, None].astype(jnp.int32)
    return cls(hits=jnp.sum(member * correct[:, None], 0), count=jnp.sum(member, 0))

  def merge(self, other):
    return PerClass(self.hits + other.hits, self.count + other.count)

  def compute(self):
    """Returns [k] shares; NaN for a class without images."""
    return self.hits / self.count


@flax.struct.dataclass
class EvalMetrics(metrics.Collection):
  """Means over images, in which padding does not count."""

  loss: metrics.Average.from_output('loss')
  top1: metrics.Average.from_output('top1')
  top5: metrics.Average.from_output('top5')
  per_class: PerClass


def make_eval_step(
  model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[dict, dict], EvalMetrics]:
  """Returns eval_step(variables, batch) -> EvalMetrics of that batch.

  The batch holds 'image' uint8 [b h w 3], 'label' int32 [b] and 'mask' float32 [b], 0 for padding.
  With fewer than five classes top-5 is over all of them.
  """

  def eval_step(variables, batch):
    logits = model.apply(variables, normalize_pixels(batch['image'], mean, std))
    labels = batch['label']
    top = jax.lax.top_k(logits, min(5, model.num_classes))[1] == labels[:, None]
    return EvalMetrics.single_from_model_output(
      loss=optax.softmax_cross_entropy_with_integer_labels(logits, labels),
      top1=top[:, 0],
      top5=jnp.any(top, axis=1),
      correct=top[:, 0],
      labels=labels,
      mask=batch['mask'],
      num_classes=model.num_classes,
    )

  return eval_step


def evaluate(batch_metrics: Iterable[EvalMetrics]) -> dict:
  """Returns {'loss', 'top1', 'top5', 'images', 'per_class'} over all batches.

  Fractions are from 0 to 1; 'images' is how many were counted, 'per_class' a list with one share a
  class, None for a class without images. Without a batch the result is {}.
  """
  total = None
  for metrics_of_batch in batch_metrics:
    total = metrics_of_batch if total is None else _merge(total, metrics_of_batch)
  if total is None:
    return {}
  total = jax.device_get(total)
  counts = total.per_class.count
  return {
    'loss': float(total.loss.total / total.loss.count),
    'top1': float(total.top1.total / total.top1.count),
    'top5': float(total.top5.total / total.top5.count),
    'images': int(counts.sum()),
    'per_class': [
      float(h / n) if n else None for h, n in zip(total.per_class.hits, counts, strict=True)
    ],
  }


@jax.jit
def _merge(a, b):
  return a.merge(b)
