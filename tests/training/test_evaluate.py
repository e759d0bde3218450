"""Evaluation counts every image once, and gets the numbers that NumPy gets."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import f1_score, roc_auc_score

from cvt_flax.data import resident
from cvt_flax.errors import UserError
from cvt_flax.models.cvt import CvT
from cvt_flax.report.records import alarm
from cvt_flax.training import sharding
from cvt_flax.training.evaluate import collect, make_answer, summarize
from cvt_flax.training.summary import metrics_line

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
IMAGES, BATCH, CLASSES = 37, 8, 7  # the last batch is five images and three of padding
ABSENT = 5  # a class without images


class Linear(nn.Module):
  """Logits linear in the pixels, which NumPy can check."""

  num_classes: int = CLASSES

  @nn.compact
  def __call__(self, images, train=False):
    return nn.Dense(self.num_classes, name='head')(images.reshape(len(images), -1))


def split(classes=CLASSES, images=IMAGES):
  rng = np.random.default_rng(0)
  label = rng.choice([c for c in range(classes) if c != ABSENT], images)
  image = rng.integers(0, 256, (images, 8, 8, 3))
  index = np.arange(images)
  return resident.Arrays(image.astype(np.uint8), label.astype(np.int32), index.astype(np.int32))


def weights(classes=CLASSES):
  """Returns variables of Linear that take padding, which is black, for class 0, its label."""
  rng = np.random.default_rng(1)
  head = {'kernel': rng.normal(size=(192, classes)) * 0.02, 'bias': np.zeros(classes)}
  black = -np.tile(np.array(MEAN) / STD, 64) @ head['kernel']
  head['bias'][0] = black.max() - black[0] + 0.1
  return {'params': {'head': jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), head)}}


def logits_of(arrays, variables):
  head = jax.tree.map(lambda x: np.asarray(x, np.float64), variables['params']['head'])
  pixels = (arrays.image / 255 - MEAN) / STD
  return pixels.reshape(len(pixels), -1) @ head['kernel'] + head['bias']


def expected(arrays, variables, classes=CLASSES, competing=slice(None)):
  logits = np.full((len(arrays.image), classes), -np.inf)
  logits[:, competing] = logits_of(arrays, variables)[:, competing]
  order = np.argsort(-logits, axis=1)
  hits = order == arrays.label[:, None]
  log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  members = [arrays.label == c for c in range(classes)]
  return {
    'loss': pytest.approx(-log_p[np.arange(len(logits)), arrays.label].mean(), rel=1e-5),
    'top1': pytest.approx(hits[:, 0].mean(), rel=1e-6),
    'top5': pytest.approx(hits[:, :5].any(1).mean(), rel=1e-6),
    'images': len(logits),
    'per_class': [pytest.approx(hits[m, 0].mean(), rel=1e-6) if m.any() else None for m in members],
    'balanced_accuracy': pytest.approx(np.mean([hits[m, 0].mean() for m in members if m.any()])),
    'predicted': np.bincount(order[:, 0], minlength=classes).tolist(),
    'majority': max(sum(m) for m in members) / len(logits),
  }


ALL = np.ones(CLASSES, bool)


def evaluated(model, variables, arrays, batch_size=BATCH, devices=1, classes=None):
  """Evaluates as a run does: the split on every device, each batch divided among them."""
  mesh = sharding.make_mesh(devices)
  answer = make_answer(model, MEAN, STD)
  classes = np.ones(model.num_classes, bool) if classes is None else classes

  @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
  def eval_at(variables, arrays, position):
    batch = resident.eval_batch(arrays, position, batch_size=batch_size)
    batch = jax.lax.with_sharding_constraint(batch, sharding.split_batch(mesh))
    return answer(variables, batch, classes)

  placed = jax.device_put((variables, arrays), sharding.replicated(mesh))
  answers = collect(eval_at(*placed, i) for i in range(-(-len(arrays.label) // batch_size)))
  return summarize(answers, model.num_classes)


@pytest.mark.parametrize('batch_size', [8, 37, 64], ids=['padded', 'one whole', 'one padded'])
def test_metrics_are_numpys(batch_size):
  arrays, variables = split(), weights()
  found = evaluated(Linear(), variables, arrays, batch_size)
  assert found == expected(arrays, variables)
  assert 0 < found['top1'] < found['top5'] < 1


def test_padding_would_have_been_a_hit():
  """So the test above fails when padding counts: it is taken for class 0, which is its label."""
  batch = resident.eval_batch(split(), 4, batch_size=BATCH)
  assert batch['mask'].sum() == IMAGES - 32
  answer = make_answer(Linear(), MEAN, STD)
  unmasked, masked = (
    summarize(collect([answer(weights(), batch | {'mask': mask}, ALL)]), CLASSES)
    for mask in (jnp.ones(BATCH), batch['mask'])
  )
  assert unmasked['images'] == BATCH and masked['images'] == IMAGES - 32
  assert unmasked['top1'] > masked['top1']


def test_per_class_shares_make_up_the_whole():
  arrays = split()
  found = evaluated(Linear(), weights(), arrays)
  counts = np.bincount(arrays.label, minlength=CLASSES)
  assert found['per_class'][ABSENT] is None and counts[ABSENT] == 0
  shares = [share or 0 for share in found['per_class']]
  assert shares @ counts / IMAGES == pytest.approx(found['top1'], rel=1e-6)


def test_with_fewer_than_five_classes_top5_is_over_all():
  arrays, variables = split(classes=3), weights(classes=3)
  found = evaluated(Linear(num_classes=3), variables, arrays)
  assert found == expected(arrays, variables, classes=3)
  assert found['top5'] == 1 and found['top1'] < 1


@pytest.mark.parametrize(
  ('batch_size', 'devices'), [(8, 8), (8, 1), (37, 1)], ids=['eight devices', 'padded', 'one batch']
)
def test_metrics_of_two_classes_are_scikit_learns(batch_size, devices):
  """Of images of which some are alike, so that there are ties, and three in four of one class."""
  arrays, variables = split(classes=2), weights(classes=2)
  rng = np.random.default_rng(3)
  label = (rng.random(IMAGES) < 0.25).astype(np.int32)
  image = arrays.image[rng.integers(0, 20, IMAGES)]
  arrays = arrays.replace(label=label, image=image)
  found = evaluated(Linear(num_classes=2), variables, arrays, batch_size, devices)
  logits = logits_of(arrays, variables).astype(np.float32)
  margin, taken = logits[:, 1] - logits[:, 0], logits.argmax(1)
  assert len(np.unique(margin)) < IMAGES and 0 < label.sum() < IMAGES / 2
  assert found == expected(arrays, variables, classes=2) | {
    'f1': pytest.approx(f1_score(label, taken)),
    'auc': pytest.approx(roc_auc_score(label, margin)),
  }
  assert found['majority'] == pytest.approx(1 - label.mean())
  assert len({found[name] for name in ('top1', 'balanced_accuracy', 'f1', 'auc', 'majority')}) == 5


def test_what_two_classes_do_not_define_is_none():
  arrays = split(classes=2).replace(label=np.zeros(IMAGES, np.int32))
  variables = weights(classes=2)
  variables['params']['head']['bias'] = jnp.array([100.0, 0.0])
  found = evaluated(Linear(num_classes=2), variables, arrays)
  assert (found['auc'], found['f1'], found['majority']) == (None, None, 1.0)
  assert found['balanced_accuracy'] == found['top1'] == 1 and found['per_class'] == [1.0, None]
  assert alarm(found, ('ant', 'bee')) == ''  # it is right


def test_scores_that_are_not_finite_have_no_auc():
  arrays, variables = split(classes=2), weights(classes=2)
  variables['params']['head']['bias'] = jnp.array([jnp.nan, 0.0])
  found = evaluated(Linear(num_classes=2), variables, arrays)
  assert found['auc'] is None and np.isnan(found['loss'])


def test_a_model_that_takes_all_images_for_one_class_raises_an_alarm():
  arrays, variables = split(), weights()
  found = evaluated(Linear(), variables, arrays)
  names = tuple('abcdefg')
  assert alarm(found, names) == ''
  variables['params']['head']['bias'] = jnp.zeros(CLASSES).at[2].set(100.0)
  found = evaluated(Linear(), variables, arrays)
  assert found['predicted'] == [0, 0, IMAGES, 0, 0, 0, 0]
  assert alarm(found, names).startswith(f"WARNING: all {IMAGES} images are taken for 'c', and they")
  assert found['balanced_accuracy'] == pytest.approx(1 / 6)


@pytest.mark.parametrize('competing', [[1, 2, 3, 4, 6], [2, 4], [0, 1, 2, 3, 4, 6]], ids=str)
def test_only_classes_that_compete(competing):
  """Where padding, which is taken for class 0, is of a class that does not compete: no NaN."""
  arrays, variables = split(), weights()
  arrays = arrays.replace(label=np.array(competing, np.int32)[arrays.label % len(competing)])
  classes = np.isin(np.arange(CLASSES), competing)
  found = evaluated(Linear(), variables, arrays, classes=classes)
  assert found == expected(arrays, variables, competing=competing)
  every = evaluated(Linear(), variables, arrays)
  assert found['top1'] >= every['top1'] and found['loss'] < every['loss']
  assert found['top5'] == 1 or len(competing) > 5


def several_labels(rng, images=IMAGES):
  """Returns bool [images, CLASSES]: about a third without a label, others with one or several."""
  labels = rng.random((images, CLASSES)) < rng.choice([0.0, 0.15, 0.4], (images, 1))
  assert {0, 1, 3} <= set(labels.sum(1))
  return labels


def evaluated_labels(arrays, labels, classes=None):
  """Evaluates in batches, the last of them padded, where every class of padding is right."""
  answer = jax.jit(make_answer(Linear(), MEAN, STD))
  padded = np.pad(labels, ((0, -len(labels) % BATCH), (0, 0)), constant_values=True)
  answers = collect(
    answer(
      weights(),
      resident.eval_batch(arrays, i, batch_size=BATCH)
      | {'labels': padded[i * BATCH : (i + 1) * BATCH]},
      ALL if classes is None else classes,
    )
    for i in range(len(padded) // BATCH)
  )
  return summarize(answers, CLASSES)


@pytest.mark.parametrize('competing', [None, [0, 2, 3, 4, 5, 6]], ids=['all', 'some'])
def test_a_hit_is_any_of_several_labels(competing):
  arrays, labels = split(), several_labels(np.random.default_rng(2))
  logits = logits_of(arrays, weights())
  classes = None
  if competing:
    classes = np.isin(np.arange(CLASSES), competing)
    labels &= classes
    logits[:, ~classes] = -np.inf
  best = np.argsort(-logits, axis=1)
  rows = [(b, set(np.flatnonzero(right))) for b, right in zip(best, labels, strict=True)]
  rows = [(b, right) for b, right in rows if right]
  assert len(rows) < IMAGES - 5
  found = evaluated_labels(arrays, labels, classes)
  assert found == {
    'top1': pytest.approx(np.mean([b[0] in right for b, right in rows]), rel=1e-6),
    'top5': pytest.approx(np.mean([bool(right & set(b[:5])) for b, right in rows]), rel=1e-6),
    'images': len(rows),
  }
  assert 0 < found['top1'] < found['top5'] < 1


def test_a_list_of_one_label_is_the_label():
  arrays = split()
  found = evaluated_labels(arrays, np.eye(CLASSES, dtype=bool)[arrays.label])
  of_one = evaluated(Linear(), weights(), arrays)
  assert found == {name: of_one[name] for name in ('top1', 'top5', 'images')}


def test_an_evaluation_that_is_stopped_before_its_first_batch_has_no_answers():
  assert collect(iter(())) == {}
  with pytest.raises(UserError, match='no image can be scored'):
    summarize({}, CLASSES)


def test_uneven_classes_are_told_with_what_the_most_frequent_one_would_score():
  even = split().replace(label=np.arange(IMAGES, dtype=np.int32) % CLASSES)
  found = evaluated(Linear(), weights(), even)
  assert metrics_line(found, 'abcdefg').startswith(f'top-1 {found["top1"]:.4f}  top-5 ')
  label = np.where(np.arange(IMAGES) < 12, 2, even.label)
  found = evaluated(Linear(), weights(), even.replace(label=label.astype(np.int32)))
  assert f'majority class {max(np.bincount(label)) / IMAGES:.4f}  balanced ' in (
    metrics_line(found, 'abcdefg')
  )


@pytest.mark.parametrize(
  ('batch_size', 'devices'), [(8, 8), (37, 1)], ids=['eight devices', 'one batch']
)
def test_neither_devices_nor_batches_change_anything(one_at_a_time, batch_size, devices):
  model, variables, expected = one_at_a_time
  found = evaluated(model, variables, split(), batch_size, devices)
  assert found.pop('loss') == pytest.approx(expected['loss'], abs=2e-6)
  assert found == {name: value for name, value in expected.items() if name != 'loss'}
  assert found['images'] == IMAGES


@pytest.fixture(scope='module')
def one_at_a_time():
  """(a CvT with batch norm and dropout, its variables, its metrics in batches of one image)."""
  model = CvT(
    num_classes=CLASSES,
    embed_dims=(8,),
    depths=(1,),
    num_heads=(1,),
    patch_sizes=(3,),
    patch_strides=(2,),
    patch_paddings=(1,),
    mlp_ratios=(2.0,),
    cls_token=(True,),
    drop_rates=(0.5,),
    drop_path_rates=(0.5,),
  )
  variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
  # Running statistics of which a batch's own would be far.
  variables['batch_stats'] = jax.tree.map(lambda x: x + 0.5, variables['batch_stats'])
  return model, variables, evaluated(model, variables, split(), batch_size=1)
