"""experiment.json: which experiment a run folder belongs to."""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import pathlib
from collections.abc import Iterator

from jax.sharding import Mesh

from cvt_flax import storage
from cvt_flax.data.dataset import Dataset
from cvt_flax.errors import UserError
from cvt_flax.report.records import MAY_DIFFER, is_of_seed
from cvt_flax.training.config import TrainConfig, differences, flags, freeze, to_dict
from cvt_flax.training.hardware import describe
from cvt_flax.weights import run_folder
from cvt_flax.weights.description import Description, run_json

# What may differ when a run goes on, by how names begin. `epochs`, or `steps`, may be raised; the
# learning rate then follows the longer schedule from there on.
_FREE = (*MAY_DIFFER, 'epochs', 'eval.sets')
# All that an evaluation depends on, with the group model.* less what belongs to who computes.
_OF_EVALUATION = (
  'image_size',
  'crop_ratio',
  'mean',
  'std',
  'loss',
  'seed',
  'eval.holdout',
  'eval.test_holdout',
  'train_share',
  'optimizer.ema_decay',
)
OF_COMPUTING = ('model.dtype', 'model.bn_group_size', 'model.remat')

# What keeps a second run out of a folder; it stays there, empty.
_LOCK = '.lock'


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What a run folder says of itself.

  Attributes:
    config: the config it was started with.
    class_names: what the logits stand for.
    data: the digest of the images that are trained on and validated with, as the source lists them.
    decoded: of the resident engine, the digest of those of them that could be decoded.
  """

  config: TrainConfig
  class_names: tuple[str, ...]
  data: str
  decoded: str


def digest(data: Dataset) -> str:
  """Returns a digest of what is trained on and validated with, as `Split.digest`."""
  used = (split for split in (data.train, data.validation) if split is not None)
  return '+'.join(split.digest() for split in used)


def read(folder: pathlib.Path) -> Experiment | None:
  """Returns the experiment of a run folder; None when it holds none."""
  path = folder / run_folder.EXPERIMENT
  if not path.exists():
    return None
  try:
    record = json.loads(path.read_text())
    config = _with_defaults(record['config'], to_dict(TrainConfig()))
    names = tuple(record['class_names'])
    return Experiment(freeze(config), names, record['data'], record['decoded'])
  except (OSError, ValueError, KeyError, TypeError, UserError) as e:
    raise UserError(
      f'{path} is damaged, or of another version ({type(e).__name__}: {e}): give another folder, '
      f'{free(folder)}'
    ) from e


def free(folder: pathlib.Path) -> str:
  """Returns the flag for a folder beside one that is taken: '--workdir=runs/digits-seed0-2'.

  Of one of several seeds it is beside the folder that all of them are in.
  """
  folder = folder.resolve() if folder.name in ('', '..') else folder
  folder = folder.parent if is_of_seed(folder) else folder
  beside = (storage.path_of(f'{folder}-{i}') for i in itertools.count(2))
  return f'--workdir={next(path for path in beside if not path.exists())}'


def _with_defaults(saved: dict, defaults: dict) -> dict:
  """Returns a saved config with the keys that have been declared since, at their defaults."""
  groups = {
    k: _with_defaults(saved[k], v)
    for k, v in defaults.items()
    if isinstance(v, dict) and k in saved
  }
  return defaults | saved | groups


def has_begun(folder: pathlib.Path) -> bool:
  """Whether a run has come to something that is worth keeping: an evaluation, or a checkpoint."""
  checkpoints = folder / run_folder.CHECKPOINTS
  if checkpoints.is_dir() and any(path.name.isdigit() for path in checkpoints.iterdir()):
    return True
  lines = run_folder.read_metrics(folder / run_folder.METRICS)  # checkpoints may have been removed
  return any('checkpoint' in line or 'val/top1' in line for line in lines)


def check_folder(folder: pathlib.Path, holds_run: bool, evaluation: bool) -> None:
  """Checks that a run folder can be read, and in training be written to.

  Raises:
    UserError: it holds no run where one is needed, something else, or is out of reach.
  """
  if evaluation:
    if not holds_run:
      raise UserError(f'{folder} holds no run to evaluate')
    return
  if not storage.is_remote(folder):
    _check_writable(folder)
  if not holds_run and not storage.is_free(folder):
    raise UserError(f'{folder} is not empty and holds no run: give another, {free(folder)}')


def _check_writable(folder):
  nearest = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
  if not nearest.is_dir():
    raise UserError(f'--workdir={folder}: {nearest} is not a folder')
  if not os.access(nearest, os.W_OK | os.X_OK):
    raise UserError(f'--workdir={folder}: {nearest} is not writable')


@contextlib.contextmanager
def only_one(folder: pathlib.Path) -> Iterator[bool]:
  """Keeps a second process from training in the same folder, while the block lasts.

  It cannot where nothing locks: in an object store, on Windows, and where a file system over a
  network is mounted without locks. Yields whether it does.
  """
  storage.make_folder(folder, f'--workdir={folder}')
  try:
    import fcntl
  except ImportError:  # Windows
    fcntl = None
  if not fcntl or storage.is_remote(folder):
    yield False
    return
  # Of a file that is written to: over NFS a folder would be locked on this machine alone.
  handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
  locked = True
  try:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise UserError(f'another process is training in {folder}') from e
    except OSError as e:
      if e.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
        raise
      locked = False
    yield locked
  finally:
    os.close(handle)


# Where in the source's own train split images of others are: {file: attribute of Dataset}.
_HELD_OUT = {'held_out.json': 'held_out', 'held_out_test.json': 'held_out_test'}


def write(
  folder: pathlib.Path, experiment: Experiment, data: Dataset, model: Description, mesh: Mesh
) -> None:
  """Writes what a run folder says of itself.

  Args:
    folder: of the run.
    experiment: for experiment.json.
    data: of which held_out.json tells the images of train that are validation images, and
      held_out_test.json, where there are any, those that are test images.
    model: for model.json, by which the checkpoints can be read as weights.
    mesh: of the devices that compute.
  """
  _write(
    folder / run_folder.EXPERIMENT,
    {
      'config': to_dict(experiment.config),
      'class_names': experiment.class_names,
      'data': experiment.data,
      'decoded': experiment.decoded,
      'hardware': describe(mesh),
    },
  )
  for file, name in _HELD_OUT.items():
    held_out = getattr(data, name)
    if name == 'held_out' or held_out.size:
      _write(folder / file, held_out.tolist())
    elif (folder / file).exists():  # of a run that came to nothing
      (folder / file).unlink()
  _write(folder / run_folder.DESCRIPTION, run_json(model))


def _write(path, value):
  text = json.dumps(value, indent=1 if isinstance(value, dict) else None) + '\n'
  storage.write_whole(path, text.encode())


def check_config(
  folder: pathlib.Path, saved: TrainConfig, now: TrainConfig, evaluation: bool
) -> None:
  """Checks that the run in a folder can be gone on with, or evaluated, under a config.

  Raises:
    UserError: when it is the run of another config.
  """
  may_differ = (*_FREE, 'steps') if now.steps and saved.steps else _FREE
  changed = {
    name: pair
    for name, pair in differences(saved, now).items()
    if (
      name in _OF_EVALUATION or name.startswith('model.') and name not in OF_COMPUTING
      if evaluation
      else not name.startswith(may_differ)
    )
  }
  if changed:
    told = [f'{name} {old!r} -> {new!r}' for name, (old, new) in changed.items()]
    words = ', '.join(told[:4]) + (f' and {len(told) - 4} more' if told[4:] else '')
    allowed = f'give another folder, {free(folder)}, or the config that it was started with'
    if evaluation:
      allowed = f'give its own, {flags({name: old for name, (old, _) in changed.items()})}'
    raise UserError(f'{folder} holds a run of another config ({words}): {allowed}')
  name = 'steps' if now.steps else 'epochs'
  given, before = getattr(now, name), getattr(saved, name)
  if given < before and not evaluation:
    raise UserError(
      f'{name}={given}: the run in {folder} was started with {before}, which can only be raised'
    )


def check_classes(
  folder: pathlib.Path, saved: Experiment, source: str, class_names: tuple[str, ...]
) -> None:
  """Raises a UserError when the data's classes are not those that the run was trained on."""
  if class_names != saved.class_names:
    raise UserError(
      f'{source} has {len(class_names)} classes ({_few(class_names)}), the '
      f'checkpoint in {folder} was trained on {len(saved.class_names)} '
      f'({_few(saved.class_names)}): the same classes in the same order are needed'
    )


def check_data(folder: pathlib.Path, saved: Experiment, now: Experiment) -> None:
  """Raises a UserError when the images are not those that the run was started with."""
  if (now.data, now.decoded) != (saved.data, saved.decoded):
    raise UserError(
      f'the images of {now.config.source} have changed since the run in {folder} was started, and '
      f'some that it was trained on might now be validated with: give another, {free(folder)}'
    )


def check_held_out(folder: pathlib.Path, saved: Experiment, data: Dataset) -> None:
  """Raises a UserError when other images of train are held out than when the run was started."""
  source = saved.config.source
  for file, name in _HELD_OUT.items():
    path = folder / file
    try:
      places = json.loads(path.read_text()) if path.exists() else []
    except (OSError, ValueError) as e:
      raise UserError(f'{path} is damaged ({type(e).__name__}: {e})') from e
    if places != getattr(data, name).tolist():
      raise UserError(
        f'the images of {source} have changed since the run in {folder} was started: {file} names '
        'others, and some that it was trained on would be evaluated'
      )
  if (data.held_out.size or data.held_out_test.size) and digest(data) != saved.data:
    raise UserError(
      f'the images of {source} have changed since the run in {folder} was started, and some that '
      'it was trained on might be evaluated'
    )


def _few(names):
  return ', '.join(names[:3]) + (', ...' if len(names) > 3 else '')
