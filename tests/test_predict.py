"""predict_images and its command line, on photographs."""

import csv
import dataclasses
import errno
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

from cvt_flax import (
  convert_weights,
  create_model,
  predict,
  predict_images,
  resize_positions,
  save_pretrained,
)
from cvt_flax.data.images import prepare
from cvt_flax.errors import UserError
from cvt_flax.weights import compiled, pretrained
from cvt_flax.weights.layouts import HUGGING_FACE
from cvt_flax.weights.preprocessing import Preprocessing
from tests.models.torch_weights import drawn_variables, quick_jit
from tests.weights.models import GELU_MODEL

# Two photographs of 640x427 pixels, which come with scikit-learn.
PHOTOGRAPHS = pathlib.Path(sklearn.datasets.__file__).parent / 'images'
CHINA, FLOWER = PHOTOGRAPHS / 'china.jpg', PHOTOGRAPHS / 'flower.jpg'
NAMES = ('ant', 'bee', 'cat', 'dog', 'eel')


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  """Converted weights: a folder of Hugging Face, turned into ours."""
  folder = tmp_path_factory.mktemp('weights')
  steps = Preprocessing(64, 0.8, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
  save_pretrained(folder / 'ours', GELU_MODEL, drawn_variables(GELU_MODEL), NAMES, steps)
  convert_weights(folder / 'ours', folder / 'hf', to='huggingface')
  convert_weights(folder / 'hf', folder / 'w')
  return folder / 'w'


def expected(path, size=64, crop_ratio=0.8):
  """The probabilities, without anything of predict's own."""
  pixels = prepare(path.read_bytes(), '', size, crop_ratio) / 255
  x = ((pixels - (0.5, 0.4, 0.3)) / (0.2, 0.25, 0.3)).astype(np.float32)[None]
  return jax.nn.softmax(quick_jit(GELU_MODEL.apply)(drawn_variables(GELU_MODEL), x))[0]


@pytest.mark.parametrize('photograph', [CHINA, FLOWER], ids=lambda p: p.stem)
def test_a_photograph(photograph, weights):
  (found,) = predict_images(weights, [photograph])
  shares = expected(photograph)
  order = np.argsort(-shares)
  assert found.image == str(photograph)
  assert found.classes == tuple(order.tolist())
  assert found.names == tuple(NAMES[i] for i in order)
  np.testing.assert_allclose(found.probabilities, shares[order], rtol=1e-4)


def test_hugging_face_computes_the_same(weights, peer):
  torch, transformers = peer('torch'), peer('transformers')
  module = transformers.CvtForImageClassification.from_pretrained(weights.parent / 'hf').eval()
  pixels = prepare(CHINA.read_bytes(), '', 64, 0.8) / 255
  x = ((pixels - (0.5, 0.4, 0.3)) / (0.2, 0.25, 0.3)).astype(np.float32).transpose(2, 0, 1)
  with torch.no_grad():
    theirs = module(torch.from_numpy(x[None])).logits.softmax(-1)[0].numpy()
  (found,) = predict_images(weights, [CHINA])
  np.testing.assert_allclose(found.probabilities, theirs[list(found.classes)], rtol=1e-4)


def test_batches_do_not_change_anything(weights):
  paths = [CHINA, FLOWER, CHINA, FLOWER, FLOWER]
  found = list(predict_images(weights, paths, batch_size=2))
  alone = {p: next(predict_images(weights, [p])) for p in (CHINA, FLOWER)}
  assert [p.image for p in found] == [str(p) for p in paths]
  for path, prediction in zip(paths, found, strict=True):
    assert prediction.classes == alone[path].classes
    np.testing.assert_allclose(prediction.probabilities, alone[path].probabilities, rtol=1e-5)


def test_one_program_for_all_batches(weights):
  loaded = pretrained.load(weights)
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compiled.append(event) if 'backend_compile' in event else None
  )
  try:
    predictions = predict_images(loaded, [CHINA, FLOWER] * 4, batch_size=2)
    next(predictions)
    seen = len(compiled)
    assert seen
    list(predictions)
    assert len(compiled) == seen
  finally:
    jax.monitoring.clear_event_listeners()


def test_a_compact_transformer(tmp_path):
  model = create_model('mcvit', 5)
  save_pretrained(tmp_path / 'w', model, drawn_variables(model), NAMES, Preprocessing(32))
  (prediction,) = predict_images(tmp_path / 'w', [CHINA])
  assert sum(prediction.probabilities) == pytest.approx(1)
  (larger,) = predict_images(tmp_path / 'w', [CHINA], top=5, image_size=64)
  other, variables = resize_positions(model, drawn_variables(model), 64)
  pixels = prepare(CHINA.read_bytes(), '', 64, Preprocessing().crop_ratio) / 255
  steps = Preprocessing()
  x = ((pixels - steps.mean) / steps.std).astype(np.float32)[None]
  shares = jax.nn.softmax(quick_jit(other.apply)(variables, x))[0]
  np.testing.assert_allclose(larger.probabilities, sorted(shares, reverse=True), rtol=1e-4)
  with pytest.raises(UserError, match='66'):
    predict_images(tmp_path / 'w', [CHINA], image_size=66)
  with pytest.raises(UserError, match='vit-from-scratch is in no package'):
    convert_weights(tmp_path / 'w', tmp_path / 'w.pth', to='vit-from-scratch', check=True)


def test_hidden_files_and_folders_are_no_images(weights, tmp_path):
  (tmp_path / 'a.jpg').write_bytes(CHINA.read_bytes())
  (tmp_path / '._a.jpg').write_text('what macOS leaves beside a file')
  (tmp_path / 'b.jpg').mkdir()
  (found,) = predict_images(weights, tmp_path)
  assert found.image == str(tmp_path / 'a.jpg')


def test_an_image_too_thin_for_a_crop(weights, tmp_path):
  Image.new('RGB', (1, 300_000)).save(tmp_path / 'thin.png')
  with pytest.raises(UserError, match=r'thin\.png: 1x300000 pixels are too thin'):
    list(predict_images(weights, [tmp_path / 'thin.png']))


def test_images_too_small_for_the_model(weights):
  with pytest.raises(UserError, match='images of 1x1 are too small for this model'):
    list(predict_images(weights, [CHINA], image_size=1))


def test_arguments_are_told_before_the_weights_are_read(tmp_path, capsys):
  for arguments, message in (
    (['nowhere.jpg'], 'nowhere.jpg: there is no such file'),
    ([str(CHINA), '--top=0'], 'top=0'),
    ([str(CHINA), '--csv='], 'the name of a file is needed'),
  ):
    with pytest.raises(UserError, match=message):
      predict.main([f'--weights={tmp_path / "no"}', *arguments])


def test_whoever_has_read_enough_may_close_the_pipe(weights, clean_env):
  command = [sys.executable, '-m', 'cvt_flax.predict', f'--weights={weights}', '--json']
  process = subprocess.Popen(
    [*command, *[str(CHINA)] * 3, '--batch_size=1'],
    env=clean_env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  process.stdout.readline()
  process.stdout.close()
  with process.stderr:
    assert process.stderr.read() == ''
  assert process.wait() == 128 + signal.SIGPIPE


def test_top_and_image_size(weights):
  (found,) = predict_images(weights, [CHINA], top=2, image_size=96)
  order = np.argsort(-expected(CHINA, 96))[:2]
  assert found.classes == tuple(order.tolist())
  (all_of_them,) = predict_images(weights, [CHINA], top=9)
  assert len(all_of_them.classes) == 5


def test_squashed(tmp_path):
  steps = Preprocessing(64, 0.0, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
  save_pretrained(tmp_path / 'w', GELU_MODEL, drawn_variables(GELU_MODEL), (), steps)
  (found,) = predict_images(tmp_path / 'w', [CHINA])
  pixels = np.asarray(Image.open(CHINA).resize((64, 64), Image.Resampling.BICUBIC)) / 255
  x = ((pixels - (0.5, 0.4, 0.3)) / (0.2, 0.25, 0.3)).astype(np.float32)[None]
  shares = jax.nn.softmax(quick_jit(GELU_MODEL.apply)(drawn_variables(GELU_MODEL), x))[0]
  np.testing.assert_allclose(found.probabilities, np.sort(shares)[::-1], rtol=1e-4)
  assert found.names[0] == f'class {np.argmax(shares)}'


def test_exif_rotation(weights, tmp_path):
  upright = Image.open(CHINA)
  exif = Image.Exif()
  exif[0x0112] = 6  # the camera was turned: to be shown turned by 90 degrees to the right
  upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / 'a.png', exif=exif)
  upright.save(tmp_path / 'b.png')
  a, b = predict_images(weights, [tmp_path / 'a.png', tmp_path / 'b.png'])
  assert a.probabilities == b.probabilities


def test_folders_and_patterns(weights, tmp_path):
  for name in ('b.JPG', 'a.jpg', 'c.txt'):
    (tmp_path / name).write_bytes(FLOWER.read_bytes())
  (tmp_path / 'sub').mkdir()
  (tmp_path / 'sub' / 'd.jpg').write_bytes(CHINA.read_bytes())
  images = [tmp_path, f'{tmp_path}/*/*.jpg', tmp_path / 'c.txt']
  found = [p.image.removeprefix(f'{tmp_path}/') for p in predict_images(weights, images)]
  assert found == ['a.jpg', 'b.JPG', 'sub/d.jpg', 'c.txt']


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda p: [], 'no image is given'),
    (lambda p: [p / 'x.jpg'], r'x\.jpg: there is no such file'),
    (lambda p: [p], r"holds no image; '/.*/\*\*/\*\.jpg' takes those in its folders"),
    (lambda p: [f'{p}/*.jpg'], r'\*\.jpg: there is no such file'),
    (lambda p: [(p / 'x.jpg').write_text('x') and p / 'x.jpg'], r'x\.jpg is not an image'),
    (
      lambda p: [(p / 'x.jpg').write_bytes(CHINA.read_bytes()[:9000]) and p / 'x.jpg'],
      r'cannot decode .*x\.jpg',
    ),
  ],
)
def test_images_that_cannot_be_read(make, message, weights, tmp_path):
  with pytest.raises(UserError, match=message):
    list(predict_images(weights, make(tmp_path)))


@pytest.mark.parametrize('arguments', [dict(top=0), dict(batch_size=0), dict(image_size=-1)])
def test_numbers_out_of_range(arguments, weights):
  with pytest.raises(UserError, match=f'{next(iter(arguments))}='):
    list(predict_images(weights, [CHINA], **arguments))


def test_a_model_for_other_than_colour_images(tmp_path):
  model = GELU_MODEL.clone(in_channels=1)
  save_pretrained(tmp_path / 'w', model, drawn_variables(model))
  with pytest.raises(UserError, match='takes images of 1 channels, not of 3'):
    list(predict_images(tmp_path / 'w', [CHINA]))


def test_no_classifier(tmp_path):
  model = GELU_MODEL.clone(num_classes=0)
  save_pretrained(tmp_path / 'w', model, drawn_variables(model))
  with pytest.raises(UserError, match='has no classifier'):
    list(predict_images(tmp_path / 'w', [CHINA]))


def main(capsys, *arguments):
  predict.main([str(a) for a in arguments])
  return capsys.readouterr().out


def test_table(weights, capsys):
  lines = main(capsys, f'--weights={weights}', CHINA, '--top=3').splitlines()
  (found,) = predict_images(weights, [CHINA])
  assert lines[0] == str(CHINA)
  assert len(lines) == 4
  share, bar, name = re.fullmatch(r' +(\d+\.\d)%  (#* *)  (\w+)', lines[1]).groups()
  assert float(share) == pytest.approx(100 * found.probabilities[0], abs=0.06)
  assert bar.count('#') == round(20 * found.probabilities[0]) and len(bar) == 20
  assert name == found.names[0]


def test_json(weights, capsys):
  lines = main(capsys, f'--weights={weights}', CHINA, FLOWER, '--json').splitlines()
  first, second = map(json.loads, lines)
  (found,) = predict_images(weights, [CHINA])
  assert first['image'] == str(CHINA) and second['image'] == str(FLOWER)
  assert first['names'] == list(found.names)
  assert first['probabilities'] == pytest.approx(found.probabilities, rel=1e-5)
  assert sum(second['probabilities']) == pytest.approx(1)


def test_csv(weights, capsys, tmp_path):
  path = tmp_path / 'p.csv'
  arguments = (f'--weights={weights}', PHOTOGRAPHS, '--top=2', f'--csv={path}')
  assert main(capsys, *arguments) == f'{path} written\n'
  rows = list(csv.DictReader(path.read_text().splitlines()))
  assert [(pathlib.Path(row['image']).name, row['rank']) for row in rows] == [
    ('china.jpg', '1'),
    ('china.jpg', '2'),
    ('flower.jpg', '1'),
    ('flower.jpg', '2'),
  ]
  (found,) = predict_images(weights, [CHINA], top=2)
  assert [row['name'] for row in rows[:2]] == list(found.names)
  assert [int(row['class']) for row in rows[:2]] == list(found.classes)
  with pytest.raises(UserError, match=r'p\.csv exists'):
    main(capsys, *arguments)


def test_names_that_are_not_utf8(weights, capsys, tmp_path):
  image = tmp_path / os.fsdecode(b'caf\xe9.jpg')
  image.write_bytes(CHINA.read_bytes())
  main(capsys, f'--weights={weights}', str(image), '--top=1', f'--csv={tmp_path}/p.csv')
  assert b'/caf\xe9.jpg,1,' in (tmp_path / 'p.csv').read_bytes()


def test_a_home(weights, monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'a.jpg').write_bytes(CHINA.read_bytes())
  for image in ('~/a.jpg', '~/*.jpg', pathlib.Path('~')):
    assert [p.image for p in predict_images(weights, [image])] == [f'{tmp_path}/a.jpg']


@pytest.mark.parametrize('form', ['--json', '--csv', ''])
def test_an_unreadable_image_costs_no_other_its_line(form, weights, capsys, tmp_path):
  for name in ('a.jpg', 'c.jpg'):
    (tmp_path / name).write_bytes(CHINA.read_bytes())
  (tmp_path / 'b.jpg').write_text('x')
  images = [tmp_path / f'{name}.jpg' for name in 'abc']
  options = [f'--weights={weights}', '--batch_size=1']
  options += {'--json': ['--json'], '--csv': [f'--csv={tmp_path / "p.csv"}'], '': []}[form]
  with pytest.raises(UserError, match='^1 of the images could not be read, and are left out$'):
    predict.main([*options, *map(str, images)])
  out, err = capsys.readouterr()
  written = (tmp_path / 'p.csv').read_text() if form == '--csv' else out
  assert [str(path) in written for path in images] == [True, False, True]
  assert err.startswith(f'{images[1]} is not an image')


def test_unreadable_images_have_their_error(weights, tmp_path):
  (tmp_path / 'b.jpg').write_text('x')
  (alone,) = predict_images(weights, [CHINA])
  images = [tmp_path / 'b.jpg', CHINA, tmp_path / 'b.jpg']
  first, second, third = predict_images(weights, images, skip_unreadable=True)
  assert second == dataclasses.replace(alone, probabilities=second.probabilities)
  np.testing.assert_allclose(second.probabilities, alone.probabilities, rtol=1e-5)
  assert first == third == predict.Prediction(first.image, (), (), (), first.error)
  assert first.error.startswith(f'{tmp_path / "b.jpg"} is not an image')


def test_what_another_try_may_read_is_not_left_out(weights, monkeypatch):
  def gone(path):
    raise OSError(errno.EIO, 'a disk that does not answer')

  monkeypatch.setattr(pathlib.Path, 'read_bytes', gone)
  loaded = pretrained.load(weights)
  with pytest.raises(UserError, match='a disk that does not answer'):
    next(predict_images(loaded, [CHINA], skip_unreadable=True))


@pytest.mark.parametrize('when', ['compiling', 'computing'])
def test_too_little_memory_names_the_batch_size_to_try(when, weights, monkeypatch):
  def out_of_memory(*_):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nMore')

  made = {'compiling': out_of_memory, 'computing': lambda *_: out_of_memory}[when]
  monkeypatch.setattr(compiled, 'compile_predict', made)
  for count, words in (
    (9, 'batch_size=8 .*: try --batch_size=4'),
    (1, 'batch_size=1 .*: a smaller'),
  ):
    with pytest.raises(UserError, match=f'{words}.*, or smaller images'):
      list(predict_images(weights, [CHINA] * count))


def test_a_failed_csv_leaves_nothing(weights, capsys, tmp_path):
  with pytest.raises(UserError, match='no such file'):
    main(capsys, f'--weights={weights}', CHINA, 'nowhere.jpg', f'--csv={tmp_path / "p.csv"}')
  assert not list(tmp_path.iterdir())


def test_command_line(weights, clean_env):
  command = [sys.executable, '-m', 'cvt_flax.predict', f'--weights={weights}']
  done = subprocess.run([*command, CHINA], env=clean_env, capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (0, '')
  assert done.stdout.splitlines()[0] == str(CHINA)
  done = subprocess.run([*command, '--json'], env=clean_env, capture_output=True, text=True)
  assert done.returncode == 2
  assert done.stderr == (
    'predict.py: the following arguments are required: IMAGE; --help explains\n'
  )


def test_hugging_face_weights_say_what_they_compute(weights, capsys, tmp_path):
  config = json.loads((weights.parent / 'hf' / 'config.json').read_text())
  del config['activation']
  for file in (weights.parent / 'hf').iterdir():
    (tmp_path / file.name).symlink_to(file)
  (tmp_path / 'config.json').unlink()
  (tmp_path / 'config.json').write_text(json.dumps(config))
  predict.main([f'--weights={tmp_path}', str(CHINA)])
  assert 'note: the activation is' in capsys.readouterr().err
  assert pretrained.load(tmp_path).kind == HUGGING_FACE.name
