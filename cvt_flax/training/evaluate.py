"""Exact metrics over a split: every image once.

The device answers for each image, the host counts.
"""

import collections
from collections.abc import Callable, Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool

from cvt_flax.errors import UserError
from cvt_flax.ops.logits import class_logits
from cvt_flax.ops.pixels import normalize_pixels

# Batches that devices are given before the answers to an earlier one are asked for.
_AHEAD = 2

Answers = dict[str, np.ndarray]


def make_answer(
  model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[dict, dict, Bool[Array, ' k']], dict[str, jax.Array]]:
  """Returns answer(variables, batch, classes) -> what the model makes of each image, arrays [b].

  The batch holds 'image' uint8 [b h w 3], 'label' int32 [b], 'index' int32 [b] and 'mask' float32
  [b], 0 for padding; `classes` are those that compete, the others are as if the model did not have
  them. The arrays are those of `report.predictions.Predictions` and

    'counted': bool, whether the image is one that metrics are of,
    'top5': bool, whether its label is among the five best; over all classes where they are fewer,
    'loss': float32, the cross entropy,
    'margin': float32, the logit of the second class less that of the first; of two classes alone.

  Where the batch holds 'labels' too, bool [b k], these are every class that is right for an image,
  and the arrays are 'counted', 'top1' and 'top5': it is a hit at five when one of them is among the
  best five. Images without any do not count.

  Args:
    model: of k logits, or of one for two classes.
    mean, std: of the pixels, 0 to 1, a channel.
  """

  def answer(variables, batch, classes):
    logits = class_logits(model.apply(variables, normalize_pixels(batch['image'], mean, std)))
    logits = jnp.where(classes, logits, -jnp.inf)
    counted = batch['mask'] > 0
    best = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1]
    if 'labels' in batch:
      hits = jnp.take_along_axis(batch['labels'], best, axis=1)
      counted &= jnp.any(batch['labels'], axis=1)
      return {'counted': counted, 'top1': hits[:, 0], 'top5': jnp.any(hits, axis=1)}
    label, shares = batch['label'], jax.nn.softmax(logits)
    found = {
      'counted': counted,
      'index': batch['index'],
      'label': label,
      'prediction': best[:, 0],
      'probability': jnp.take_along_axis(shares, best[:, :1], axis=1)[:, 0],
      'label_probability': jnp.take_along_axis(shares, label[:, None], axis=1)[:, 0],
      'top5': jnp.any(best == label[:, None], axis=1),
      'loss': optax.softmax_cross_entropy_with_integer_labels(logits, label),
    }
    return found | ({'margin': logits[:, 1] - logits[:, 0]} if logits.shape[-1] == 2 else {})

  return answer


def collect(batches: Iterable[dict[str, jax.Array]]) -> Answers:
  """Returns the answers to all batches, of the images that count; {} without a batch."""
  ahead, parts = collections.deque(), []

  def take():
    arrays = jax.device_get(ahead.popleft())
    counted = arrays.pop('counted')
    parts.append({name: array[counted] for name, array in arrays.items()})

  for batch in batches:
    ahead.append(batch)
    if len(ahead) > _AHEAD:
      take()
  while ahead:
    take()
  return jax.tree.map(lambda *x: np.concatenate(x), *parts) if parts else {}


def summarize(answers: Answers, num_classes: int) -> dict:
  """Returns the metrics of an evaluation, fractions from 0 to 1.

  Where every image has one label: 'loss', 'top1', 'top5', 'images' (how many were counted),
  'per_class' (a list with the share of hits of each class, None for one without images),
  'balanced_accuracy' (the mean of these shares), 'predicted' (how many images were taken for each
  class) and 'majority' (the top-1 of always answering with the most frequent class). Of two
  classes, of which the second is the positive one, also

    'f1': 2 TP / (2 TP + FP + FN); None where there is nothing positive at all,
    'auc': the area under the ROC curve, of the scores of all images; None without both classes
      or where a score is not finite.

  Where images have several labels: 'top1', 'top5' and 'images'.

  Args:
    answers: as `collect` returns them.
    num_classes: of the model.

  Raises:
    UserError: there is no image, or none that counts.
  """
  images = len(answers.get('top5', ()))
  if not images:
    raise UserError('no image can be scored: none can be read, or none has a label')
  result = {'top5': float(np.mean(answers['top5'])), 'images': images}
  if 'label' not in answers:
    return result | {'top1': float(np.mean(answers['top1']))}
  label, prediction = answers['label'], answers['prediction']
  hits = label == prediction
  count, predicted, right = (
    np.bincount(classes, minlength=num_classes) for classes in (label, prediction, label[hits])
  )
  occurs = count > 0
  shares = right / np.maximum(count, 1)
  result |= {
    'top1': float(np.mean(hits)),
    'loss': float(np.mean(answers['loss'], dtype=np.float64)),
    'balanced_accuracy': float(np.mean(shares[occurs])),
    'per_class': [float(x) if there else None for x, there in zip(shares, occurs, strict=True)],
    'predicted': predicted.tolist(),
    'majority': float(max(count) / images),
  }
  if num_classes == 2:
    positives = count[1] + predicted[1]
    result |= {
      'f1': float(2 * right[1] / positives) if positives else None,
      'auc': _area_under_curve(label, answers['margin']) if all(occurs) else None,
    }
  return result


def _area_under_curve(label, margin):
  from sklearn.metrics import roc_auc_score  # takes a second to import

  return float(roc_auc_score(label, margin)) if np.isfinite(margin).all() else None
