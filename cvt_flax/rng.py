"""Random streams: which fixed number each kind of randomness has.

Randomness is positional. A key is derived from the run's seed, a position (the step, or the
epoch) and the number of its stream, and is never stored, so a run that resumes at step t draws
what it would have drawn. The numbers below are part of every result: never change one.
"""

from __future__ import annotations

import enum
import typing

if typing.TYPE_CHECKING:
  import jax


class Stream(enum.IntEnum):
  """The fixed number of every random stream."""

  INIT = 0  # parameters
  ORDER = 1  # the order of the images in an epoch
  AUGMENT = 2  # crops, flips, TrivialAugment: one key per image
  MIXING = 3  # mixup, cutmix, random erasing
  DROPOUT = 4  # dropout and drop path
  HOLDOUT = 5  # which training images are held out for validation
  TEST_HOLDOUT = 6  # which training images are held out for the test
  TRAIN_SHARE = 7  # which training images are left out


def stream_key(seed: int, stream: Stream, position: int | jax.Array = 0) -> jax.Array:
  """Returns the key of `stream` at `position`: fold_in(fold_in(seed, position), stream).

  Args:
    seed: the run's seed.
    stream: which kind of randomness.
    position: the step or the epoch, a non-negative integer or integer scalar array.
  """
  import jax  # here, so that the data sources can read `Stream` without loading jax

  return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), position), int(stream))
