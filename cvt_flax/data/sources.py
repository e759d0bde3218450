"""Where examples come from: `load` opens a source by name.

A source is a TFDS data set, a folder of images, a CSV list of images, arrays in an .npz file, or
scikit-learn's digits.
Nothing is decoded here, and TensorFlow is never used.
"""

import dataclasses
import os

import numpy as np

from cvt_flax.data.array_source import load_digits, load_npz
from cvt_flax.data.csv_source import load_csv
from cvt_flax.data.dataset import Dataset, Split, Subset
from cvt_flax.data.folder_source import load_folder
from cvt_flax.data.tfds_source import load_tfds, unprepared_classes
from cvt_flax.errors import UserError, nearest
from cvt_flax.rng import Stream

MAX_HELD_OUT = 5_000  # images: enough to tell models 1 % apart, whatever the size of train


def load(
  source: str,
  *,
  data_dir: str = '',
  holdout: float = 0.1,
  test_holdout: float = 0.0,
  train_share: float = 1.0,
  seed: int = 0,
  prepare: bool = True,
) -> Dataset:
  """Opens a source of labelled images.

  A source without a test split lends part of train for it: a stratified choice of
  round(test_holdout * N) images. One without a validation split lends part of the rest: of N
  images round(holdout * N), at most `MAX_HELD_OUT`. Of what is left then a part may be trained on
  alone, round(train_share * N) of N images.

  Args:
    source: `tfds:NAME[:VERSION]`, `folder:DIR` (DIR/train/CLASS/image, or DIR/CLASS/image, all
      of it train), `csv:FILE` (a header with path and label, and split where there is more than
      train; paths from FILE's folder on, or absolute; classes sorted by name, or by number where
      all are numbers), `npz:FILE` (x_train uint8 [N, H, W], [N, H, W, 1] or [N, H, W, 3], y_train
      integer [N], likewise _val and _test, and class_names), or `digits`.
    data_dir: where TFDS keeps its data sets; '' means $TFDS_DATA_DIR, else
      ~/tensorflow_datasets.
    holdout: the part of train to hold out for validation, from 0 (train on everything) to 0.5.
    test_holdout: the part of train to hold out for the test, from 0 to 0.5.
    train_share: the part of the rest to train on, stratified, from 0 to 1. All others of train are
      left out.
    seed: which images are held out, and left out.
    prepare: whether CIFAR is downloaded and prepared where it is not there yet.

  Raises:
    UserError: the source is unknown, missing, unusable or not prepared, or a number is
      out of range; the message is one line and says what to do.
  """
  shares = {'holdout': (holdout, 0.5), 'test_holdout': (test_holdout, 0.5)}
  for name, (share, most) in (shares | {'train_share': (train_share, 1)}).items():
    if not 0 <= share <= most:
      raise UserError(f'{name} is {share}, but must be from 0 to {most}')
  if seed < 0:
    raise UserError(f'seed is {seed}, but must not be negative')
  kind, _, where = source.partition(':')
  if kind == 'tfds':
    dataset = load_tfds(where, data_dir, prepare)
  elif kind == 'folder':
    dataset = load_folder(where)
  elif kind == 'csv':
    dataset = load_csv(where)
  elif kind == 'npz':
    dataset = load_npz(where)
  elif source == 'digits':
    dataset = load_digits()
  else:
    raise _unknown_source(source)
  if len(dataset.class_names) < 2:
    raise UserError(
      f'source {source!r} has one class only, {dataset.class_names[0]!r}; '
      'a classifier needs two or more'
    )
  if dataset.train is not None and dataset.test is None and test_holdout:
    _check_repeats(dataset)
    dataset = _hold_out_test(dataset, test_holdout, seed)
  if dataset.train is not None and dataset.validation is None and holdout:
    _check_repeats(dataset)
    dataset = _hold_out(dataset, holdout, seed)
  if dataset.train is not None and train_share < 1:
    dataset = _leave_out(dataset, train_share, seed)
  return dataset


def are_same(a: str, b: str) -> bool:
  """Whether two sources are the same data, whichever way their paths are written.

  Versions of a TFDS data set count as the same: their images mostly are.
  """
  return _plain(a) == _plain(b)


def _plain(source: str) -> tuple[str, str]:
  kind, _, where = source.partition(':')
  if kind == 'tfds':
    return kind, where.partition(':')[0]
  return kind, os.path.realpath(os.path.expanduser(where))


def extent(source: str, *, data_dir: str = '', **holding_out) -> tuple[int, int]:
  """Returns how many classes a source has, and how many images to train on.

  Of a TFDS data set that is not prepared the classes are known, the images are 0.

  Args:
    source, data_dir, holding_out: as in `load`.

  Raises:
    UserError: as in `load`, but for what is only not prepared.
  """
  kind, _, where = source.partition(':')
  if kind == 'tfds' and (classes := unprepared_classes(where, data_dir)):
    return classes, 0
  dataset = load(source, data_dir=data_dir, prepare=False, **holding_out)
  return len(dataset.class_names), 0 if dataset.train is None else len(dataset.train)


def _unknown_source(source: str) -> UserError:
  kind, colon, _ = source.partition(':')
  if os.path.exists(os.path.expanduser(source)):
    form = next((f for f in ('csv', 'npz') if source.endswith(f'.{f}')), 'folder')
    hint = f", did you mean '{form}:{source}'?"
  elif colon:
    hint = nearest(kind, ('tfds', 'folder', 'csv', 'npz', 'digits'))
  else:
    hint = nearest(source, ('digits', 'tfds:cifar10', 'tfds:cifar100', 'tfds:imagenet2012'))
  return UserError(
    f'unknown source {source!r} (allowed: tfds:NAME[:VERSION], folder:DIR, csv:FILE, npz:FILE, '
    f'digits){hint}'
  )


def _check_repeats(dataset: Dataset) -> None:
  """Raises a UserError where the same image might be held out and trained on."""
  if dataset.repeats:
    raise UserError(
      f'{dataset.train.name} has {dataset.repeats} images again, which might be held out and '
      'trained on: list each once (class_weights makes a class count more), or give a split of '
      'your own'
    )


def _hold_out_test(dataset: Dataset, share: float, seed: int) -> Dataset:
  """Returns the data set with test images taken from train."""
  train = dataset.train
  count = round(share * len(train))
  if not count:
    raise UserError(
      f'eval.test_holdout={share} of the {len(train)} images of {train.name} is none; more are '
      'needed'
    )
  chosen = stratified_choice(train.labels, count, seed, Stream.TEST_HOLDOUT)
  rest, test = _parts(train, chosen, 'held out to test')
  return dataclasses.replace(dataset, train=rest, test=test, held_out_test=chosen)


def _hold_out(dataset: Dataset, holdout: float, seed: int) -> Dataset:
  """Returns the data set with validation images taken from train."""
  train = dataset.train
  count = min(round(holdout * len(train)), MAX_HELD_OUT)
  if not count:
    raise UserError(
      f'eval.holdout={holdout} of the {len(train)} images of {train.name} is none; more images are '
      'needed, or --config.eval.holdout=0 to train without validation'
    )
  chosen = stratified_choice(train.labels, count, seed)
  rest, validation = _parts(train, chosen, 'held out')
  return dataclasses.replace(
    dataset, train=rest, validation=validation, held_out=validation.indices
  )


def _leave_out(dataset: Dataset, share: float, seed: int) -> Dataset:
  """Returns the data set with a part of its training images."""
  train = dataset.train
  if dataset.repeats:
    raise UserError(
      f'{train.name} has {dataset.repeats} images again, and of which images train_share={share} '
      'would be is not clear: list each once'
    )
  count, classes = round(share * len(train)), len(np.unique(train.labels))
  if not classes <= count < len(train):
    words = f'and of {classes} classes each needs one' if count < classes else 'which is all'
    raise UserError(
      f'train_share={share} of the {len(train):,} images of {train.name} is {count:,}, {words}'
    )
  # Those that are left out are chosen, as of them every class has one to spare.
  left_out = stratified_choice(train.labels, len(train) - count, seed, Stream.TRAIN_SHARE)
  return dataclasses.replace(dataset, train=_parts(train, left_out, 'left out')[0])


def _parts(train: Split, chosen: np.ndarray, word: str) -> tuple[Subset, Subset]:
  """Returns the rest of train and the chosen images, both with their places in the source."""
  rest = np.setdiff1d(np.arange(len(train), dtype=np.int32), chosen)
  source, places = train, np.arange(len(train), dtype=np.int32)
  if isinstance(train, Subset):  # the test images are gone already
    source, places = train.split, train.indices
  return (
    Subset(train.name, source, places[rest]),
    Subset(f'{train.name} ({word})', source, places[chosen]),
  )


def stratified_choice(
  labels: np.ndarray, count: int, seed: int, stream: Stream = Stream.HOLDOUT
) -> np.ndarray:
  """Chooses examples so that each class keeps its share.

  Each class gives count * (its share), rounded up or down: which, is drawn, and as often up as the
  fraction says (systematic sampling of classes in random order). The last image of a class is not
  taken while another class has more than one left.

  Args:
    labels: int [N].
    count: how many to choose, at most N.
    seed, stream: which ones.

  Returns:
    Their indices, int32 [count], sorted.
  """
  rng = np.random.default_rng((seed, stream))
  rank = rng.random(len(labels))
  _, numbers, sizes = np.unique(labels, return_inverse=True, return_counts=True)
  shuffled = rng.permutation(len(sizes))
  reached = np.cumsum(sizes[shuffled].astype(np.int64) * count) + rng.integers(len(labels))
  quotas = np.empty_like(sizes)
  quotas[shuffled] = np.diff(reached // len(labels), prepend=0)
  quotas = np.minimum(quotas, sizes - 1)
  while missing := count - quotas.sum():
    left = sizes - quotas
    able = np.flatnonzero(left > 1 if left.max() > 1 else left == 1)
    quotas[rng.permutation(able)[:missing]] += 1
  by_class = np.lexsort((rank, numbers))
  place = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
  return np.sort(by_class[place < np.repeat(quotas, sizes)]).astype(np.int32)
