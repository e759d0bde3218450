"""What a run trains on, to look at."""

import gc

import jax
import numpy as np
import pytest

from cvt_flax.errors import UserError
from cvt_flax.training import look, loop, step
from cvt_flax.training.inputs import make_inputs
from cvt_flax.training.look import training_images


@pytest.mark.parametrize('which', ['stateful', 'streamed'])
def test_they_are_those_of_the_run(which, request, tmp_path, monkeypatch):
  config = request.getfixturevalue(which)
  config.steps, config.epochs, config.optimizer.warmup_epochs = 5, 10, 0.0
  config.augment.erase_prob = 0.5
  trained_on = {}

  def recording(**kwargs):
    inputs = make_inputs(**kwargs)

    def recorded(step, batch):
      images, targets = inputs(step, batch)
      jax.debug.callback(lambda i, *got: trained_on.update({int(i): got}), step, images, targets)
      return images, targets

    return recorded

  monkeypatch.setattr(step, 'make_inputs', recording)
  loop.run(config, tmp_path / 'run')
  assert sorted(trained_on) == list(range(5))
  for i in (0, 4):
    found = training_images(config, i)
    images, targets = trained_on[i]
    pixels = (255 * (np.asarray(images) * config.std + config.mean)).round().clip(0, 255)
    np.testing.assert_array_equal(found.pixels, pixels)
    np.testing.assert_array_equal(found.targets, targets)
  assert found.pixels.dtype == np.uint8 and found.targets.shape == (16, 2)


def test_without_augmentation_they_are_as_they_lie(config, npz):
  config.augment.crop_padding, config.augment.flip, config.batch_size = 0, False, 180
  config.model.bn_group_size = 0
  found = training_images(config)
  with np.load(npz) as arrays:
    images, labels = arrays['x_train'], arrays['y_train']
  assert len(found.pixels) == 180 and found.class_names == ('0', '1')
  places = {image.tobytes(): i for i, image in enumerate(images)}
  chosen = [places[image.tobytes()] for image in found.pixels]
  assert len(set(chosen)) == 180
  np.testing.assert_array_equal(found.targets, np.eye(2)[labels[chosen]])


def test_the_images_leave_the_devices(config):
  gc.collect()
  before = sum(array.nbytes for array in jax.live_arrays())
  training_images(config)
  assert sum(array.nbytes for array in jax.live_arrays()) == before


def test_a_smaller_batch_that_is_named_is_one_that_a_run_takes(config, monkeypatch):
  def full(*args, **kwargs):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory')

  monkeypatch.setattr(look, 'make_inputs', lambda **kwargs: full)
  config.batch_size, config.model.bn_group_size, config.optimizer.accumulate_steps = 48, 8, 3
  with pytest.raises(UserError, match='try --config.batch_size=24'):
    training_images(config)


@pytest.mark.parametrize(
  ('changes', 'step', 'message'),
  [
    ({}, -1, 'step=-1: 0 to 32 are those of the run'),
    ({}, 33, 'step=33: 0 to 32 are those of the run'),
    (dict(batch_size=256), 0, 'batch_size=256: npz:.* has only 180 images to train on'),
    (dict(class_weights=(1.0, 2.0, 3.0)), 0, 'one for each of the 2 classes'),
  ],
)
def test_what_a_run_refuses_is_not_shown(changes, step, message, config):
  config.update(changes)
  with pytest.raises(UserError, match=message):
    training_images(config, step)


def test_a_source_without_training_images(config, npz, tmp_path):
  with np.load(npz) as arrays:
    np.savez(tmp_path / 'test.npz', **{k: v for k, v in arrays.items() if 'test' in k})
  config.source = f'npz:{tmp_path}/test.npz'
  with pytest.raises(UserError, match='has no training split'):
    training_images(config)
