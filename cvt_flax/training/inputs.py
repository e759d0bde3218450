"""What the network gets of training images: normalised, erased and mixed, with their targets."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from cvt_flax.data import sources
from cvt_flax.data.mixing import mix, random_erase, smoothed_targets
from cvt_flax.errors import UserError
from cvt_flax.ops.pixels import normalize_pixels
from cvt_flax.rng import Stream, stream_key
from cvt_flax.training import sharding
from cvt_flax.training.config import AugmentConfig, freeze
from cvt_flax.training.engines import ENGINES, Batch
from cvt_flax.training.shipped import get_config


def make_inputs(
  *,
  seed: int,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  augment: AugmentConfig,
  classes: int,
  groups: int,
) -> Callable[[jax.Array, Batch], tuple[jax.Array, jax.Array]]:
  """Returns inputs(step, batch) -> (images, targets), for use inside of jit.

  The batch holds 'image' uint8 [b h w 3], 'label' int32 [b] and 'mask' float32 [b], 0 where an
  image is missing. The images are float32 [b h w 3]; targets, [b k], sum to 1 in a row, and are 0
  without an image.

  Args:
    seed, mean, std, augment: of the run.
    classes: how many there are.
    groups: images that are mixed with each other, those of a batch norm; 0: the batch.
  """

  def inputs(step, batch):
    images = normalize_pixels(batch['image'], mean, std)
    targets = smoothed_targets(batch['label'], classes, augment.label_smoothing)
    targets *= batch['mask'][:, None]  # no loss where there is no image
    erase_key, mix_key = jax.random.split(stream_key(seed, Stream.MIXING, step))
    if augment.erase_prob:
      images = random_erase(erase_key, images, prob=augment.erase_prob)
    if augment.mixup or augment.cutmix:
      images, targets = mix(
        mix_key,
        images,
        targets,
        group_size=groups,
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mix_prob,
        switch_prob=augment.switch_prob,
      )
    return images, targets

  return inputs


class TrainingImages(NamedTuple):
  """The images of a training step.

  Attributes:
    pixels: as the network gets them, but 0 to 255: uint8 [b h w 3].
    targets: the share of every class, float32 [b k]; zeros where an image could not be read.
    class_names: of the k classes.
  """

  pixels: np.ndarray
  targets: np.ndarray
  class_names: tuple[str, ...]


def training_images(config: ml_collections.ConfigDict | str, step: int = 0) -> TrainingImages:
  """Returns what a run trains on in a step: cropped, augmented, erased and mixed.

  They are those of the run, whatever devices and processes it has. With the resident engine all
  training images are decoded for it.

  Args:
    config: as `cvt_flax.get_config` returns it, or a name that it takes.
    step: of the run, from 0.

  Raises:
    UserError: the config or the data are not usable.
  """
  config = freeze(get_config(config) if isinstance(config, str) else config)
  if step < 0:
    raise UserError(f'step={step}: at least 0 is needed')
  dataset = sources.load(
    config.source,
    data_dir=config.data_dir,
    holdout=config.eval.holdout,
    test_holdout=config.eval.test_holdout,
    train_share=config.train_share,
    seed=config.seed,
  )
  if dataset.train is None:
    raise UserError(f'{config.source} has no training split')
  engine = ENGINES[config.engine](config, sharding.make_mesh(1, devices=jax.local_devices()[:1]))
  data = engine.open(dataset.train)
  if engine.count(data) < config.batch_size:
    raise UserError(
      f'batch_size={config.batch_size}: {config.source} has only {engine.count(data)} images to '
      'train on'
    )
  inputs = make_inputs(
    seed=config.seed,
    mean=config.mean,
    std=config.std,
    augment=config.augment,
    classes=len(dataset.class_names),
    groups=config.model.bn_group_size,
  )
  with contextlib.closing(engine.feed_training(data, step, step + 1)) as feed:
    fed = next(feed)
    images, targets = jax.jit(lambda *fed: inputs(step, engine.train_batch(step, *fed)))(*fed)
  pixels = np.asarray(images) * config.std + config.mean
  pixels = (255 * pixels).round().clip(0, 255).astype(np.uint8)
  return TrainingImages(pixels, np.asarray(targets), dataset.class_names)
