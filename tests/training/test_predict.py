"""predict_dataset: every image of a source, in shards."""

import dataclasses
import json
import re
import signal

import jax
import numpy as np
import pytest
from PIL import Image

from cvt_flax import batch_predict, predict_dataset, predict_images, storage
from cvt_flax.data import sources
from cvt_flax.data.array_source import ArraySplit
from cvt_flax.errors import Interrupted, UserError
from cvt_flax.training import predict
from cvt_flax.weights import pretrained
from cvt_flax.weights.description import Description
from cvt_flax.weights.preprocessing import Preprocessing
from tests.models.torch_weights import drawn_variables
from tests.weights.models import GELU_MODEL

NAMES = ('ant', 'bee', 'cat', 'dog', 'eel')
# Eight devices compute a batch, and shards end within one.
SIZES = {'batch_size': 8, 'shard_size': 10}


@pytest.fixture(scope='module')
def weights():
  known = Description(GELU_MODEL, NAMES, Preprocessing(32, 0.8))
  return pretrained.Weights(known, drawn_variables(GELU_MODEL), pretrained.FLAX, 'drawn')


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  """24 pictures, of which one is broken and one is gone, in folders; the 25th is hidden."""
  root = tmp_path_factory.mktemp('photos')
  rng = np.random.default_rng(0)
  for i in range(25):
    path = root / ('', 'a', 'a/b')[i % 3] / (f'{i}.png' if i else '.hidden.png')
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, (*rng.integers(30, 50, 2), 3), np.uint8)
    Image.fromarray(pixels).save(path)
  (root / 'a/7.png').write_bytes(b'no picture')
  (root / 'a/b/8.png').unlink()
  (root / 'a/b/8.png').symlink_to('nowhere')
  return root


@pytest.fixture(scope='module')
def written(weights, photos, tmp_path_factory):
  folder = tmp_path_factory.mktemp('shards') / 'new' / 'shards'
  return predict_dataset(weights, str(photos), folder, features=True, **SIZES)


def read(shards):
  """Returns what shards hold together."""
  arrays = [dict(np.load(path)) for path in shards]
  return jax.tree.map(lambda *x: np.concatenate(x), *arrays)


def test_every_image_is_in_a_shard(written, weights, photos):
  assert [path.name for path in written] == [f'shard-0000{i}-of-00003.npz' for i in range(3)]
  arrays = read(written)
  np.testing.assert_array_equal(arrays['index'], np.arange(24))
  expected = [
    str(p) for folder in ('', 'a', 'a/b') for p in sorted((photos / folder).glob('[0-9]*.png'))
  ]
  assert arrays['path'].tolist() == expected
  assert 'label' not in arrays  # a folder without classes
  broken = [expected.index(f'{photos}/{name}') for name in ('a/7.png', 'a/b/8.png')]
  assert np.flatnonzero(~arrays['readable']).tolist() == broken
  assert (arrays['classes'][broken] == -1).all()
  assert np.isnan(arrays['probabilities'][broken]).all()
  assert np.isnan(arrays['features'][broken]).all()
  there = [i for i in range(24) if i not in broken]
  alone = list(predict_images(weights, [expected[i] for i in there]))
  assert arrays['classes'][there].tolist() == [list(p.classes) for p in alone]
  shares = [p.probabilities for p in alone]
  np.testing.assert_allclose(arrays['probabilities'][there], shares, rtol=1e-4)


def test_features_are_what_the_classifier_reads(written, weights):
  arrays = read(written)
  head = weights.variables['params']['head']
  logits = arrays['features'] @ head['kernel'] + head['bias']
  shares = np.sort(jax.nn.softmax(logits))[:, ::-1]
  np.testing.assert_allclose(arrays['probabilities'], shares, rtol=1e-4)


def test_features_cost_nothing(weights):
  model, steps = weights.model, weights.description.preprocessing
  mesh = predict.sharding.make_mesh(1)
  image = jax.ShapeDtypeStruct((8, 32, 32, 3), np.uint8)
  of = {name: jax.ShapeDtypeStruct((8,), np.int32) for name in ('label', 'mask')}
  flops = []
  for features in (False, True):
    compute = predict._jitted(model, steps, 5, features, mesh)
    compiled = compute.lower(weights.variables, {'image': image} | of).compile()
    flops.append(compiled.cost_analysis()['flops'])
  assert flops[1] == pytest.approx(flops[0], rel=1e-3)


def test_job_json_says_what_the_shards_are_of(written):
  job = json.loads((written[0].parent / 'job.json').read_text())
  assert job['class_names'] == list(NAMES) and job['dtype'] == 'float32'
  assert job['images'] == 24 and job['label_names'] is None
  assert job['model']['preprocessor']['size'] == {'shortest_edge': 32}


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_it_goes_on_with_what_is_missing(
  number, code, weights, photos, written, tmp_path, monkeypatch, capsys
):
  write = storage.write_whole

  def stop_after_a_shard(path, data):
    write(path, data)
    if path.suffix == '.npz':
      signal.raise_signal(number)

  monkeypatch.setattr(storage, 'write_whole', stop_after_a_shard)
  monkeypatch.setattr(predict, '_AHEAD', 0)  # or all three batches are computed by then
  with pytest.raises(Interrupted, match='the same command goes on') as stop:
    predict_dataset(weights, str(photos), tmp_path, features=True, **SIZES)
  assert stop.value.exit_code == code
  monkeypatch.undo()
  first, *rest = (tmp_path / path.name for path in written)
  assert first.exists() and not any(path.exists() for path in rest)
  when = first.stat().st_mtime_ns
  # Another shard is there already.
  rest[1].write_bytes(written[2].read_bytes())
  shards = predict_dataset(weights, f'{photos}/', tmp_path, features=True, **SIZES)
  assert '2 of 3 shards are there' in capsys.readouterr().out
  assert first.stat().st_mtime_ns == when
  for path, whole in zip(shards, written, strict=True):
    assert path.read_bytes() == whole.read_bytes()
  assert predict_dataset(weights, str(photos), tmp_path, features=True, **SIZES) == shards
  assert '3 of 3 shards are there' in capsys.readouterr().out


def test_a_split_with_labels(weights, tmp_path, capsys):
  with pytest.raises(UserError, match=r"split='': digits has train .*validation .*test \(360 "):
    predict_dataset(weights, 'digits', tmp_path, **SIZES)
  shards = predict_dataset(
    weights, 'digits', tmp_path, split='test', top=9, batch_size=360, dtype='bfloat16'
  )
  (shard,) = shards
  arrays = dict(np.load(shard))
  assert arrays.keys() == {'index', 'label', 'readable', 'classes', 'probabilities'}
  digits = sources.load('digits')
  np.testing.assert_array_equal(arrays['label'], digits.test.labels)
  assert json.loads((tmp_path / 'job.json').read_text())['label_names'] == [*digits.class_names]
  assert arrays['classes'].shape == (360, 5) and arrays['readable'].all()
  assert json.loads((tmp_path / 'job.json').read_text())['dtype'] == 'bfloat16'
  assert re.search(r'shard 1 of 1  [\d,]+ images/s', capsys.readouterr().out)


def test_a_split_with_several_labels_an_image(weights, tmp_path, monkeypatch):
  one = ArraySplit._read

  def several(split, index):
    return dataclasses.replace(one(split, index), labels=(1, 2))

  monkeypatch.setattr(ArraySplit, 'multi_label', True)
  monkeypatch.setattr(ArraySplit, '_read', several)
  (shard,) = predict_dataset(weights, 'digits', tmp_path, split='test', batch_size=360)
  assert 'label' in np.load(shard)


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(top=0), 'top=0: at least 1'),
    (dict(batch_size=0), 'batch_size=0: at least 1'),
    (dict(batch_size=12), 'batch_size=12 does not divide over 8 devices: 8 or 16 would$'),
    (dict(shard_size=-1), 'shard_size=-1: at least 1'),
    (dict(workers=-1), 'workers=-1: at least 0'),
    (dict(image_size=-1), 'image_size=-1: at least 0'),
    (dict(image_size=2), 'images of 2x2 are too small'),
    (dict(dtype='float16'), "dtype='float16': float32 or bfloat16"),
    (dict(split='test'), "a folder, for which split='test' .* no effect; folder:.* has splits"),
    (dict(data_dir='data'), "data_dir='data' have no effect"),
    (dict(source='digit'), "unknown source 'digit'.*did you mean 'digits'"),
    (dict(source='no/photos'), 'no/photos: there is no such folder'),
    (dict(source='digits', split='val'), "split='val': digits has train"),
  ],
)
def test_what_cannot_be_done(changes, message, weights, photos, tmp_path):
  arguments = {'source': str(photos)} | SIZES | changes
  with pytest.raises(UserError, match=message):
    predict_dataset(weights, folder=tmp_path / 'shards', **arguments)
  assert not (tmp_path / 'shards').exists()


def test_a_folder_without_images(weights, tmp_path):
  with pytest.raises(UserError, match='no images in .*; looked for .jpg'):
    predict_dataset(weights, str(tmp_path), tmp_path / 'shards')


def test_a_folder_of_something_else(weights, photos, written, tmp_path):
  with pytest.raises(UserError, match='shards of another call, with another features, top: give'):
    predict_dataset(weights, str(photos), written[0].parent, top=2, **SIZES)
  other = pretrained.Weights(
    dataclasses.replace(weights.description, model=GELU_MODEL.clone(activation='quick_gelu')),
    weights.variables,
    pretrained.FLAX,
    'drawn',
  )
  with pytest.raises(UserError, match='shards of another call, with another model: give'):
    predict_dataset(other, str(photos), written[0].parent, features=True, **SIZES)
  (tmp_path / 'notes.txt').touch()
  with pytest.raises(UserError, match='notes.txt/shards: Not a directory'):
    predict_dataset(weights, str(photos), tmp_path / 'notes.txt' / 'shards', **SIZES)
  with pytest.raises(UserError, match='is there and holds no job.json'):
    predict_dataset(weights, str(photos), tmp_path, **SIZES)


def test_the_command_line(photos, tmp_path, capsys):
  command = ['--weights=cvt-nano-cifar10', str(photos), str(tmp_path / 'shards'), '--top=1']
  batch_predict.main(command)
  out = capsys.readouterr().out
  assert 'a/7.png cannot be read' in out and f'{tmp_path}/shards: 1 shard in all' in out
  with pytest.raises(UserError, match='--help explains'):
    batch_predict.main(command[1:])
