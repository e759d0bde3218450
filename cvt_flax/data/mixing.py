"""Mixup, CutMix, label smoothing and random erasing, in jax, inside the training step.

The semantics are those of timm (timm/data/mixup.py in its 'batch' mode, timm/data/random_erasing.py
in its 'pixel' mode), which the official CvT training uses. What timm draws once per batch is drawn
here once per group of images, so that results depend neither on the number of devices nor on how
the batch lies on them, and a group that lies within a device needs no communication.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special


def smoothed_targets(labels: jax.Array, num_classes: int, smoothing: float) -> jax.Array:
  """Returns the target distribution of each label.

  Args:
    labels: int32 [b].
    num_classes: how many classes, k.
    smoothing: the share s of the probability that is spread evenly over all classes.

  Returns:
    float32 [b, k]: s / k off the label, 1 - s + s / k on it.
  """
  off = smoothing / num_classes
  is_label = labels[:, None] == jnp.arange(num_classes)
  return jnp.where(is_label, 1 - smoothing + off, off).astype(jnp.float32)


def mix(
  key: jax.Array,
  images: jax.Array,
  targets: jax.Array,
  *,
  group_size: int,
  mixup_alpha: float = 0.8,
  cutmix_alpha: float = 1.0,
  prob: float = 1.0,
  switch_prob: float = 0.5,
) -> tuple[jax.Array, jax.Array]:
  """Mixes each image with its partner, by Mixup or by CutMix.

  The partner of an image is the one at its place in the group counted from the end; the middle
  image of an odd group is its own. All images of a group share lambda, the choice and the box.
  The defaults are those of the official ImageNet training.

  Args:
    key: a typed key; group g draws from fold_in(key, g).
    images: float [b, h, w, c].
    targets: float32 [b, k], each row a distribution over the classes.
    group_size: how many consecutive images are a group; 0 makes the whole batch one.
    mixup_alpha: Mixup draws lambda from Beta(alpha, alpha); 0 turns Mixup off.
    cutmix_alpha: likewise for CutMix; 0 turns CutMix off.
    prob: probability that a group is mixed at all.
    switch_prob: probability of CutMix where both are on.

  Returns:
    The images, [b, h, w, c] in the dtype they came in, and the targets, float32 [b, k].

  Raises:
    ValueError: the groups do not divide the batch, or both Mixup and CutMix are off.
  """
  b, h, w, _ = images.shape
  size = group_size or b
  if b % size:
    raise ValueError(f'a batch of {b} images cannot be divided into groups of {size}')
  if not (mixup_alpha > 0 or cutmix_alpha > 0):
    raise ValueError(
      f'mixup_alpha {mixup_alpha} and cutmix_alpha {cutmix_alpha}: at least one must be positive'
    )
  if mixup_alpha > 0 and cutmix_alpha > 0:
    cutmix_prob = switch_prob
  else:
    cutmix_prob = float(cutmix_alpha > 0)
  # What is drawn for the one that is off is never used: any alpha will do.
  mixup_table, cutmix_table = _beta_table(mixup_alpha or 1), _beta_table(cutmix_alpha or 1)

  def mix_group(key, images, targets):
    apply, switch, rank, y, x = jax.random.uniform(key, (5,))
    cutmix = switch < cutmix_prob
    share = jnp.where(cutmix, _quantile(cutmix_table, rank), _quantile(mixup_table, rank))
    outside = _outside_box(share, y, x, h, w)
    # How much of each pixel stays, and of the target: CutMix counts the true area of its box, which
    # is cut off at the border of the image.
    pixels = jnp.where(cutmix, outside, share)
    share = jnp.where(cutmix, outside.mean(), share)
    pixels = jnp.where(apply < prob, pixels, 1.0)[..., None]
    share = jnp.where(apply < prob, share, 1.0)
    mixed = images * pixels + images[::-1] * (1 - pixels)
    return mixed.astype(images.dtype), targets * share + targets[::-1] * (1 - share)

  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(b // size))
  grouped = images.reshape(-1, size, *images.shape[1:]), targets.reshape(-1, size, targets.shape[1])
  mixed_images, mixed_targets = jax.vmap(mix_group)(keys, *grouped)
  return mixed_images.reshape(images.shape), mixed_targets.reshape(targets.shape)


def _beta_table(alpha: float) -> jax.Array:
  """Returns float32 [4097]: the quantiles of Beta(alpha, alpha) at 0, 1/4096, ..., 1.

  Lambda is drawn from this table because jax.random.beta draws by rejection: under a mesh the
  devices would have to agree, in every round of a loop, on whether all groups are done.
  """
  return jnp.asarray(special.betaincinv(alpha, alpha, np.linspace(0, 1, 4097)), jnp.float32)


def _quantile(table: jax.Array, rank: jax.Array) -> jax.Array:
  """Returns the value at `rank`, in [0, 1), of evenly spaced quantiles, linear between them."""
  place = rank * (len(table) - 1)
  below = place.astype(jnp.int32)
  return table[below] + (place - below) * (table[below + 1] - table[below])


def _outside_box(share: jax.Array, y: jax.Array, x: jax.Array, h: int, w: int) -> jax.Array:
  """Returns float32 [h, w], 0 in CutMix's box and 1 outside.

  The box has sqrt(1 - share) of the image's height and width; its centre is the pixel in which the
  point (y, x) lies, given in [0, 1).
  """
  ratio = jnp.sqrt(1 - share)

  def inside(centre, length):
    # timm cuts the side to whole pixels and then halves it in whole pixels, so odd sides lose one.
    half = (length * ratio).astype(jnp.int32) // 2
    distance = jnp.arange(length) - (centre * length).astype(jnp.int32)
    return (distance >= -half) & (distance < half)

  return 1.0 - (inside(y, h)[:, None] & inside(x, w))


def random_erase(
  key: jax.Array,
  images: jax.Array,
  *,
  prob: float = 0.25,
  min_area: float = 0.02,
  max_area: float = 1 / 3,
  min_aspect: float = 0.3,
  tries: int = 10,
) -> jax.Array:
  """Replaces a rectangle of some images by standard normal noise, a value per pixel and channel.

  A try draws an area and an aspect ratio and fits if the rectangle is lower and narrower than the
  image. The first try that fits is used; where none does, the image stays. The defaults are those
  of timm and, `prob` included, of the official ImageNet training.

  Args:
    key: a typed key; the image at position i of the batch draws from fold_in(key, i).
    images: float [b, h, w, c], normalised to mean 0 and deviation 1.
    prob: probability that an image is erased.
    min_area: smallest area, as a share of the image.
    max_area: largest area, likewise.
    min_aspect: smallest ratio of height to width; the largest is 1 / min_aspect, and the ratio is
      uniform in its logarithm.
    tries: how many rectangles are tried.

  Returns:
    The images, [b, h, w, c] in the dtype they came in.
  """
  b, h, w, _ = images.shape

  def erase(key, image):
    key_size, key_place, key_noise = jax.random.split(key, 3)
    area, log_aspect = jax.random.uniform(key_size, (2, tries))
    area = (min_area + area * (max_area - min_area)) * h * w
    aspect = jnp.exp((2 * log_aspect - 1) * math.log(min_aspect))
    heights = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (heights < h) & (widths < w)
    first = jnp.argmax(fits)
    height, width = heights[first], widths[first]
    apply, top, left = jax.random.uniform(key_place, (3,))
    top = (top * (h - height + 1)).astype(jnp.int32)
    left = (left * (w - width + 1)).astype(jnp.int32)
    y, x = jnp.arange(h)[:, None], jnp.arange(w)
    box = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    box &= fits[first] & (apply < prob)
    noise = jax.random.normal(key_noise, image.shape, image.dtype)
    return jnp.where(box[..., None], noise, image)

  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(b))
  return jax.vmap(erase)(keys, images)
