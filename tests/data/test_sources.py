"""Data sources, each on files made on the spot: no network, no TensorFlow."""

import concurrent.futures
import contextlib
import errno
import hashlib
import io
import json
import os
import pathlib
import pickle
import shutil
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from cvt_flax.data import array_source, cifar, dataset, folder_source, images, sources
from cvt_flax.errors import UserError


def pixels_of(example):
  return np.asarray(images.decode(example.image, example.name))


def error_of(source, **options):
  """Returns the message of the UserError that loading ends in; it is one line."""
  with pytest.raises(UserError) as error:
    sources.load(source, **options)
  message = str(error.value)
  assert '\n' not in message
  return message


# --- load ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'source,hint',
  [
    ('digit', "did you mean 'digits'?"),
    ('cifar10', "did you mean 'tfds:cifar10'?"),
    ('foldr:/images', "did you mean 'folder'?"),
    ('digits:8', "did you mean 'digits'?"),
    ('', 'npz:FILE, digits)'),
  ],
)
def test_unknown_source(source, hint):
  message = error_of(source)
  assert message.startswith(f'unknown source {source!r} (allowed: tfds:NAME[:VERSION], folder:DIR')
  assert message.endswith(hint)


def test_a_path_without_its_kind(tmp_path):
  assert error_of(str(tmp_path)).endswith(f"did you mean 'folder:{tmp_path}'?")
  for kind in ('npz', 'csv'):
    (tmp_path / f'x.{kind}').touch()
    assert error_of(f'{tmp_path}/x.{kind}').endswith(f"did you mean '{kind}:{tmp_path}/x.{kind}'?")


@pytest.mark.parametrize('share', [-0.1, 1.01, float('nan')])
@pytest.mark.parametrize(
  ('name', 'most'), [('holdout', 0.5), ('test_holdout', 0.5), ('train_share', 1)]
)
def test_shares_out_of_range(name, most, share):
  assert error_of('digits', **{name: share}) == f'{name} is {share}, but must be from 0 to {most}'


def test_negative_seed():
  assert error_of('digits', seed=-1) == 'seed is -1, but must not be negative'


# --- Holding out --------------------------------------------------------------------------------


def npz(path, **arrays):
  np.savez(path, **arrays)
  return f'npz:{path}'


def random_images(count, size=4, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def test_a_source_without_validation_lends_part_of_train(tmp_path):
  labels = np.array([0, 1, 1, 2] * 25)
  x = random_images(100)
  source = npz(tmp_path / 'a.npz', x_train=x, y_train=labels, x_test=x[:8], y_test=labels[:8])
  data = sources.load(source, holdout=0.2, seed=3)
  assert (len(data.train), len(data.validation), len(data.test)) == (80, 20, 8)
  np.testing.assert_array_equal(np.bincount(data.validation.labels), [5, 10, 5])
  assert data.held_out.dtype == np.int32
  assert [e.index for e in data.validation] == data.held_out.tolist() == sorted(data.held_out)
  assert sorted([e.index for e in data.train] + data.held_out.tolist()) == list(range(100))
  for split in (data.train, data.validation):
    np.testing.assert_array_equal(split.labels, [e.label for e in split])
    for example in split:
      np.testing.assert_array_equal(example.image, x[example.index])
      assert example.label == labels[example.index]
      assert example.name == f'a train #{example.index}'
  assert data.validation.name == 'a train (held out)'


def test_holding_out_is_a_function_of_the_seed(tmp_path):
  source = npz(tmp_path / 'a.npz', x_train=random_images(200), y_train=np.arange(200) % 4)
  first, again, other = (sources.load(source, seed=seed).held_out for seed in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert not np.array_equal(first, other)
  assert len(first) == 20


def test_a_source_without_a_test_split_lends_part_of_train(tmp_path):
  """70/30, stratified, by the seed; validation then is a part of the 70 %."""
  labels = np.array([0, 1, 1, 2] * 25)
  x = random_images(100)
  source = npz(tmp_path / 'a.npz', x_train=x, y_train=labels)
  data, again, other = (
    sources.load(source, holdout=0.1, test_holdout=0.3, seed=seed) for seed in (3, 3, 4)
  )
  assert (len(data.train), len(data.validation), len(data.test)) == (63, 7, 30)
  np.testing.assert_allclose(np.bincount(data.test.labels), [7.5, 15, 7.5], atol=0.5)
  for name in ('held_out', 'held_out_test'):
    found, splits = getattr(data, name), {'held_out': data.validation, 'held_out_test': data.test}
    assert found.dtype == np.int32 and found.tolist() == sorted(found)
    assert [e.index for e in splits[name]] == found.tolist()
    np.testing.assert_array_equal(found, getattr(again, name))
    assert not np.array_equal(found, getattr(other, name))
  places = [e.index for split in (data.train, data.validation, data.test) for e in split]
  assert sorted(places) == list(range(100))
  for split in (data.train, data.validation, data.test):
    for example in split:
      np.testing.assert_array_equal(example.image, x[example.index])
      assert example.label == labels[example.index]
  # The validation images are not those that the same seed takes from all of train.
  assert data.test.name == 'a train (held out to test)'
  assert not set(sources.load(source, holdout=0.3, seed=3).held_out) == set(data.held_out_test)


def test_a_test_split_is_left_as_it_is(tmp_path):
  y = np.arange(20) % 2
  source = npz(
    tmp_path / 'a.npz', x_train=random_images(20), y_train=y, x_test=random_images(20), y_test=y
  )
  data = sources.load(source, test_holdout=0.3)
  assert (len(data.train), len(data.test), data.held_out_test.size) == (18, 20, 0)


def test_a_share_of_train_is_of_every_class(tmp_path):
  """Of what is not held out, by the seed; validation and test are those of all of train."""
  labels = np.array([0, 1, 1, 2] * 25)
  x = random_images(100)
  source = npz(tmp_path / 'a.npz', x_train=x, y_train=labels)
  holding_out = dict(holdout=0.1, test_holdout=0.2)
  whole = sources.load(source, **holding_out, seed=3)
  data, again, other = (
    sources.load(source, **holding_out, train_share=0.25, seed=seed) for seed in (3, 3, 4)
  )
  for name in ('held_out', 'held_out_test'):
    np.testing.assert_array_equal(getattr(data, name), getattr(whole, name))
  assert len(whole.train) == 72 and len(data.train) == 18
  np.testing.assert_allclose(np.bincount(data.train.labels), [4.5, 9, 4.5], atol=0.5)
  assert {e.index for e in data.train} < {e.index for e in whole.train}
  for example in data.train:
    np.testing.assert_array_equal(example.image, x[example.index])
    assert example.label == labels[example.index]
  assert data.train.digest() == again.train.digest() != other.train.digest()
  assert sources.extent(source, **holding_out, train_share=0.25, seed=3) == (3, 18)


def test_a_share_keeps_an_image_of_the_rarest_class(tmp_path):
  labels = np.array([0] * 50 + [1] * 49 + [2])
  source = npz(tmp_path / 'a.npz', x_train=random_images(100), y_train=labels)
  for seed in range(20):
    train = sources.load(source, holdout=0, train_share=0.03, seed=seed).train
    assert train.labels.tolist() == [0, 1, 2]
  assert error_of(source, holdout=0, train_share=0.02).endswith(
    'a train is 2, and of 3 classes each needs one'
  )
  assert error_of(source, holdout=0, train_share=0.999).endswith('a train is 100, which is all')


def test_nothing_to_hold_out_to_test(tmp_path):
  source = npz(tmp_path / 'a.npz', x_train=random_images(4), y_train=np.arange(4) % 2)
  message = error_of(source, test_holdout=0.1)
  assert 'test_holdout=0.1 of the 4 images of a train is none' in message


def test_nothing_held_out(tmp_path):
  source = npz(tmp_path / 'a.npz', x_train=random_images(10), y_train=np.arange(10) % 2)
  data = sources.load(source, holdout=0)
  assert len(data.train) == 10 and data.validation is None and data.held_out.size == 0


def test_nothing_to_hold_out(tmp_path):
  source = npz(tmp_path / 'a.npz', x_train=random_images(4), y_train=np.arange(4) % 2)
  assert 'holdout=0.1 of the 4 images of a train is none' in error_of(source)


def test_at_most_5000_are_held_out():
  labels = np.repeat(np.arange(10), 6_000)
  split = array_source.ArraySplit('x', np.zeros((60_000, 1, 1, 1), np.uint8), labels)
  data = sources._hold_out(dataset.Dataset('x', tuple('0123456789'), split), 0.1, 0)
  assert np.bincount(data.validation.labels).tolist() == [500] * 10
  assert len(data.train) == 55_000


def test_shares_are_rounded_up_as_often_as_their_fractions_say():
  labels = np.repeat([0, 1, 2], [50, 33, 17])
  quotas = [np.bincount(labels[sources.stratified_choice(labels, 10, s)]) for s in range(300)]
  assert {tuple(quota) for quota in quotas} == {(5, 3, 2), (5, 4, 1)}  # of 5.0, 3.3 and 1.7
  np.testing.assert_allclose(np.mean(quotas, axis=0), [5.0, 3.3, 1.7], atol=0.1)


def test_which_classes_give_one_is_drawn():
  """Of 100 classes of 4 images, 40 give one: not those that come first, nor always the same."""
  labels = np.repeat(np.arange(100), 4)
  given = [set(labels[sources.stratified_choice(labels, 40, seed)]) for seed in range(50)]
  assert all(len(classes) == 40 for classes in given)
  assert len(set.union(*given)) == 100


def test_a_class_of_one_image_keeps_it():
  labels = np.repeat([0, 1, 2, 3], [1, 1, 1, 27])
  for seed in range(20):
    assert set(labels[sources.stratified_choice(labels, 3, seed)]) == {3}


@pytest.mark.parametrize(
  ('sizes', 'count'), [([1] * 10 + [10], 6), ([1] * 40 + [20] * 10, 72), ([1] * 5 + [2] * 10, 10)]
)
def test_no_class_gives_its_last_image_while_others_have_more(sizes, count):
  labels = np.repeat(np.arange(len(sizes)), sizes)
  chosen = sources.stratified_choice(labels, count, seed=0)
  assert len(chosen) == count
  assert (np.bincount(labels[chosen], minlength=len(sizes)) < sizes).all()


def test_where_every_class_has_one_image_some_are_given():
  labels = np.arange(10)
  assert len(set(sources.stratified_choice(labels, 5, seed=0))) == 5


def test_a_subset_reads_many_at_once_and_ends(tmp_path):
  source = npz(tmp_path / 'a.npz', x_train=random_images(20), y_train=np.arange(20) % 2)
  train = sources.load(source).train
  many = train.__getitems__(np.array([3, 0]))
  assert [e.index for e in many] == [train[3].index, train[0].index]
  assert isinstance(many[0].index, int) and isinstance(many[0].label, int)
  for outside in (18, -1):
    with pytest.raises(IndexError, match='a train has 18 examples, none is #'):
      train[outside]


# --- digits -------------------------------------------------------------------------------------


def test_digits():
  data = sources.load('digits')
  assert [len(s) for s in (data.train, data.validation, data.test)] == [1257, 180, 360]
  assert data.class_names == tuple('0123456789') and data.held_out.size == 0
  for split in (data.train, data.validation, data.test):
    share = np.bincount(split.labels) / len(split)
    assert split.labels.dtype == np.int32 and np.all(np.abs(share - 0.1) < 0.01)
  assert data.test[3].name == 'digits test #3'


def test_digits_are_scaled_and_enlarged():
  from sklearn.datasets import load_digits

  data = sources.load('digits')
  grey = {np.rint(d * 255 / 16).astype(np.uint8).tobytes() for d in load_digits().images}
  seen = set()
  for split in (data.train, data.validation, data.test):
    for example in split:
      assert example.image.shape == (32, 32, 3) and example.image.dtype == np.uint8
      small = example.image[::4, ::4, 0]
      blocks = np.broadcast_to(small[:, None, :, None, None], (8, 4, 8, 4, 3))
      np.testing.assert_array_equal(example.image, blocks.reshape(32, 32, 3))
      seen.add(small.tobytes())
  assert seen == grey


@pytest.mark.parametrize(
  ('a', 'b', 'same'),
  [
    ('folder:x', 'folder:x/', True),
    ('folder:x', 'folder:{cwd}/y/../x', True),
    ('csv:~/x.csv', 'csv:{home}/x.csv', True),
    ('folder:x', 'csv:x', False),
    ('folder:x', 'folder:x/train', False),
    ('tfds:a', 'tfds:a:1.0.0', True),
    ('tfds:a/small', 'tfds:a', False),
    ('digits', 'digits', True),
  ],
)
def test_sources_that_are_the_same(a, b, same):
  b = b.format(cwd=os.getcwd(), home=os.path.expanduser('~'))
  assert sources.are_same(a, b) == same


def test_digits_are_split_the_same_for_every_seed_and_version():
  digests = set()
  for seed in (0, 1):
    data = sources.load('digits', seed=seed, holdout=0.3)
    digest = hashlib.sha256()
    for split in (data.train, data.validation, data.test):
      digest.update(split.labels.astype('<i4').tobytes())
      digest.update(np.ascontiguousarray(split.images).tobytes())
    digests.add(digest.hexdigest()[:16])
  assert digests == {'ec4da25a3a4210b2'}


# --- npz ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('shape', [(6, 5, 7), (6, 5, 7, 1), (6, 5, 7, 3)])
def test_npz_images_have_three_channels(tmp_path, shape):
  x = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  y = np.array([0, 1, 2, 0, 1, 2], np.uint8)
  data = sources.load(npz(tmp_path / 'set.npz', x_train=x, y_train=y, x_val=x[:3], y_val=y[:3]))
  assert data.name == 'set' and data.class_names == ('0', '1', '2')
  assert data.test is None and data.held_out.size == 0 and len(data.validation) == 3
  expected = np.broadcast_to(x.reshape(6, 5, 7, -1), (6, 5, 7, 3))
  for i, example in enumerate(data.train):
    np.testing.assert_array_equal(example.image, expected[i])
  assert data.train.labels.dtype == np.int32


def test_npz_for_evaluation_only(tmp_path):
  data = sources.load(
    npz(
      tmp_path / 'set.npz',
      x_test=random_images(3),
      y_test=[0, 2, 1],
      class_names=['ant', 'bee', 'cat', 'dog'],
    )
  )
  assert data.train is None and data.validation is None and len(data.test) == 3
  assert data.class_names == ('ant', 'bee', 'cat', 'dog')


X = random_images(4)
Y = np.array([0, 1, 0, 1])


@pytest.mark.parametrize(
  'arrays,message',
  [
    (
      {'x_train': X, 'y_trian': Y},
      "unknown key 'y_trian' (allowed: x_train, y_train, x_val, "
      "y_val, x_test, y_test, class_names), did you mean 'y_train'?",
    ),
    ({'x_train': X}, 'x_train and y_train come together, but one is missing'),
    ({'class_names': ['a', 'b']}, 'holds no images'),
    (
      {'x_train': X.astype(np.float32), 'y_train': Y},
      'x_train is float32 [4, 4, 4, 3], but must be uint8 [N, H, W], [N, H, W, 1] or',
    ),
    ({'x_train': X[..., :2], 'y_train': Y}, 'x_train is uint8 [4, 4, 4, 2], but must be'),
    ({'x_train': X[:0], 'y_train': Y[:0]}, 'x_train is uint8 [0, 4, 4, 3], but must be'),
    ({'x_train': X, 'y_train': Y / 2}, 'y_train is float64 [4], but must be integers [4]'),
    ({'x_train': X, 'y_train': Y[:3]}, 'y_train is int64 [3], but must be integers [4]'),
    ({'x_train': X, 'y_train': Y[:, None]}, 'y_train is int64 [4, 1], but must be integers [4]'),
    ({'x_train': X, 'y_train': Y - 1}, 'y_train[0]: label -1 is not one of the 1 classes'),
    (
      {'x_test': X, 'y_test': Y + 1, 'class_names': ['a', 'b']},
      'y_test[1]: label 2 is not one of the 2 classes, 0 to 1',
    ),
    ({'x_test': X, 'y_test': Y * 10**9}, 'labels go up to 1000000000, but there are only 4'),
    ({'x_test': X, 'y_test': Y * 0}, "has one class only, '0'; a classifier needs two or more"),
    (
      {'x_test': X, 'y_test': Y, 'class_names': [1, 2]},
      'class_names is int64 [2], but must be strings [K]',
    ),
    (
      {'x_test': X, 'y_test': Y, 'class_names': np.array(['a', None])},
      'is not an .npz file of plain arrays (no objects)',
    ),
  ],
)
def test_bad_npz(tmp_path, arrays, message):
  assert message in error_of(npz(tmp_path / 'set.npz', **arrays))


def test_npz_that_is_none(tmp_path):
  path = tmp_path / 'set.npz'
  assert error_of(f'npz:{path}') == f'cannot read {path}: No such file or directory'
  path.write_bytes(b'PK\x03\x04 and then nothing')
  assert error_of(f'npz:{path}') == f'{path} is not an .npz file of plain arrays (no objects)'
  with path.open('wb') as file:
    np.save(file, X)
  assert error_of(f'npz:{path}') == f'{path} is not an .npz file of plain arrays (no objects)'


# --- Folders ------------------------------------------------------------------------------------


def make_folder(root, *paths):
  """Writes a small image at each path, each of another colour."""
  for number, path in enumerate(paths):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (3, 2), (number, 0, 0)).save(root / path)
  return f'folder:{root}'


@pytest.mark.parametrize(
  'train,validation,test',
  [('train', 'val', 'test'), ('Training', 'VALID', 'evaluation'), ('TRAIN', 'validation', 'Test')],
)
def test_folder_with_splits(tmp_path, train, validation, test):
  source = make_folder(
    tmp_path,
    f'{train}/cat/1.png',
    f'{train}/cat/2.PNG',
    f'{train}/ant/1.gif',
    f'{validation}/cat/3.bmp',
    f'{validation}/ant/3.webp',
    f'{test}/ant/4.tif',
    f'{test}/ant/5.ppm',
    f'{test}/cat/4.jpg',
  )
  data = sources.load(source)
  assert data.name == tmp_path.name and data.class_names == ('ant', 'cat')
  assert data.held_out.size == 0
  assert [s.labels.tolist() for s in (data.train, data.validation, data.test)] == [
    [0, 1, 1],
    [0, 1],
    [0, 0, 1],
  ]
  example = data.train[2]
  assert (example.label, example.index) == (1, 2)
  assert example.name == str(tmp_path / train / 'cat' / '2.PNG')
  assert pixels_of(example)[0, 0].tolist() == [1, 0, 0]
  assert data.train.labels.dtype == np.int32


def test_flat_folder_is_all_train(tmp_path):
  source = make_folder(tmp_path, *(f'{c}/{i}.png' for c in ('dog', 'cat') for i in range(10)))
  data = sources.load(source)
  assert data.class_names == ('cat', 'dog') and data.test is None
  assert (len(data.train), len(data.validation)) == (18, 2)
  assert data.validation.labels.tolist() == [0, 1]


def test_a_class_may_be_called_like_a_split(tmp_path):
  source = make_folder(tmp_path, 'test/1.png', 'train/2.png', 'plane/3.png')
  assert sources.load(source, holdout=0).class_names == ('plane', 'test', 'train')


def test_folder_for_evaluation_only(tmp_path):
  data = sources.load(make_folder(tmp_path, 'val/a/1.png', 'val/b/1.png'))
  assert data.train is None and data.test is None and len(data.validation) == 2


def test_nested_linked_and_hidden_files(tmp_path):
  source = make_folder(
    tmp_path / 'set',
    'a/deep/er/1.png',
    'a/0.png',
    'b/2.png',
    'a/.3.png',
    'b/.thumbs/4.png',
    '.git/5.png',
  )
  make_folder(tmp_path, 'elsewhere/6.png', '7.png')
  (tmp_path / 'set/a/notes.txt').write_text('no image')
  os.symlink(tmp_path / 'elsewhere', tmp_path / 'set/b/linked')
  os.symlink(tmp_path / '7.png', tmp_path / 'set/b/7.png')
  os.symlink(tmp_path / 'set/a', tmp_path / 'set/a/deep/loop')
  train = sources.load(source, holdout=0).train
  assert [os.path.relpath(e.name, tmp_path / 'set') for e in train] == [
    'a/0.png',
    'a/deep/er/1.png',
    'b/2.png',
    'b/7.png',
    'b/linked/6.png',
  ]


def test_home_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  make_folder(tmp_path / 'set', 'a/1.png', 'b/1.png')
  assert len(sources.load('folder:~/set', holdout=0).train) == 2


@pytest.mark.parametrize(
  'paths,message',
  [
    (
      ['train/a/1.png', 'train/b/1.png', 'val/a/1.png', 'val/c/1.png'],
      "{root}/val has no class 'b', but {root}/train has; all splits have the same class folders",
    ),
    (
      ['train/a/1.png', 'train/b/1.png', 'test/a/1.png', 'test/b/1.png', 'test/c/1.png'],
      "{root}/train has no class 'c', but {root}/test has",
    ),
    (['train/1.png', 'val/2.png'], 'no class folders in {root}/train; looked for DIR/train/CLASS'),
    (['1.png', '2.png'], 'no class folders in {root}; looked for DIR/train/CLASS/image or DIR/CL'),
    (['a/1.png'], "has one class only, 'a'; a classifier needs two or more"),
    (['train/a/1.png', 'Training/a/1.png'], '{root} has two folders for train: Training and train'),
    (
      ['train/a/1.png', 'vaild/a/1.png'],
      "{root} has an unknown folder 'vaild' beside its splits, did you mean 'valid'?",
    ),
  ],
)
def test_bad_folder(tmp_path, paths, message):
  assert message.format(root=tmp_path) in error_of(make_folder(tmp_path, *paths))


def test_folders_without_images(tmp_path):
  assert error_of(f'folder:{tmp_path}/no') == (
    f"no folder '{tmp_path}/no'; looked for DIR/train/CLASS/image or DIR/CLASS/image below it"
  )
  assert f'no class folders in {tmp_path}; looked' in error_of(f'folder:{tmp_path}')
  source = make_folder(tmp_path, 'train/a/1.png', 'test/a/1.png')
  for split in ('train', 'test'):
    (tmp_path / split / 'b').mkdir()
  assert error_of(source).startswith(
    f'no images in {tmp_path}/train/b; looked for .jpg .jpeg .jfif'
  )
  make_folder(tmp_path, 'train/b/1.png')
  assert sources.load(source, holdout=0).test.labels.tolist() == [0]
  (tmp_path / 'test/a/1.png').unlink()
  assert error_of(source).startswith(f'no images in {tmp_path}/test/a; looked for')


def test_names_that_are_not_utf8(tmp_path):
  odd = os.fsdecode(b'b/caf\xe9.png')
  source = make_folder(tmp_path, 'a/1.png', 'b/2.png')
  os.rename(tmp_path / 'b/2.png', tmp_path / odd)
  train = pickle.loads(pickle.dumps(sources.load(source, holdout=0).train))
  assert train[1].name == f'{tmp_path}/{odd}'
  assert pixels_of(train[1])[0, 0].tolist() == [1, 0, 0]


def test_a_large_folder_takes_little_memory(tmp_path, monkeypatch):
  """14 million images, and a copy of the split in every process that reads."""
  for name in ('n01440764', 'n01443537'):
    (tmp_path / name).mkdir()
  files = {
    cls: [f'{cls}/{cls}_{i * 7919 % 30011}.JPEG' for i in range(5_000)]
    for cls in ('n01440764', 'n01443537')
  }
  monkeypatch.setattr(folder_source, '_images_below', lambda root, folder, others: [files[folder]])
  train = sources.load(f'folder:{tmp_path}', holdout=0).train
  assert len(pickle.dumps(train)) < 10 * len(train)
  expected = [f'{tmp_path}/{name}' for found in files.values() for name in sorted(found)]
  assert [train.path(i) for i in range(10_000)] == expected
  assert train.labels.tolist() == [0] * 5_000 + [1] * 5_000


def test_what_a_folder_holds_beside_images_is_told(tmp_path, capsys):
  """A zip file from a Mac has its notes in __MACOSX; a phone's pictures may be HEIC."""
  source = make_folder(tmp_path, 'a/1.png', 'b/1.png', '__MACOSX/a/._1.png')
  (tmp_path / 'a/1.png').rename(tmp_path / 'a/1.JFIF')
  for name in ('a/1.heic', 'a/2.HEIC', 'b/notes'):
    (tmp_path / name).touch()
  data = sources.load(source, holdout=0)
  assert data.class_names == ('a', 'b') and len(data.train) == 2
  assert capsys.readouterr().out == (
    f'{tmp_path}: left out 3 files that by name are no images (.heic 2, none 1)\n'
  )


def test_unreadable_files_are_named(tmp_path):
  source = make_folder(tmp_path, 'a/1.png', 'b/1.png')
  os.symlink(tmp_path / 'gone.png', tmp_path / 'b/2.png')
  train = sources.load(source, holdout=0).train
  with pytest.raises(UserError, match=f'cannot read {tmp_path}/b/2.png: No such file'):
    images.decode(train[2].image, train[2].name)


def test_a_file_system_that_does_not_answer_leaves_no_image_out(tmp_path, monkeypatch):
  train = sources.load(make_folder(tmp_path, 'a/1.png', 'b/1.png'), holdout=0).train

  def read(path):
    raise OSError(errno.EIO, 'Input/output error')

  monkeypatch.setattr(pathlib.Path, 'read_bytes', read)
  with pytest.raises(OSError, match=f"Input/output error: '{tmp_path}/a/1.png'"):
    train[0]


# --- Digests ------------------------------------------------------------------------------------


def test_the_digest_of_arrays_is_of_all_that_they_hold(tmp_path):

  def digest(images, labels):
    source = npz(tmp_path / 'a.npz', x_train=images, y_train=labels)
    return sources.load(source, holdout=0).train.digest()

  x, y = random_images(10), np.arange(10) % 2
  first = digest(x, y)
  assert digest(x, y.astype(np.uint8)) == first and len(first) == 64
  others = {digest(x[:9], y[:9]), digest(x, 1 - y), digest(random_images(10, size=5), y)}
  assert len(others | {first, digest(255 - x, y)}) == 5


def test_the_digest_of_a_folder_is_of_names_and_labels(tmp_path):
  names = [f'{c}/{i}.png' for c in 'abc' for i in range(50)]
  folder = tmp_path / 'set'

  def digest():
    return sources.load(f'folder:{folder}', holdout=0).train.digest()

  make_folder(folder, *names)
  seen = [digest()]
  (folder / 'a/1.png').rename(folder / 'a/1b.png')  # the same place in the order
  seen.append(digest())
  (folder / 'b/7.png').rename(folder / 'a/7b.png')
  seen.append(digest())
  make_folder(folder, 'c/new.png')
  seen.append(digest())
  (folder / 'c/9.png').unlink()
  seen.append(digest())
  assert len(set(seen)) == 5
  folder.rename(tmp_path / 'moved')
  folder = tmp_path / 'moved'
  assert digest() == seen[-1]


def test_the_digest_of_held_out_images_is_of_which_they_are(tmp_path):
  source = npz(tmp_path / 'a.npz', x_train=random_images(100), y_train=np.arange(100) % 2)
  one, again, other = (sources.load(source, seed=seed) for seed in (0, 0, 1))
  assert one.train.digest() == again.train.digest()
  assert len({d.digest() for data in (one, other) for d in (data.train, data.validation)}) == 4


def test_the_digest_of_a_tfds_data_set_needs_no_reading(cifar10, tmp_path):
  shutil.copytree(cifar10[0] / 'cifar10', tmp_path / 'cifar10')
  for file in (tmp_path / 'cifar10/3.0.2').glob('cifar10-train*'):
    file.unlink()

  def digest(data_dir, split='train'):
    data = sources.load('tfds:cifar10', data_dir=str(data_dir), holdout=0)
    return getattr(data, split).digest()

  first = digest(tmp_path)
  assert digest(cifar10[0]) == first != digest(cifar10[0], 'test')
  info = json.loads((tmp_path / 'cifar10/3.0.2/dataset_info.json').read_text())
  train = next(split for split in info['splits'] if split['name'] == 'train')
  train['shardLengths'] = ['101']
  (tmp_path / 'cifar10/3.0.2/dataset_info.json').write_text(json.dumps(info))
  assert digest(tmp_path) != first


# --- TFDS ---------------------------------------------------------------------------------------

CIFAR10_NAMES = [
  'airplane',
  'automobile',
  'bird',
  'cat',
  'deer',
  'dog',
  'frog',
  'horse',
  'ship',
  'truck',
]


def cifar_archive(path, prefix, train_files, test_files, label_files, per_file):
  """Writes what CIFAR's archive looks like; returns {split: (labels [N, keys], pixels)}."""
  rng = np.random.default_rng(0)
  members, arrays = {'readme.html': b'hello'}, {}
  for split, files in (('train', train_files), ('test', test_files)):
    count = per_file * len(files)
    labels = np.stack([np.arange(count) % len(names) for names in label_files.values()], -1)
    pixels = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    records = np.concatenate(
      [labels.astype(np.uint8), pixels.transpose(0, 3, 1, 2).reshape(count, -1)], 1
    )
    for file, part in zip(files, np.split(records, len(files)), strict=True):
      members[file] = part.tobytes()
    arrays[split] = labels, pixels
  for file, names in label_files.items():
    members[file] = ('\n'.join(names) + '\n\n').encode()
  path.parent.mkdir(parents=True)
  with tarfile.open(path, 'w:gz') as archive:
    for name, content in members.items():
      entry = tarfile.TarInfo(prefix + name)
      entry.size = len(content)
      archive.addfile(entry, io.BytesIO(content))
  return arrays


@pytest.fixture(scope='module')
def tfds():
  """TFDS; fails when something here has made it import TensorFlow."""
  import tensorflow_datasets

  before = 'tensorflow' in sys.modules
  yield tensorflow_datasets
  assert ('tensorflow' in sys.modules) == before


def prepare_from(archive, source, data_dir, tfds):
  """Loads `source`, with `archive` for the download; returns it and what was printed."""
  printed = io.StringIO()
  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
    patch.setattr(tfds.download.DownloadManager, 'download', lambda self, url: archive)
    return sources.load(source, data_dir=str(data_dir)), printed.getvalue()


@pytest.fixture(scope='module')
def cifar10(tmp_path_factory, tfds):
  """Returns (data_dir, arrays, what was printed): CIFAR-10 of 100 + 20 images, prepared."""
  data_dir = tmp_path_factory.mktemp('tfds')
  archive = data_dir / 'downloads/manual/cifar-10-binary.tar.gz'
  arrays = cifar_archive(
    archive,
    'cifar-10-batches-bin/',
    [f'data_batch_{i}.bin' for i in range(1, 6)],
    ['test_batch.bin'],
    {'batches.meta.txt': CIFAR10_NAMES},
    20,
  )
  _, printed = prepare_from(archive, 'tfds:cifar10', data_dir, tfds)
  return data_dir, arrays, printed


def test_cifar10_is_prepared_from_its_archive(cifar10):
  data_dir, arrays, printed = cifar10
  assert printed == (
    f'Preparing cifar10 in {data_dir}/cifar10/3.0.2: 162.17 MiB from '
    'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz (once)\n'
  )
  data = sources.load('tfds:cifar10', data_dir=str(data_dir), holdout=0)
  assert data.name == 'cifar10' and data.class_names == tuple(CIFAR10_NAMES)
  assert data.validation is None
  for split, name in ((data.train, 'train'), (data.test, 'test')):
    labels, pixels = arrays[name]
    expected = {p.tobytes(): int(label) for p, (label,) in zip(pixels, labels, strict=True)}
    found = {pixels_of(e).tobytes(): e.label for e in split}
    assert found == expected
    np.testing.assert_array_equal(split.labels, [e.label for e in split])
    assert split.labels.dtype == np.int32
  assert isinstance(data.train[17].image, bytes)
  assert (data.train[17].index, data.train[17].name) == (17, 'cifar10 train #17')


def test_the_order_is_that_of_tfds(cifar10, tfds):
  data_dir, arrays, _ = cifar10
  reference = tfds.data_source('cifar10', split='train', data_dir=data_dir, download=False)
  ids = [int(record['id'].decode().removeprefix('train_')) for record in reference]
  assert sorted(ids) == list(range(100)) and ids != sorted(ids)
  data = sources.load('tfds:cifar10', data_dir=str(data_dir), holdout=0)
  for i, example in zip(ids, data.train, strict=True):
    np.testing.assert_array_equal(pixels_of(example), arrays['train'][1][i])


def test_cifar100_is_prepared_from_its_archive(tmp_path, tfds):
  fine = [f'fine_{i}' for i in range(100)]
  archive = tmp_path / 'downloads/manual/cifar-100-binary.tar.gz'
  arrays = cifar_archive(
    archive,
    'cifar-100-binary/',
    ['train.bin'],
    ['test.bin'],
    {'coarse_label_names.txt': [f'coarse_{i}' for i in range(20)], 'fine_label_names.txt': fine},
    100,
  )
  data, printed = prepare_from(archive, 'tfds:cifar100:3.0.2', tmp_path, tfds)
  assert printed.startswith(f'Preparing cifar100 in {tmp_path}/cifar100/3.0.2: 160.71 MiB from ')
  assert data.class_names == tuple(fine) and (len(data.train), len(data.validation)) == (90, 10)
  labels, pixels = arrays['test']
  assert {pixels_of(e).tobytes(): e.label for e in data.test} == {
    p.tobytes(): int(label) for p, (_, label) in zip(pixels, labels, strict=True)
  }


def test_tfds_holds_out_and_reads_in_any_order(cifar10):
  data = sources.load('tfds:cifar10:3.0.2', data_dir=str(cifar10[0]))
  assert (len(data.train), len(data.validation), len(data.test)) == (90, 10, 20)
  assert np.bincount(data.validation.labels).tolist() == [1] * 10
  one_by_one = [data.train[i] for i in range(90)]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    in_threads = list(pool.map(data.train.__getitem__, range(90)))
  copy = pickle.loads(pickle.dumps(data.train))
  for others in (data.train, in_threads, copy, data.train.__getitems__(range(90))):
    for a, b in zip(one_by_one, others, strict=True):
      assert (a.image, a.label, a.index, a.name) == (b.image, b.label, b.index, b.name)
  with pytest.raises(IndexError, match='cifar10 test has 20 examples, none is #20'):
    data.test[20]


def test_the_environment_says_where_data_sets_are(cifar10, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(cifar10[0]))
  assert len(sources.load('tfds:cifar10', holdout=0).train) == 100


def test_a_wrong_archive(tmp_path, tfds, capsys):
  manual = tmp_path / 'downloads/manual'
  manual.mkdir(parents=True)
  (manual / 'cifar-10-binary.tar.gz').write_bytes(b'something else')
  assert error_of('tfds:cifar10', data_dir=str(tmp_path)) == (
    f'cifar-10-binary.tar.gz in {tmp_path}/downloads has the wrong checksum; remove it'
  )


def test_no_network(tmp_path, tfds, monkeypatch, capsys):
  import requests

  def fail(*args, **kwargs):
    raise requests.ConnectionError('Name or service not known')

  monkeypatch.setattr(requests, 'head', fail)
  assert error_of('tfds:cifar10', data_dir=str(tmp_path)) == (
    'cannot download cifar10: no network, or https://www.cs.toronto.edu/~kriz/'
    'cifar-10-binary.tar.gz does not answer; bring cifar-10-binary.tar.gz to '
    f'{tmp_path}/downloads/manual, or give the data_dir where TFDS has prepared cifar10 as '
    'ArrayRecord'
  )
  assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize(
  'error,message',
  [('HTTP code: 404', 'HTTP code: 404'), (OSError(28, 'No space left on device'), 'No space')],
)
def test_preparing_that_fails(tmp_path, tfds, monkeypatch, capsys, error, message):

  def fail(self, url):
    raise tfds.download.DownloadError(error) if isinstance(error, str) else error

  monkeypatch.setattr('requests.head', lambda url, timeout: None)
  monkeypatch.setattr(tfds.download.DownloadManager, 'download', fail)
  found = error_of('tfds:cifar10', data_dir=str(tmp_path))
  assert found.startswith(f'cannot prepare cifar10 in {tmp_path}: ') and message in found


def test_what_another_process_has_prepared_meanwhile_is_read(cifar10, tfds, monkeypatch):
  """Several processes of a run may begin at once, and one writes its data set first."""
  data_dir, *_ = cifar10

  def slower(self, **kwargs):
    raise OSError(39, 'Directory not empty')

  monkeypatch.setattr('requests.head', lambda url, timeout: None)
  monkeypatch.setattr(tfds.core.DatasetBuilder, 'download_and_prepare', slower)
  builder = tfds.builder('cifar10', data_dir=data_dir)
  cifar.prepare_cifar(builder, str(data_dir))
  builder = tfds.builder('cifar10', data_dir=data_dir / 'elsewhere')
  with pytest.raises(UserError, match='Directory not empty'):
    cifar.prepare_cifar(builder, str(data_dir / 'elsewhere'))


@pytest.mark.parametrize(
  'name,message',
  [
    ('cifar11', "unknown TFDS data set 'cifar11' (all: https://www.tensorflow.org/datasets/"),
    ('CIFAR10', "overview), did you mean 'cifar10'?"),
    ('imagenet2021', "did you mean 'imagenet2012'?"),
    ('cifar-10', "'tfds:cifar-10' is not of the form tfds:NAME[/CONFIG][:VERSION], did you mean "),
    ('', "'tfds:' is not of the form tfds:NAME[/CONFIG][:VERSION]"),
    ('huggingface:mnist', 'is not of the form tfds:NAME[/CONFIG][:VERSION]'),
    (
      'cifar10:9.9.9',
      "TFDS cannot open 'cifar10:9.9.9': Dataset cifar10 cannot be loaded at "
      'version 9.9.9, only: 3.0.2.',
    ),
    ('cifar10/large', "TFDS cannot open 'cifar10/large': BuilderConfig large not found"),
  ],
)
def test_unknown_tfds_names(tmp_path, tfds, name, message):
  assert message in error_of(f'tfds:{name}', data_dir=str(tmp_path))


ENVIRONMENT = (
  'python3 -m venv tfds-env && tfds-env/bin/pip install tensorflow-cpu apache-beam '
  'mlcroissant tensorflow-datasets importlib_resources && tfds-env/bin/tfds'
)


@pytest.mark.parametrize(
  'name,before',
  [
    ('mnist', 'prepare it with: '),
    (
      'imagenet2012',
      'put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar (from '
      "https://image-net.org/download-images) in '{root}'/downloads/manual, then: ",
    ),
    (
      'imagenet2012_subset/1pct',
      'put the files that https://www.tensorflow.org/datasets/catalog/'
      "imagenet2012_subset asks for in '{root}'/downloads/manual, then: ",
    ),
  ],
)
def test_what_tfds_cannot_prepare_tfds(tmp_path, tfds, name, before):
  root = f'{tmp_path}/data sets'  # the commands can be pasted, whatever the path
  assert error_of(f'tfds:{name}', data_dir=root) == (
    f'tfds:{name} is not prepared in {root}; {before.format(root=root)}{ENVIRONMENT} build {name}'
    f" --file_format=array_record --data_dir='{root}'"
  )


def test_tfrecord_alone_is_not_enough_but_may_stand_beside(cifar10, tmp_path):
  folder = tmp_path / 'cifar10/3.0.2'
  shutil.copytree(cifar10[0] / 'cifar10/3.0.2', folder)
  info = json.loads((folder / 'dataset_info.json').read_text())
  info['fileFormat'] = 'tfrecord'
  (folder / 'dataset_info.json').write_text(json.dumps(info))
  assert error_of('tfds:cifar10', data_dir=str(tmp_path)) == (
    f'tfds:cifar10 is prepared in {tmp_path} as tfrecord only, which has no random access; add '
    f'ArrayRecord with: {ENVIRONMENT} convert_format --dataset_version_dir={folder} '
    '--out_file_format=array_record'
  )
  info['alternativeFileFormats'] = ['array_record']  # what `tfds convert_format` adds
  (folder / 'dataset_info.json').write_text(json.dumps(info))
  assert len(sources.load('tfds:cifar10', data_dir=str(tmp_path), holdout=0).train) == 100


def test_a_half_copied_data_set(cifar10, tmp_path):
  shutil.copytree(cifar10[0] / 'cifar10', tmp_path / 'cifar10')
  for file in (tmp_path / 'cifar10/3.0.2').glob('cifar10-train*'):
    file.unlink()
  data = sources.load('tfds:cifar10', data_dir=str(tmp_path), holdout=0)
  for read in (lambda: data.train[0], lambda: data.train.labels):
    with pytest.raises(UserError, match='cannot read cifar10 train: .*; prepare it again'):
      read()


def build(tfds, data_dir, splits, features=None):
  """Prepares a data set of our own: {split: labels}."""
  png = io.BytesIO()
  Image.new('RGB', (5, 4), (9, 8, 7)).save(png, 'PNG')

  class OurShapes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Small images of one colour."""

    VERSION = tfds.core.Version('1.0.0')
    pkg_dir_path = data_dir

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict(
          features
          or {
            'image': tfds.features.Image(),
            'label': tfds.features.ClassLabel(names=['disc', 'ring', 'star']),
          }
        ),
      )

    def _split_generators(self, downloads):
      return {split: self._generate_examples(labels) for split, labels in splits.items()}

    def _generate_examples(self, labels):
      for i, label in enumerate(labels):
        yield i, {'image': io.BytesIO(png.getvalue()), 'label': label}

  with contextlib.redirect_stdout(io.StringIO()):
    OurShapes(data_dir=data_dir, file_format='array_record').download_and_prepare()
  return sources.load('tfds:our_shapes', data_dir=str(data_dir))


def test_a_tfds_data_set_with_its_own_validation(tmp_path, tfds):
  data = build(
    tfds, tmp_path, {'train': [0, 1, 2, 1], 'val': [2, 1], 'test': [-1, -1, -1], 'extra': [0]}
  )
  assert data.name == 'our_shapes' and data.class_names == ('disc', 'ring', 'star')
  assert (len(data.train), len(data.validation), data.held_out.size) == (4, 2, 0)
  assert data.test is None  # its labels are secret
  assert data.validation[0].name == 'our_shapes val #0'
  assert pixels_of(data.train[0]).shape == (4, 5, 3)


def test_the_digest_tells_tfds_splits_of_one_size(tmp_path, tfds):
  data = build(tfds, tmp_path, {'train': [0, 1], 'validation': [0, 1]})
  assert data.train.digest() != data.validation.digest()


def test_tfds_labels_are_checked(tmp_path, tfds):
  data = build(tfds, tmp_path, {'train': [-1, -1, -1], 'validation': [0]})
  for read in (lambda: data.train[1], lambda: data.train.labels):
    with pytest.raises(UserError, match=r'our_shapes train #\d: label -1 is not one of the 3 cl'):
      read()


def test_tfds_without_a_split_we_know(tmp_path, tfds):
  with pytest.raises(
    UserError,
    match='our_shapes has none of the splits train, validation and test; it has easy, hard',
  ):
    build(tfds, tmp_path, {'easy': [0], 'hard': [1]})


def test_tfds_that_is_not_classification(tmp_path, tfds):
  features = tfds.features
  with pytest.raises(
    UserError,
    match=r'our_shapes is not made of image \(Image\) and label '
    r'\(ClassLabel\); it has image \(Image\), label \(Text\)',
  ):
    build(
      tfds, tmp_path, {'train': ['a', 'b']}, {'image': features.Image(), 'label': features.Text()}
    )
