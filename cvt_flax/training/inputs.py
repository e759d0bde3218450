"""What the network gets of training images: normalised, erased and mixed, with their targets."""

from __future__ import annotations

from collections.abc import Callable

import jax

from cvt_flax.data.mixing import mix, random_erase, smoothed_targets
from cvt_flax.ops.pixels import normalize_pixels
from cvt_flax.rng import Stream, stream_key
from cvt_flax.training.config import AugmentConfig
from cvt_flax.training.engines import Batch


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
  image is missing. The images are float32 [b h w 3]; targets, [b k], sum to 1 in a row, less the
  share of an image that is missing, by itself or mixed with another.

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
