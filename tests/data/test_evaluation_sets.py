"""Evaluation sets: TFDS's own builders with a few images made on the spot, in place of theirs."""

import contextlib
import functools
import io
import multiprocessing
import operator
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from cvt_flax.data import evaluation_sets, images, sources
from cvt_flax.errors import UserError


@pytest.fixture(scope='module')
def tfds():
  """TFDS; fails when something here has made it import TensorFlow."""
  import tensorflow_datasets

  before = 'tensorflow' in sys.modules
  yield tensorflow_datasets
  assert ('tensorflow' in sys.modules) == before


@pytest.fixture(scope='module')
def prepare(tmp_path_factory, tfds):
  """Prepares name with {split: [features]}, the i-th image of colour i; returns the data_dir."""

  def prepare(name, **splits):
    data_dir = tmp_path_factory.mktemp('tfds')

    def generate(examples):
      for i, example in enumerate(examples):
        png = io.BytesIO()
        Image.new('RGB', (5, 4), (i, 0, 0)).save(png, 'PNG')
        png.seek(0)
        features = {'image': png, 'file_name': str(i), **example}
        yield i, {key: features[key] for key in builder.info.features}

    builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
    builder._split_generators = lambda _: {s: generate(e) for s, e in splits.items()}
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare()
    return str(data_dir)

  return prepare


@pytest.fixture(scope='module')
def synsets(tfds, tmp_path_factory):
  """The names of ImageNet's 1,000 classes, in TFDS's order."""
  builder = tfds.builder('imagenet2012', data_dir=tmp_path_factory.mktemp('none'))
  return tuple(builder.info.features['label'].names)


def labelled(*labels):
  return [{'label': label} for label in labels]


def by_colour(split, what='label'):
  """Returns {colour of the image: its label} after checking that all ways of reading agree."""
  examples = list(split)
  assert len(split) == len(examples)
  assert (
    [e.label for e in examples]
    == split.labels.tolist()
    == [split[i].label for i in range(len(split))]
  )
  return {images.decode(e.image, e.name).getpixel((0, 0))[0]: getattr(e, what) for e in examples}


@pytest.mark.parametrize(
  'name,metric',
  [
    ('imagenet_v2', 'imagenet_v2'),
    ('imagenet_v2/topimages', 'imagenet_v2_topimages'),
    ('imagenet_v2/threshold-0.7:3.0.0', 'imagenet_v2_threshold-0.7_3.0.0'),
    ('imagenet_sketch', 'imagenet_sketch'),
  ],
)
def test_sets_of_all_classes(prepare, synsets, name, metric):
  data_dir = prepare(name, test=labelled(999, 5, 'n01440764'))
  found = evaluation_sets.load(f'tfds:{name}', data_dir=data_dir, class_names=synsets)
  assert found.name == metric and found.classes is None and not found.split.multi_label
  assert by_colour(found.split) == {0: 999, 1: 5, 2: 0}
  assert found.split.labels.dtype == np.int32


def test_classes_go_by_their_names(prepare, synsets):
  """TFDS itself has two orders of ImageNet's classes."""
  data_dir = prepare('imagenet_resized/8x8', validation=labelled(0, 'n01440764', synsets[5]))
  load = functools.partial(evaluation_sets.load, 'tfds:imagenet_resized/8x8', data_dir=data_dir)
  found = load(class_names=synsets)
  assert by_colour(found.split) == {0: synsets.index('n02119789'), 1: 0, 2: 5}
  assert found.classes is None
  found = load(class_names=('unknown', *reversed(synsets)))
  assert by_colour(found.split) == {0: 1000 - synsets.index('n02119789'), 1: 1000, 2: 995}
  assert found.classes.tolist() == [False] + [True] * 1000


@pytest.mark.parametrize('name', ['imagenet_a', 'imagenet_r'])
def test_only_classes_that_occur_compete(prepare, synsets, name):
  data_dir = prepare(name, test=labelled(7, 3, 7, 998))
  found = evaluation_sets.load(f'tfds:{name}', data_dir=data_dir, class_names=synsets)
  assert np.flatnonzero(found.classes).tolist() == [3, 7, 998] and found.classes.shape == (1000,)
  assert by_colour(found.split) == {0: 7, 1: 3, 2: 7, 3: 998}
  three = tuple(synsets[i] for i in (998, 3, 7))
  found = evaluation_sets.load(f'tfds:{name}', data_dir=data_dir, class_names=three)
  assert found.classes is None and by_colour(found.split) == {0: 2, 1: 1, 2: 2, 3: 0}
  with pytest.raises(
    UserError,
    match=f"tfds:{name} has the class '{synsets[998]}', which is not one of the 998 of the model",
  ):
    evaluation_sets.load(f'tfds:{name}', data_dir=data_dir, class_names=synsets[:998])


def test_a_set_of_a_few_classes(prepare, synsets):
  data_dir = prepare('imagenette', train=labelled(0, 0, 0), validation=labelled(9, 1))
  found = evaluation_sets.load('tfds:imagenette', data_dir=data_dir, class_names=synsets)
  names = [synsets[i] for i in np.flatnonzero(found.classes)]
  assert len(names) == 10 and names[0] == 'n01440764' and names[-1] == 'n03888257'
  assert by_colour(found.split) == {0: synsets.index('n03888257'), 1: synsets.index('n02102040')}


REAL = [
  {'original_label': 3, 'real_label': []},
  {'original_label': 4, 'real_label': [999]},
  {'original_label': 5, 'real_label': ['n01440764', 5, 7]},
]


def test_real(prepare, synsets):
  data_dir = prepare('imagenet2012_real', validation=REAL)
  source = 'tfds:imagenet2012_real'
  found = evaluation_sets.load(source, data_dir=data_dir, class_names=synsets)
  assert found.name == 'imagenet2012_real' and found.classes is None and found.split.multi_label
  assert by_colour(found.split) == {0: 3, 1: 4, 2: 5}
  assert by_colour(found.split, 'labels') == {0: (), 1: (999,), 2: (0, 5, 7)}
  found = evaluation_sets.load(source, data_dir=data_dir, class_names=(*reversed(synsets), 'x'))
  assert by_colour(found.split, 'labels') == {0: (), 1: (0,), 2: (999, 994, 992)}
  assert np.flatnonzero(~found.classes).tolist() == [1000]


def test_real_labels_are_checked(prepare, synsets, tmp_path):
  data_dir = prepare('imagenet2012_real', validation=REAL)
  shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
  for key in ('original_label', 'real_label'):
    names = tmp_path / f'imagenet2012_real/1.0.0/{key}.labels.txt'
    names.write_text('\n'.join(synsets[:999]))
  features = tmp_path / 'imagenet2012_real/1.0.0/features.json'
  features.write_text(features.read_text().replace('"1000"', '"999"'))
  found = evaluation_sets.load(
    'tfds:imagenet2012_real', data_dir=str(tmp_path), class_names=synsets
  )
  with pytest.raises(UserError, match=r'validation #\d: label 999 is not one of the 999 classes'):
    list(found.split)


def npz(path, **splits):
  """Writes splits of images with these labels."""
  arrays = {}
  for split, labels in splits.items():
    arrays[f'x_{split}'] = np.zeros((len(labels), 4, 4, 3), np.uint8)
    arrays[f'y_{split}'] = np.array(labels)
  np.savez(path, class_names=['ant', 'bee', 'cat'], **arrays)
  return f'npz:{path}'


@pytest.mark.parametrize(
  'splits,taken',
  [('train val test', 'test'), ('train val', 'val'), ('val test', 'test'), ('train', 'train')],
)
def test_test_before_validation_before_train(tmp_path, splits, taken):
  labels = {'train': [0, 1], 'val': [1, 0, 2], 'test': [2, 2, 1, 0]}
  source = npz(tmp_path / 'x.npz', **{split: labels[split] for split in splits.split()})
  found = evaluation_sets.load(source, data_dir='', class_names=('ant', 'bee', 'cat'))
  assert found.split.labels.tolist() == labels[taken]


def test_a_class_that_the_model_does_not_have(tmp_path):
  source = npz(tmp_path / 'x.npz', test=[0, 1])  # cats may come, though there are none today
  with pytest.raises(UserError) as error:
    evaluation_sets.load(source, data_dir='', class_names=('ant', 'bee', 'cats', 'dog'))
  assert str(error.value) == (
    f"{source} has the class 'cat', which is not one of the 4 of the model, did you mean 'cats'?"
  )


@pytest.mark.parametrize(
  'source,name',
  [
    ('tfds:imagenet_v2/topimages', 'imagenet_v2_topimages'),
    ('digits', 'digits'),
    ('tfds:imagenet_v2:3.0.0', 'imagenet_v2_3.0.0'),
    ('folder:/a/my set/', 'my_set'),
    ('csv:lists/birds.v2.csv', 'birds.v2'),
    ('npz:/x/été.npz', '_t_'),
    ('npz:x.csv', 'x.csv'),
  ],
)
def test_names(source, name):
  assert evaluation_sets.set_name(source) == name


def test_the_digest_tells_set_and_numbers(prepare, synsets):
  data_dir = prepare('imagenet_v2', test=labelled(999, 5))

  def digest(class_names):
    found = evaluation_sets.load('tfds:imagenet_v2', data_dir=data_dir, class_names=class_names)
    return found.split.digest()

  plain = sources.load('tfds:imagenet_v2', data_dir=data_dir).test.digest()
  assert digest(synsets) == digest(synsets) != digest(synsets[::-1])
  assert plain not in (digest(synsets), digest(synsets[::-1]))


def test_a_spawned_process_reads_what_is_sent_to_it(prepare, synsets):
  data_dir = prepare('imagenet2012_real', validation=REAL)
  found = evaluation_sets.load('tfds:imagenet2012_real', data_dir=data_dir, class_names=synsets)
  with multiprocessing.get_context('spawn').Pool(1) as pool:
    there = [pool.apply(operator.getitem, (found.split, i)) for i in range(3)]
    modules = pool.apply(eval, ('sorted(__import__("sys").modules)',))
  for example, other in zip(found.split, there, strict=True):
    for field in ('image', 'label', 'labels', 'index', 'name'):
      assert getattr(other, field) == getattr(example, field)
  assert 'tensorflow_datasets' in modules and 'tensorflow' not in modules
