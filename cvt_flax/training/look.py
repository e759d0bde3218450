"""What a run trains on, to look at."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import pathlib
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from cvt_flax.errors import UserError, told_of_memory
from cvt_flax.training import processes
from cvt_flax.training.config import freeze
from cvt_flax.training.inputs import make_inputs
from cvt_flax.training.setup import TrainingSetup
from cvt_flax.training.shipped import get_config


class TrainingImages(NamedTuple):
  """The images of a training step.

  Attributes:
    pixels: as the network gets them, but 0 to 255: uint8 [b h w 3].
    targets: the share of every class, float32 [b k]; an image that could not be read has none.
    class_names: of the k classes.
  """

  pixels: np.ndarray
  targets: np.ndarray
  class_names: tuple[str, ...]


def training_images(config: ml_collections.ConfigDict | str, step: int = 0) -> TrainingImages:
  """Returns what a run trains on in a step: cropped, augmented, erased and mixed.

  All that a run would is set up for it, and nothing is written: the whole batch is read, and with
  the resident engine all images of train and validation, which leave the devices again.

  Args:
    config: as `cvt_flax.get_config` returns it, or a name that it takes.
    step: of the run, from 0.

  Raises:
    UserError: the config or the data are not usable, or the run has no such step.
  """
  config = freeze(get_config(config) if isinstance(config, str) else config)
  # Neither weights nor evaluation sets change an image.
  sets = dataclasses.replace(config.eval, sets=())
  config = dataclasses.replace(config, init_from='', eval=sets)
  found = _images_of_step(config, step)
  gc.collect()  # jitted functions and what holds them are a cycle, with the images on the devices
  return found


def _images_of_step(config, step):
  with processes.entered(), tempfile.TemporaryDirectory() as folder:
    training = TrainingSetup(config, pathlib.Path(folder))
    if not 0 <= step < training.total_steps:
      raise UserError(f'step={step}: 0 to {training.total_steps - 1} are those of the run')
    classes = len(training.dataset.class_names)
    inputs = make_inputs(
      seed=config.seed,
      mean=config.mean,
      std=config.std,
      augment=config.augment,
      classes=classes,
      groups=config.model.bn_group_size,
    )

    def pixels_and_targets(step, *fed):
      images, targets = inputs(step, training.engine.train_batch(step, *fed))
      pixels = 255 * (images * jnp.array(config.std) + jnp.array(config.mean))
      return jnp.clip(jnp.round(pixels), 0, 255).astype(jnp.uint8), targets

    compute = jax.jit(pixels_and_targets, out_shardings=training.replicated)
    feed = training.engine.feed_training(training.train_data, step, step + 1)
    memory = told_of_memory('--config.batch_size', config.batch_size, training.batch_unit)
    with contextlib.closing(feed), memory:
      pixels, targets = jax.device_get(compute(step, *next(feed)))
  return TrainingImages(pixels, targets, training.dataset.class_names)
