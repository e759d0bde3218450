"""What keys of a config must be together; `config.freeze` runs every one of `CHECKS`.

A check takes the whole config and raises a UserError that names the key, its value and what is
needed.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Callable

from cvt_flax.data.augment import RandAugment
from cvt_flax.errors import UserError

if typing.TYPE_CHECKING:
  from cvt_flax.training.config import TrainConfig


def _check_source(c: TrainConfig):
  if not c.source:
    raise UserError("source='': tfds:NAME, folder:DIR, csv:FILE, npz:FILE or digits is needed")


def _check_seeds(c: TrainConfig):
  if c.seed + c.seeds > 2**32:
    raise UserError(f'seeds={c.seeds} from seed={c.seed} on: the last one is above {2**32 - 1}')


def _check_channels(c: TrainConfig):
  for name, value in (('mean', c.mean), ('std', c.std)):
    if len(value) != 3:
      raise UserError(f'{name}={value!r}: three numbers are needed, for red, green and blue')


def _check_crop(c: TrainConfig):
  if 0 < c.crop_ratio < 0.1:
    raise UserError(f'crop_ratio={c.crop_ratio}: from 0.1 to 1, or 0 to squash, is needed')


def _check_random_crop(c: TrainConfig):
  a = c.augment
  for name, pair in (('crop_scale', a.crop_scale), ('crop_aspect', a.crop_aspect)):
    if pair and (len(pair) != 2 or pair[0] > pair[1]):
      raise UserError(f'augment.{name}={pair!r}: a least and a greatest are needed')
  if a.color_jitter and (len(a.color_jitter) not in (3, 4) or a.color_jitter[3:] > (0.5,)):
    raise UserError(
      f'augment.color_jitter={a.color_jitter!r}: three numbers are needed, and a hue up to 0.5'
    )


def _check_rand_augment(c: TrainConfig):
  if c.augment.rand_augment:
    try:
      RandAugment.parse(c.augment.rand_augment)
    except UserError as e:
      raise UserError(f'augment.rand_augment: {e}') from e


def _check_repeats(c: TrainConfig):
  if c.augment.repeats > c.batch_size:
    raise UserError(f'augment.repeats={c.augment.repeats}: at most batch_size={c.batch_size}')


def _check_warmup(c: TrainConfig):
  if not c.steps and c.optimizer.warmup_epochs >= c.epochs:
    raise UserError(
      f'optimizer.warmup_epochs={c.optimizer.warmup_epochs}: fewer than the {c.epochs} epochs of '
      f'the run are needed, --config.optimizer.warmup_epochs={c.epochs / 10:g} for example'
    )


def _check_first_epoch(c: TrainConfig):
  o = c.optimizer
  if o.schedule_per == 'epoch' and o.warmup_epochs and not o.warmup_learning_rate:
    raise UserError(
      "optimizer.schedule_per='epoch' with optimizer.warmup_learning_rate=0: the rate of the whole "
      'first epoch would be 0, and nothing be learnt; 1e-6 is what the ImageNet configs have'
    )


def _check_class_weights(c: TrainConfig):
  if c.class_weights and not any(c.class_weights):
    raise UserError(f'class_weights={c.class_weights!r}: one above 0 is needed, or no class counts')
  if c.class_weights and c.balance_classes:
    raise UserError(
      f'class_weights={c.class_weights!r} with balance_classes=true: one of the two is needed'
    )


def _check_milestones(c: TrainConfig):
  milestones = c.optimizer.milestones
  if c.optimizer.schedule == 'multistep' and not milestones:
    raise UserError('optimizer.milestones=(): a multistep schedule needs at least one')
  if list(milestones) != sorted(set(milestones)):
    raise UserError(f'optimizer.milestones={milestones!r}: rising epochs are needed')
  if milestones and not c.steps and milestones[-1] >= c.epochs:
    raise UserError(
      f'optimizer.milestones={milestones!r}: epochs before the end, at {c.epochs}, are needed'
    )


def _check_decays(c: TrainConfig):
  for name in ('beta1', 'beta2', 'momentum', 'rms_decay', 'ema_decay'):
    if getattr(c.optimizer, name) == 1:
      raise UserError(f'optimizer.{name}=1.0: such an average never moves; below 1 is needed')


def _check_freeze(c: TrainConfig):
  freeze = c.optimizer.freeze
  try:
    re.compile(freeze)
  except re.error as e:
    raise UserError(f'optimizer.freeze={freeze!r} is no regular expression: {e}') from e
  if freeze == 'backbone' and not c.init_from:
    raise UserError(
      "optimizer.freeze='backbone' without init_from: the backbone would stay as it was drawn; set "
      'init_from to its weights'
    )


def _check_groups(c: TrainConfig):
  size, k = c.model.bn_group_size, c.optimizer.accumulate_steps
  if size and c.batch_size % size:
    raise UserError(f'model.bn_group_size={size} does not divide batch_size={c.batch_size}')
  if k == 1:
    return
  if c.batch_size % k:
    raise UserError(f'optimizer.accumulate_steps={k} does not divide batch_size={c.batch_size}')
  from cvt_flax.models.zoo import is_compact  # here: it loads Flax, which a typo need not wait for

  no_batch_norm = c.model.projection in ('avg', 'linear') or is_compact(c.model.name)
  if not (size or no_batch_norm or c.optimizer.freeze == 'backbone'):
    raise UserError(
      f'optimizer.accumulate_steps={k} with model.bn_group_size=0: statistics over the whole batch '
      f'cannot be taken in parts; set model.bn_group_size, {c.batch_size // k} for example'
    )
  if size and (c.batch_size // size) % k:
    raise UserError(
      f'optimizer.accumulate_steps={k} does not divide the {c.batch_size // size} groups of '
      f'model.bn_group_size={size} images in batch_size={c.batch_size}'
    )


CHECKS: tuple[Callable[[TrainConfig], None], ...] = (
  _check_source,
  _check_seeds,
  _check_channels,
  _check_crop,
  _check_random_crop,
  _check_rand_augment,
  _check_repeats,
  _check_warmup,
  _check_first_epoch,
  _check_class_weights,
  _check_milestones,
  _check_decays,
  _check_freeze,
  _check_groups,
)
