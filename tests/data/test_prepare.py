"""Folders and CSV lists as TFDS data sets: the same images, labels and places, without TensorFlow.

Those with Apache Beam run where it is installed: `.ci/run` has an environment for them.
"""

import importlib.util
import os
import pathlib
import resource
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from cvt_flax import prepare as command
from cvt_flax.data import images, prepare, sources
from cvt_flax.errors import UserError

needs_beam = pytest.mark.skipif(
  importlib.util.find_spec('apache_beam') is None, reason='wants Apache Beam, see .ci/run'
)


@pytest.fixture
def folder(tmp_path):
  """Two classes, 7 + 5 images of train and 1 + 1 of val; a JPEG is a PNG, another is CMYK."""
  rng = np.random.default_rng(0)
  for name in (
    [f'train/ant/{i}' for i in range(7)]
    + [f'train/bee/{i}' for i in range(5)]
    + [
      'val/ant/x',
      'val/bee/y',
    ]
  ):
    path = tmp_path / f'set/{name}.JPEG'
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((40, 30))
    if name == 'train/ant/2':
      image.save(path, 'PNG')
    elif name == 'train/bee/1':
      image.convert('CMYK').save(path)
    else:
      image.save(path)
  return tmp_path / 'set'


def error_of(function, *args, **options):
  """Returns the message of the UserError that a call ends in; it is one line."""
  with pytest.raises(UserError) as error:
    function(*args, **options)
  assert '\n' not in str(error.value)
  return str(error.value)


def assert_same(found, expected):
  """Two splits have the same images in the same places, and are the same to a network."""
  assert len(found) == len(expected)
  np.testing.assert_array_equal(found.labels, expected.labels)
  assert found.labels.dtype == np.int32
  for a, b in zip(found, expected, strict=True):
    assert (a.image, a.label, a.index) == (b.image, b.label, b.index)
    assert images.decode(a.image, a.name).tobytes() == images.decode(b.image, b.name).tobytes()


def test_a_folder_reads_the_same(folder, tmp_path, monkeypatch):
  monkeypatch.setattr(prepare, '_SHARD', 3)
  data_dir = str(tmp_path / 'tfds')
  seen = []
  source, where = prepare.prepare(
    f'folder:{folder}', 'our_set', data_dir=data_dir, progress=lambda *counts: seen.append(counts)
  )
  assert where == f'{data_dir}/our_set/1.0.0' and len(source.train) == 12
  assert seen == [(i, 5) for i in range(1, 6)]
  assert len(list(pathlib.Path(where).glob('our_set-train.array_record-*-of-00004'))) == 4
  for name in ('our_set', 'our_set:1.0.0'):
    data = sources.load(f'tfds:{name}', data_dir=data_dir)
    assert data.name == 'our_set' and data.class_names == ('ant', 'bee') and data.test is None
    assert_same(data.train, source.train)
    assert_same(data.validation, source.validation)
  # The PNG and the CMYK image have kept their bytes.
  assert data.train[2].image == (folder / 'train/ant/2.JPEG').read_bytes()
  assert data.train[8].image == (folder / 'train/bee/1.JPEG').read_bytes()
  assert data.train[2].image.startswith(b'\x89PNG')
  assert 'tensorflow' not in sys.modules


def test_a_csv_lends_the_same_images(folder, tmp_path):
  paths = sorted(folder.glob('train/*/*.JPEG'), reverse=True)
  lines = [f'set/{path.relative_to(folder)},{path.parent.name}' for path in paths]
  (tmp_path / 'list.csv').write_text('\n'.join(['path,label', *lines]))
  options = {'holdout': 0.25, 'seed': 3}
  source = sources.load(f'csv:{tmp_path}/list.csv', **options)
  prepare.prepare(f'csv:{tmp_path}/list.csv', 'listed', data_dir=str(tmp_path))
  data = sources.load('tfds:listed', data_dir=str(tmp_path), **options)
  np.testing.assert_array_equal(data.held_out, source.held_out)
  assert_same(data.train, source.train)
  assert_same(data.validation, source.validation)


def test_labels_are_read_from_their_file(folder, tmp_path):
  prepare.prepare(f'folder:{folder}', 'our_set', data_dir=str(tmp_path))
  for file in (tmp_path / 'our_set/1.0.0').glob('*array_record*'):
    file.unlink()
  data = sources.load('tfds:our_set', data_dir=str(tmp_path))
  assert data.train.labels.tolist() == [0] * 7 + [1] * 5


def test_shards_are_many_but_not_too_many():
  def lengths(count):
    split = prepare.FileSplit('x', '', _packed(count), np.zeros(count, np.int32))
    return [len(part) for part in prepare._parts(split)]

  assert lengths(1) == [1]
  assert lengths(1_999) == [1_999]
  assert lengths(2_001) == [1_000, 1_001]


def test_the_number_of_shards_is_bounded(monkeypatch):
  monkeypatch.setattr(prepare, '_SHARD', 1)
  monkeypatch.setattr(prepare, '_MAX_SHARDS', 7)
  split = prepare.FileSplit('x', '/a', _packed(100), np.arange(100, dtype=np.int32))
  parts = list(prepare._parts(split))
  assert [len(part) for part in parts] == [14, 14, 14, 15, 14, 14, 15]
  assert [part.path(0) for part in parts[:2]] == ['/a/0.png', '/a/14.png']
  np.testing.assert_array_equal(np.concatenate([part.labels for part in parts]), split.labels)


def _packed(count):
  packer = prepare.NamePacker()
  packer.extend(f'{i}.png' for i in range(count))
  return packer.finish()


def test_more_files_than_may_be_open(folder, tmp_path, monkeypatch):
  (folder / 'train/ant/more').mkdir()
  for i in range(100):
    (folder / f'train/ant/more/{i}.JPEG').hardlink_to(folder / 'val/ant/x.JPEG')
  monkeypatch.setattr(prepare, '_SHARD', 1)
  prepare.prepare(f'folder:{folder}', 'our_set', data_dir=str(tmp_path))
  before = resource.getrlimit(resource.RLIMIT_NOFILE)
  used = len(list(pathlib.Path('/dev/fd').iterdir()))
  resource.setrlimit(resource.RLIMIT_NOFILE, (used + 60, before[1]))
  try:
    train = sources.load('tfds:our_set', data_dir=str(tmp_path)).train
    assert sum(1 for _ in train) == 112
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(
  'source,name,message',
  [
    ('npz:x', 'a', "'npz:x' is not made of image files (allowed: folder:DIR, csv:FILE)"),
    ('digits', 'a', "'digits' is not made of image files (allowed: folder:DIR, csv:FILE)"),
    ('folder:{}', 'My-Set', "name 'My-Set' is not allowed: a-z, 0-9 and _, and a letter first"),
    ('folder:{}', 'food101', "name 'food101' is that of a data set of TFDS; choose another one"),
    ('folder:{}/no', 'a', "no folder '{}/no'; looked for DIR/train/CLASS/image or"),
  ],
)
def test_what_cannot_be_prepared(folder, tmp_path, source, name, message):
  found = error_of(prepare.prepare, source.format(folder), name, data_dir=str(tmp_path / 'tfds'))
  assert found.startswith(message.format(folder))
  assert not (tmp_path / 'tfds').exists()


def test_images_that_are_listed_again(folder, tmp_path):
  rows = [f'{folder}/train/{kind}/0.JPEG,{kind}' for kind in ('ant', 'bee', 'bee')]
  (tmp_path / 'x.csv').write_text('\n'.join(['path,label', *rows, '']))
  found = error_of(prepare.prepare, f'csv:{tmp_path}/x.csv', 'a', data_dir=str(tmp_path / 'tfds'))
  assert found.startswith(f'csv:{tmp_path}/x.csv has 1 images again, and of a it could not be told')
  assert not (tmp_path / 'tfds').exists()


@pytest.mark.parametrize('label', ['an\nt', 'an\x0bt', '"a'])
def test_class_names_that_tfds_does_not_keep(folder, tmp_path, label):
  quoted = label.replace('"', '""')
  text = f'path,label\nset/val/ant/x.JPEG,"{quoted}"\nset/val/bee/y.JPEG,bee\n'
  (tmp_path / 'list.csv').write_text(text)
  source = f'csv:{tmp_path}/list.csv'
  if label == '"a':
    prepare.prepare(source, 'odd', data_dir=str(tmp_path))
    data = sources.load('tfds:odd', data_dir=str(tmp_path), holdout=0)
    assert data.class_names == (label, 'bee')
  else:
    message = error_of(prepare.prepare, source, 'odd', data_dir=str(tmp_path))
    assert message.startswith(f'class name {label!r} cannot be written: TFDS keeps class names')


def test_a_class_of_a_folder_that_is_not_utf8(folder, tmp_path):
  for split in ('train', 'val'):
    (folder / split / 'ant').rename(folder / split / os.fsdecode(b'caf\xe9'))
  message = error_of(prepare.prepare, f'folder:{folder}', 'odd', data_dir=str(tmp_path))
  assert message.startswith(r"class name 'caf\udce9' cannot be written: TFDS keeps class names")


def test_a_class_name_that_begins_with_a_space(folder, tmp_path):
  for split in ('train', 'val'):
    (folder / split / 'ant').rename(folder / split / ' ant')
  message = error_of(prepare.prepare, f'folder:{folder}', 'odd', data_dir=str(tmp_path))
  assert message.startswith("class name ' ant' cannot be written: TFDS keeps class names")


def test_what_is_there_stays(folder, tmp_path):
  (tmp_path / 'a/1.0.0').mkdir(parents=True)
  assert error_of(prepare.prepare, f'folder:{folder}', 'a', data_dir=str(tmp_path)) == (
    f'{tmp_path}/a/1.0.0 is there already, complete or not; remove it or choose another name'
  )
  assert error_of(sources.load, 'tfds:a', data_dir=str(tmp_path)) == (
    f'{tmp_path}/a holds no complete data set; remove it and prepare it again'
  )
  (tmp_path / 'file').touch()
  message = error_of(prepare.prepare, f'folder:{folder}', 'a', data_dir=f'{tmp_path}/file')
  assert message == f'cannot write {tmp_path}/file/a/1.0.0: Not a directory'


def test_a_bucket(folder, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert error_of(prepare.prepare, f'folder:{folder}', 'a', data_dir='gs://bucket/tfds') == (
    'cannot write gs://bucket/tfds: ArrayRecord writes to folders only; mount the bucket'
  )
  assert not (tmp_path / 'gs:').exists()


def test_failing_leaves_nothing(folder, tmp_path):
  bad = folder / 'train/bee/3.JPEG'
  options = {'data_dir': str(tmp_path / 'tfds')}
  bad.write_text('<html>Not found</html>')
  message = error_of(prepare.prepare, f'folder:{folder}', 'a', **options)
  assert message.startswith(f'{bad} is not an image (allowed: JPEG, PNG, ')
  assert list((tmp_path / 'tfds').iterdir()) == []
  bad.unlink()
  bad.symlink_to('nowhere')
  assert error_of(prepare.prepare, f'folder:{folder}', 'a', **options) == (
    f'cannot read {bad}: No such file or directory'
  )
  (tmp_path / 'tfds/a/0.9.0').mkdir(parents=True)  # of somebody else
  error_of(prepare.prepare, f'folder:{folder}', 'a', **options)
  assert [path.name for path in (tmp_path / 'tfds/a').iterdir()] == ['0.9.0']


def test_a_full_disk(folder, tmp_path, monkeypatch):
  def fail(path, options):
    raise RuntimeError('write() failed: No space left on device')

  monkeypatch.setattr(prepare, 'ArrayRecordWriter', fail)
  assert error_of(prepare.prepare, f'folder:{folder}', 'a', data_dir=str(tmp_path)) == (
    f'cannot write {tmp_path}/a/1.0.0/a-train.array_record-00000-of-00001: write() failed: No '
    'space left on device'
  )


def test_names_that_were_not_prepared(folder, tmp_path):
  prepare.prepare(f'folder:{folder}', 'our_set', data_dir=str(tmp_path))
  for name, message in {
    'our_sets': "overview), did you mean 'our_set'?",
    'our_set:2.0.0': f'there is no tfds:our_set:2.0.0 in {tmp_path}/our_set, which has 1.0.0',
    'our_set/big': f'there is no tfds:our_set/big in {tmp_path}/our_set, which has 1.0.0',
  }.items():
    assert error_of(sources.load, f'tfds:{name}', data_dir=str(tmp_path)).endswith(message)


def test_the_command(folder, tmp_path, capsys):
  command.main([f'folder:{folder}', 'our_set', f'--data_dir={tmp_path}'])
  assert capsys.readouterr().out == (
    f'{tmp_path}/our_set/1.0.0 written: 12 train, 2 validation; 2 classes\n'
    'read it as tfds:our_set\n'
  )
  assert error_of(command.main, ['x']) == (
    'the following arguments are required: NAME; --help explains'
  )


# --- Apache Beam ----------------------------------------------------------------------------------


def test_without_beam(folder, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'apache_beam', None)
  assert error_of(prepare.prepare, f'folder:{folder}', 'a', data_dir=str(tmp_path), beam='') == (
    'Apache Beam is not installed; it needs an environment of its own, in a checkout of cvt_flax: '
    'python3 -m venv beam-env && beam-env/bin/pip install -r requirements-beam.txt && '
    'beam-env/bin/python -m cvt_flax.prepare'
  )


def run_beam(env, *arguments):
  """Runs the command in a process of its own, as Beam warns of many things when it is imported."""
  return subprocess.run(
    [sys.executable, '-m', 'cvt_flax.prepare', *arguments], env=env, capture_output=True, text=True
  )


@needs_beam
@pytest.mark.parametrize(
  'options', ['', '--direct_num_workers=2 --direct_running_mode=multi_processing']
)
def test_beam_writes_the_same(folder, tmp_path, clean_env, options):
  result = run_beam(
    clean_env, f'folder:{folder}', 'our_set', f'--data_dir={tmp_path}', f'--beam={options}'
  )
  assert result.returncode == 0, result.stderr
  assert 'our_set/1.0.0 written: 12 train, 2 validation; 2 classes' in result.stdout
  data, source = sources.load('tfds:our_set', data_dir=str(tmp_path)), f'folder:{folder}'
  assert_same(data.train, sources.load(source).train)
  assert_same(data.validation, sources.load(source).validation)
  assert not list((tmp_path / 'our_set/1.0.0').glob('incomplete*'))


@needs_beam
@pytest.mark.parametrize('mode', ['in_memory', 'multi_processing'])
def test_beam_that_fails(folder, tmp_path, clean_env, mode):
  bad = folder / 'train/bee/3.JPEG'
  bad.write_text('<html>Not found</html>')
  options = f'--beam=--direct_num_workers=2 --direct_running_mode={mode}'
  result = run_beam(clean_env, f'folder:{folder}', 'a', f'--data_dir={tmp_path}', options)
  assert result.returncode == 2
  assert f'{bad} is not an image' in result.stderr.splitlines()[-1]
  assert not (tmp_path / 'a').exists()


@needs_beam
def test_a_runner_that_is_none(folder, tmp_path, clean_env):
  options = [f'folder:{folder}', 'a', f'--data_dir={tmp_path}/tfds', '--beam=--runner=Rnner']
  result = run_beam(clean_env, *options)
  assert result.returncode == 2
  last = result.stderr.splitlines()[-1]
  assert "bad options for Apache Beam, '--runner=Rnner': Unexpected pipeline runner" in last
  assert not (tmp_path / 'tfds').exists()
