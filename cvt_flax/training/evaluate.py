"""Exact metrics over a split: every image once."""

from collections.abc import Callable, Iterable, Sequence

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import metrics

from cvt_flax.errors import UserError
from cvt_flax.ops.logits import class_logits
from cvt_flax.ops.pixels import normalize_pixels


@flax.struct.dataclass
class PerClass(metrics.Metric):
  """Images by class: how many there are, how many are taken for it, and rightly so.

  Attributes:
    hits: int32 [k].
    count: int32 [k].
    predicted: int32 [k].
  """

  hits: jax.Array
  count: jax.Array
  predicted: jax.Array

  @classmethod
  def from_model_output(cls, predictions, labels, mask, num_classes, **_):
    def members(classes):
      return jax.nn.one_hot(classes, num_classes, dtype=jnp.int32) * mask[:, None].astype(jnp.int32)

    count, predicted = members(labels), members(predictions)
    return cls(*(jnp.sum(x, 0) for x in (count * predicted, count, predicted)))

  def merge(self, other):
    return jax.tree.map(jnp.add, self, other)

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


@flax.struct.dataclass
class Scores:
  """What each image of a batch is given, where there are two classes.

  Attributes:
    margin: float32 [b], the logit of the second class less that of the first.
    label: int32 [b].
    mask: float32 [b], 0 for padding.
  """

  margin: jax.Array
  label: jax.Array
  mask: jax.Array


def make_eval_step(
  model: nn.Module,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  classes: np.ndarray | None = None,
) -> Callable[[dict, dict], tuple[EvalMetrics | MultiLabelMetrics, Scores | None]]:
  """Returns eval_step(variables, batch) -> (the metrics of that batch, its scores).

  There are scores where there are two classes and one label an image, else None.

  The batch holds 'image' uint8 [b h w 3], 'label' int32 [b] and 'mask' float32 [b], 0 for padding.
  With fewer than five classes top-5 is over all of them.

  Where it holds 'labels' too, bool [b k], these are every class that is right for an image. It is
  a hit at five when one of them is among the best five; images without any do not count.

  Args:
    model: of k logits, or of one for two classes.
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
    logits = class_logits(model.apply(variables, normalize_pixels(batch['image'], mean, std)))
    return logits if classes is None else jnp.where(classes, logits, -jnp.inf)

  return forward


def score(logits: jax.Array, batch: dict) -> tuple[EvalMetrics | MultiLabelMetrics, Scores | None]:
  """Returns the metrics of a batch and its scores, as `make_eval_step` describes them.

  Args:
    logits: [b k].
    batch: as there.
  """
  num_classes = logits.shape[-1]
  best = jax.lax.top_k(logits, min(5, num_classes))[1]
  if 'labels' in batch:
    hits = jnp.take_along_axis(batch['labels'], best, axis=1)
    metrics_of_batch = MultiLabelMetrics.single_from_model_output(
      top1=hits[:, 0],
      top5=jnp.any(hits, axis=1),
      mask=batch['mask'] * jnp.any(batch['labels'], axis=1),
    )
    return metrics_of_batch, None
  labels = batch['label']
  hits = best == labels[:, None]
  metrics_of_batch = EvalMetrics.single_from_model_output(
    loss=optax.softmax_cross_entropy_with_integer_labels(logits, labels),
    top1=hits[:, 0],
    top5=jnp.any(hits, axis=1),
    predictions=best[:, 0],
    labels=labels,
    mask=batch['mask'],
    num_classes=num_classes,
  )
  if num_classes != 2:
    return metrics_of_batch, None
  return metrics_of_batch, Scores(logits[:, 1] - logits[:, 0], labels, batch['mask'])


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


def evaluate(
  batches: Iterable[tuple[EvalMetrics | MultiLabelMetrics, Scores | None]],
) -> dict:
  """Returns the metrics over all batches of an evaluation, fractions from 0 to 1.

  Where every image has one label: 'loss', 'top1', 'top5', 'images' (how many were counted),
  'per_class' (a list with the share of hits of each class, None for one without images),
  'balanced_accuracy' (the mean of these shares) and 'predicted' (how many images were taken for
  each class). Of two classes, of which the second is the positive one, also

    'f1': 2 TP / (2 TP + FP + FN); None where there is nothing positive at all,
    'auc': the area under the ROC curve, of the scores of all images; None without both classes
      or where a score is not finite,
    'majority': the top-1 of always answering with the more frequent class.

  Where images have several labels: 'top1', 'top5' and 'images'. Without a batch: {}.

  Raises:
    UserError: there are batches, but every image of them is masked.
  """
  total, scores = None, []
  for metrics_of_batch, scores_of_batch in batches:
    total = metrics_of_batch if total is None else _merge(total, metrics_of_batch)
    if scores_of_batch is not None:
      scores.append(scores_of_batch)
  if total is None:
    return {}
  total, scores = jax.device_get((total, scores))
  if not total.top1.count:
    raise UserError('no image can be scored: none can be read, or none has a label')
  result = {
    'top1': float(total.top1.total / total.top1.count),
    'top5': float(total.top5.total / total.top5.count),
    'images': int(total.top1.count),
  }
  if isinstance(total, MultiLabelMetrics):
    return result
  by_class = total.per_class
  occurs = by_class.count > 0
  shares = by_class.hits / np.maximum(by_class.count, 1)
  result |= {
    'loss': float(total.loss.total / total.loss.count),
    'balanced_accuracy': float(np.mean(shares[occurs])),
    'per_class': [float(x) if there else None for x, there in zip(shares, occurs, strict=True)],
    'predicted': by_class.predicted.tolist(),
  }
  return result | (_of_two_classes(by_class, scores) if scores else {})


def _of_two_classes(by_class, scores):
  from sklearn.metrics import roc_auc_score  # takes a second to import

  positives = by_class.count[1] + by_class.predicted[1]
  margin, label, mask = (
    np.concatenate([getattr(batch, name) for batch in scores])
    for name in ('margin', 'label', 'mask')
  )
  counted = mask > 0
  ranked = all(by_class.count) and np.isfinite(margin[counted]).all()
  return {
    'f1': float(2 * by_class.hits[1] / positives) if positives else None,
    'auc': float(roc_auc_score(label[counted], margin[counted])) if ranked else None,
    'majority': float(max(by_class.count) / sum(by_class.count)),
  }


def alarm(metrics: dict, class_names: Sequence[str]) -> str:
  """Returns what to say when all images were taken for one class and are not of one; else ''.

  Args:
    metrics: as `evaluate` returns them.
    class_names: of the classes.
  """
  classes = np.flatnonzero(metrics.get('predicted', ()))
  if len(classes) != 1 or sum(share is not None for share in metrics['per_class']) < 2:
    return ''
  return (
    f'WARNING: all {metrics["images"]:,} images are taken for {class_names[classes[0]]!r}, and '
    'they are of several classes'
  )


@jax.jit
def _merge(a, b):
  return a.merge(b)
