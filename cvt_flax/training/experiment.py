"""experiment.json: which experiment a run folder belongs to."""

import dataclasses
import json
import os
import pathlib

import numpy as np

from cvt_flax.errors import UserError
from cvt_flax.training.config import TrainConfig, differences, freeze, to_dict
from cvt_flax.training.hardware import describe

# What may differ when a run goes on: these do not change what is computed, or only add epochs.
_FREE = (
  'data_dir',
  'log_every',
  'closing_note',
  'tensorboard',
  'epochs',
  'eval.every_epochs',
  'eval.batch_size',
)
_FREE_GROUPS = ('mesh.', 'checkpoint.')
# What may differ besides when a run is only evaluated.
_FREE_IN_EVALUATION = ('source', 'batch_size', 'skip_unreadable')


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What a run folder says of itself.

  Attributes:
    config: the config it was started with.
    class_names: what the logits stand for.
  """

  config: TrainConfig
  class_names: tuple[str, ...]


def read(folder: pathlib.Path) -> Experiment | None:
  """Returns the experiment of a run folder; None when it holds none."""
  path = folder / 'experiment.json'
  if not path.exists():
    return None
  try:
    record = json.loads(path.read_text())
    return Experiment(freeze(record['config']), tuple(record['class_names']))
  except (json.JSONDecodeError, KeyError, TypeError) as e:
    raise UserError(f'{path} cannot be read ({e}): is this a run folder of cvt_flax?') from e


def write(folder: pathlib.Path, experiment: Experiment, held_out: np.ndarray) -> None:
  """Writes experiment.json and held_out.json, the indices held out of train for validation."""
  _write(
    folder / 'experiment.json',
    {
      'config': to_dict(experiment.config),
      'class_names': experiment.class_names,
      'hardware': describe(),
    },
  )
  _write(folder / 'held_out.json', held_out.tolist())


def _write(path, value):
  temporary = path.with_suffix('.tmp')
  temporary.write_text(json.dumps(value, indent=1 if isinstance(value, dict) else None) + '\n')
  os.replace(temporary, path)


def check_config(
  folder: pathlib.Path, saved: TrainConfig, now: TrainConfig, evaluation: bool
) -> None:
  """Checks that the run in a folder can be gone on with, or evaluated, under a config.

  Raises:
    UserError: when it is the run of another config.
  """
  changed = {
    name: pair
    for name, pair in differences(saved, now).items()
    if name not in _FREE
    and not name.startswith(_FREE_GROUPS)
    and not (evaluation and name in _FREE_IN_EVALUATION)
  }
  if changed:
    words = ', '.join(f'{name} {old!r} -> {new!r}' for name, (old, new) in changed.items())
    raise UserError(
      f'{folder} holds a run of another config ({words}): give another --workdir, or the config '
      'that it was started with'
    )
  if now.epochs < saved.epochs and not evaluation:
    raise UserError(
      f'epochs={now.epochs}: the run in {folder} was started with {saved.epochs}, which can only '
      'be raised'
    )


def check_classes(folder: pathlib.Path, saved: Experiment, now: Experiment) -> None:
  """Raises a UserError when the data's classes are not those that the run was trained on."""
  if now.class_names != saved.class_names:
    raise UserError(
      f'{now.config.source} has {len(now.class_names)} classes ({_few(now.class_names)}), the '
      f'checkpoint in {folder} was trained on {len(saved.class_names)} '
      f'({_few(saved.class_names)}): the same classes in the same order are needed'
    )


def _few(names):
  return ', '.join(names[:3]) + (', ...' if len(names) > 3 else '')
