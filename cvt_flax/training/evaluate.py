"""Exact metrics over a split: every image once."""

from collections.abc import Callable, Iterable

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import metrics

from cvt_flax.errors import UserError
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


@flax.struct.dataclass
class MultiLabelMetrics(metrics.Collection):
  """Means over the images that have a label at all: an image may have several right classes.

  There is no loss, which takes one label, and no share by class, of which an image has many.
  """

  top1: metrics.Average.from_output('top1')
  top5: metrics.Average.from_output('top5')


def make_eval_step(
  model: nn.Module,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  classes: np.ndarray | None = None,
) -> Callable[[dict, dict], EvalMetrics | MultiLabelMetrics]:
  """Returns eval_step(variables, batch) -> the metrics of that batch.

  The batch holds 'image' uint8 [b h w 3], 'label' int32 [b] and 'mask' float32 [b], 0 for padding.
  With fewer than five classes top-5 is over all of them.

  Where it holds 'labels' too, bool [b k], these are every class that is right for an image. It is
  a hit at five when one of them is among the best five; images without any do not count.

  Args:
    model: whose `num_classes` is k.
    mean, std: of the pixels, 0 to 1, a channel.
    classes: bool [k], the classes that compete; the others are as if the model did not have them.
      None: all. Every label is one that competes.
  """
  forward = make_forward(model, mean, std, classes)

  def eval_step(variables, batch):
    return score(forward(variables, batch), batch)

  return eval_step


def make_forward(
  model: nn.Module,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  classes: np.ndarray | None = None,
) -> Callable[[dict, dict], jax.Array]:
  """Returns forward(variables, batch) -> logits [b k]; the arguments are `make_eval_step`'s."""

  def forward(variables, batch):
    logits = model.apply(variables, normalize_pixels(batch['image'], mean, std))
    return logits if classes is None else jnp.where(classes, logits, -jnp.inf)

  return forward


def score(logits: jax.Array, batch: dict) -> EvalMetrics | MultiLabelMetrics:
  """Returns the metrics of a batch, as `make_eval_step` describes it, by its logits [b k]."""
  num_classes = logits.shape[-1]
  best = jax.lax.top_k(logits, min(5, num_classes))[1]
  if 'labels' in batch:
    hits = jnp.take_along_axis(batch['labels'], best, axis=1)
    return MultiLabelMetrics.single_from_model_output(
      top1=hits[:, 0],
      top5=jnp.any(hits, axis=1),
      mask=batch['mask'] * jnp.any(batch['labels'], axis=1),
    )
  labels = batch['label']
  hits = best == labels[:, None]
  return EvalMetrics.single_from_model_output(
    loss=optax.softmax_cross_entropy_with_integer_labels(logits, labels),
    top1=hits[:, 0],
    top5=jnp.any(hits, axis=1),
    correct=hits[:, 0],
    labels=labels,
    mask=batch['mask'],
    num_classes=num_classes,
  )


def predict(logits: jax.Array, batch: dict) -> dict[str, jax.Array]:
  """Returns the arrays of `report.predictions.Predictions` for a batch, and its 'mask', all [b]."""
  shares = jax.nn.softmax(logits)
  prediction = jax.lax.top_k(logits, 1)[1]  # of equals the first, as in the metrics
  return {
    'index': batch['index'],
    'label': batch['label'],
    'mask': batch['mask'],
    'prediction': prediction[:, 0],
    'probability': jnp.take_along_axis(shares, prediction, axis=1)[:, 0],
    'label_probability': jnp.take_along_axis(shares, batch['label'][:, None], axis=1)[:, 0],
  }


def evaluate(batch_metrics: Iterable[EvalMetrics | MultiLabelMetrics]) -> dict:
  """Returns {'loss', 'top1', 'top5', 'images', 'per_class'} over all batches.

  Fractions are from 0 to 1; 'images' is how many were counted, 'per_class' a list with one share a
  class, None for a class without images. Where images have several labels, 'loss' and 'per_class'
  are left out. Without a batch the result is {}.

  Raises:
    UserError: there are batches, but every image of them is masked.
  """
  total = None
  for metrics_of_batch in batch_metrics:
    total = metrics_of_batch if total is None else _merge(total, metrics_of_batch)
  if total is None:
    return {}
  total = jax.device_get(total)
  if not total.top1.count:
    raise UserError('no image can be scored: none can be read, or none has a label')
  result = {
    'top1': float(total.top1.total / total.top1.count),
    'top5': float(total.top5.total / total.top5.count),
    'images': int(total.top1.count),
  }
  if isinstance(total, MultiLabelMetrics):
    return result
  shares = zip(total.per_class.hits, total.per_class.count, strict=True)
  return {
    'loss': float(total.loss.total / total.loss.count),
    **result,
    'per_class': [float(hits / count) if count else None for hits, count in shares],
  }


@jax.jit
def _merge(a, b):
  return a.merge(b)
