"""compile_predict: the same answers for any number of images, and nothing compiled twice."""

import jax
import numpy as np
import pytest

from cvt_flax import CvT, compile_predict, save_pretrained
from cvt_flax.errors import UserError
from cvt_flax.ops.pixels import normalize_pixels
from cvt_flax.weights import pretrained
from cvt_flax.weights.compiled import batch_size
from cvt_flax.weights.preprocessing import Preprocessing
from tests.models.test_cvt import TINY
from tests.models.torch_weights import drawn_variables, quick_jit

STEPS = Preprocessing(32, 0.875, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def weights_of(model, folder):
  save_pretrained(folder / 'w', model, drawn_variables(model), (), STEPS)
  return pretrained.load(folder / 'w')


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  return weights_of(CvT(**TINY), tmp_path_factory.mktemp('weights'))


@pytest.fixture(scope='module')
def predict(weights):
  return compile_predict(weights, (2, 5))


def pixels(count):
  return np.random.default_rng(0).integers(256, size=(count, 32, 32, 3), dtype=np.uint8)


def expected(images, model=None):
  model = model or CvT(**TINY)
  x = normalize_pixels(images, STEPS.mean, STEPS.std)
  return jax.nn.softmax(quick_jit(model.apply)(drawn_variables(model), x))


@pytest.mark.parametrize('count', [1, 2, 3, 4, 5, 6, 13])
def test_any_number_of_images(predict, count):
  found = predict(pixels(13)[:count])
  assert (found.shape, found.dtype) == ((count, 5), np.float32)
  np.testing.assert_allclose(found, expected(pixels(13))[:count], rtol=1e-4)


def test_no_image(predict):
  assert predict(pixels(0)).shape == (0, 5)


def test_nothing_is_compiled_when_it_is_used(weights):
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compiled.append(event) if 'backend_compile' in event else None
  )
  try:
    predict = compile_predict(weights, (1, 4))
    assert len(compiled) >= 2
    compiled.clear()
    for count in range(10):
      predict(pixels(count))
    assert not compiled
  finally:
    jax.monitoring.clear_event_listeners()


@pytest.mark.parametrize('sizes', [(1, 8, 64), (1,), (1, 2, 3), (1, 100)])
def test_fewer_than_twice_as_many_are_computed(sizes):
  for count in range(1, 300):
    left, computed = count, 0
    while left > 0:
      size = batch_size(sizes, left)
      computed += size
      left -= size
    assert count <= computed < 2 * count


def test_the_smallest_that_holds_them():
  assert [batch_size((4, 16), n) for n in (1, 4, 5, 8, 9, 16, 17, 99)] == [
    4,
    4,
    4,
    4,
    16,
    16,
    16,
    16,
  ]


def test_two_classes_of_one_logit(tmp_path):
  model = CvT(**TINY | dict(num_classes=1))
  found = compile_predict(weights_of(model, tmp_path), (2,))(pixels(2))
  x = normalize_pixels(pixels(2), STEPS.mean, STEPS.std)
  share = jax.nn.sigmoid(quick_jit(model.apply)(drawn_variables(model), x))[:, 0]
  np.testing.assert_allclose(found, np.stack([1 - share, share], axis=1), rtol=1e-4)


def test_bfloat16(weights):
  found = compile_predict(weights, (3,), dtype='bfloat16')(pixels(3))
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, expected(pixels(3)), atol=0.01)


def test_another_image_size(weights):
  images = np.zeros((1, 48, 48, 3), np.uint8)
  np.testing.assert_allclose(
    compile_predict(weights, (1,), image_size=48)(images), expected(images), rtol=1e-4
  )


@pytest.mark.parametrize(
  'images',
  [pixels(2)[:, :16], pixels(2)[..., :1], pixels(2)[0], pixels(2) / np.float32(255), np.zeros(3)],
  ids=['small', 'grey', 'one', 'float', 'flat'],
)
def test_other_images(predict, images):
  with pytest.raises(UserError, match=r'uint8 images \[n 32 32 3\] are needed'):
    predict(images)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (dict(batch_sizes=()), r'batch_sizes=\(\)'),
    (dict(batch_sizes=(0, 8)), r'batch_sizes=\(0, 8\): numbers of images from 1 on'),
    (dict(dtype='float16'), "dtype='float16': float32 or bfloat16"),
    (dict(image_size=1), 'images of 1x1 are too small'),
  ],
)
def test_what_cannot_be_compiled(weights, arguments, message):
  with pytest.raises(UserError, match=message):
    compile_predict(weights, **arguments)
