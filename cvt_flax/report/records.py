"""What run folders hold, read for a report; nothing of it is computed here."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from cvt_flax import storage
from cvt_flax.errors import UserError
from cvt_flax.report import predictions
from cvt_flax.report.predictions import Predictions
from cvt_flax.weights import run_folder

# The runs of one config over several seeds lie in one folder, each in one of this name.
SEED_FOLDER = 'seed-{}'
# In what the runs of one config may differ, and a run that goes on from what it was, by how the
# names of keys begin: how it is computed, watched and kept. Nothing that is computed depends on it;
# eval.every_epochs says which checkpoints there are to choose from.
MAY_DIFFER = (
  'data_dir',
  'skip_unreadable',
  'log_every',
  'closing_note',
  'tensorboard',
  'eval.every_epochs',
  'eval.batch_size',
  'model.remat',
  'mesh.',
  'checkpoint.',
  'stream.',
)


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
  """One run folder.

  Attributes:
    folder: where it is.
    config: {dotted key: value}.
    class_names: of the labels.
    hardware: of the last start: 'devices', 'platform', 'versions' and so on.
    lines: of metrics.jsonl.
    predictions: None where the run has not written them.
  """

  folder: pathlib.Path
  config: dict
  class_names: tuple[str, ...]
  hardware: dict
  lines: list[dict]
  predictions: Predictions | None

  @property
  def seed(self) -> int:
    return self.config['seed']

  def curve(self, metric: str) -> tuple[list[float], list[float]]:
    """Returns the epochs and the values of a metric, where it was finite.

    A line of training is over the steps since the one before. Where these are less than half of
    those of the one before, as when a run ends between two lines, it is left out: the mean of a
    step or two is mostly chance, and looks like a turn of the curve.
    """
    points = [x for x in self.lines if x.get(metric) is not None]
    if metric.startswith('train/'):
      steps = np.diff([x['step'] for x in points], prepend=0)
      kept = np.flatnonzero(2 * steps >= np.append(0, steps)[: len(steps)])
      points = [points[i] for i in kept]
    return [x['epoch'] for x in points], [x[metric] for x in points]

  @functools.cached_property
  def final(self) -> dict:
    """The metrics of the best checkpoint, and its 'epoch'; {} while the run is not finished."""
    done = [line for line in self.lines if 'checkpoint' in line]
    if not done or done[-1]['step'] < max(line['step'] for line in self.lines):
      return {}  # the latter of a run that was finished and goes on
    step = done[-1]['checkpoint']
    found = {name: value for name, value in done[-1].items() if name not in ('step', 'epoch')}
    for line in self.lines:
      if line['step'] == step:
        found['epoch'] = line['epoch']
        found |= {name: value for name, value in line.items() if name.startswith('val/')}
    return found

  def score(self, metric: str) -> float | None:
    """Returns a metric of the best checkpoint; None where there is none, or where it says nothing.

    That is top-5 where there are no more than five classes: it is always 1.
    """
    if metric.endswith('/top5') and len(self.class_names) <= 5:
      return None
    return self.final.get(metric)

  def evaluations(self) -> dict[str, dict]:
    """Returns the metrics of `final` by split, {'test': {'top1': 0.9, ...}, 'val': ...}."""
    found = {}
    for key, value in self.final.items():
      split, slash, name = key.partition('/')
      if slash:
        found.setdefault(split, {})[name] = value
    return found

  @property
  def uneven(self) -> bool:
    """Whether top-1 says little of rare classes, as `are_uneven`, on a split at least."""
    return any(map(are_uneven, self.evaluations().values()))

  @property
  def validated(self) -> bool:
    """Whether validation images chose the checkpoint of `final`; otherwise it is the last one."""
    return 'val/top1' in self.final

  def devices(self) -> str:
    """Returns what the run was computed on, as '8 x TPU v4'."""
    counts = Counter(self.hardware['devices'])
    return ', '.join(f'{n} x {kind}' for kind, n in counts.items())

  def parameters(self) -> list[tuple[str, str, int]]:
    """Returns (name, shape, numbers in it) of every parameter; [] where no table was written."""
    path = self.folder / run_folder.PARAMETERS
    if not path.exists():
      return []
    cells = [[c.strip() for c in row.split('|')] for row in path.read_text().splitlines()]
    rows = [c[1:5] for c in cells if len(c) >= 6 and c[4].replace(',', '').isdigit()]
    return [(name, shape, int(size.replace(',', ''))) for name, shape, _, size in rows]


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
  """The runs of one config: one, or one for each of several seeds."""

  name: str
  runs: tuple[Run, ...]

  def finals(self, metric: str) -> dict[int, float]:
    """Returns {seed: value} of a metric of the best checkpoints, where a run has it."""
    return {r.seed: r.score(metric) for r in self.runs if r.score(metric) is not None}


def read_groups(folders: Sequence[str | pathlib.Path]) -> list[Group]:
  """Returns the runs of some folders by their configs.

  Args:
    folders: each of a run, or of runs over several seeds. Runs of one config that are given one by
      one, as they are trained on several machines, are a group as well, called by what their names
      have in common, or as the first of them where another group could have that name.

  Raises:
    UserError: a folder holds no run, or is damaged.
  """
  paths = [storage.path_of(folder) for folder in folders]
  names = [path.absolute().name for path in paths]
  if len(set(names)) < len(names):
    names = [str(path) for path in paths]
  if len(set(names)) < len(names):
    raise UserError('the same run is given twice')
  groups, common = [], []
  for name, path in zip(names, paths, strict=True):
    runs = _runs(path)
    for i, group in enumerate(groups):
      both = (*group.runs, *runs)
      seeds = {run.seed for run in both}
      if len(seeds) == len(both) and _are_of_one_config(group.runs[0], runs[0]):
        groups[i] = Group(group.name, tuple(sorted(both, key=lambda run: run.seed)))
        common[i] = _without_seed(path.absolute())
        break
    else:
      groups.append(Group(name, runs))
      common.append(name)
  return [
    Group(group.name if short in names or common.count(short) > 1 else short, group.runs)
    for group, short in zip(groups, common, strict=True)
  ]


def _without_seed(folder):
  return folder.parent.name if is_of_seed(folder) else re.sub(r'-seed\d+$', '', folder.name)


def _are_of_one_config(a: Run, b: Run) -> bool:
  """Whether nobody could tell runs apart but by their seed; an older version's may be another's."""
  every = 'eval.every_epochs'
  return (
    a.class_names == b.class_names
    and a.config.keys() == b.config.keys()
    and a.config[every] == b.config[every]
    and not _differences(a, b)
  )


def _differences(a: Run, b: Run) -> list[str]:
  """Returns the keys that tell two runs' configs apart; a key that one does not know does not."""
  same = ('seed', *MAY_DIFFER, *_of_length(a, b))
  return sorted(
    key
    for key in a.config.keys() & b.config.keys()
    if a.config[key] != b.config[key] and not key.startswith(same)
  )


def _of_length(*runs: Run) -> tuple[str, ...]:
  """Returns ('epochs',) for runs that are all trained by steps, which take its place; else ()."""
  return ('epochs',) if all(run.config.get('steps') for run in runs) else ()


def are_uneven(metrics: Mapping) -> bool:
  """Whether top-1 says little of rare classes: whether one has over 1.5 times its even share.

  Args:
    metrics: of an evaluation; 'majority' and 'per_class', None for a class without images.
  """
  if 'majority' not in metrics:  # of images with several labels, and of earlier versions
    return False
  classes = sum(share is not None for share in metrics['per_class'])
  return metrics['majority'] * classes > 1.5


def alarm(metrics: Mapping, class_names: Sequence[str]) -> str:
  """Returns what to say when all images were taken for one class and are not of one; else ''.

  Args:
    metrics: of an evaluation; 'predicted', the images taken for each class, and 'per_class'.
    class_names: of the classes.
  """
  classes = np.flatnonzero(metrics.get('predicted', ()))
  if len(classes) != 1 or sum(share is not None for share in metrics['per_class']) < 2:
    return ''
  return (
    f'WARNING: all {metrics["images"]:,} images are taken for {class_names[classes[0]]!r}, and '
    'they are of several classes'
  )


def is_of_seed(folder: pathlib.Path) -> bool:
  """Whether a folder is called as those of `config.seeds` are; 'seed-0-old' is not."""
  return bool(re.fullmatch(SEED_FOLDER.format(r'\d+'), folder.name))


def _runs(folder):
  if (folder / run_folder.EXPERIMENT).is_file():
    return (read_run(folder),)
  below = (p.parent for p in folder.glob(f'{SEED_FOLDER.format("*")}/{run_folder.EXPERIMENT}'))
  found = [path for path in below if is_of_seed(path)]
  if not found:
    what = 'holds no run' if folder.is_dir() else 'there is no such folder'
    patterns = (f'{each}/{run_folder.EXPERIMENT}' for each in ('*', '*/*'))
    inside = sorted(path.parent for each in patterns for path in folder.glob(each))
    such = ''
    if inside:
      such = f'; {inside[0].parent if is_of_seed(inside[0]) else inside[0]} for example'
    raise UserError(
      f'{folder}: {what}; a run folder is needed, or one of seed-0, seed-1, ...{such}'
    )
  runs = tuple(sorted((read_run(path) for path in found), key=lambda run: run.seed))
  for run in runs[1:]:
    if others := _differences(runs[0], run):
      raise UserError(
        f'{folder} is not of one config: {runs[0].folder.name} and {run.folder.name} differ in '
        f'{", ".join(others)}; give the run folders one by one'
      )
  return runs


def read_run(folder: pathlib.Path) -> Run:
  """Reads one run folder.

  Raises:
    UserError: a file in it is missing or damaged.
  """
  path = folder / run_folder.EXPERIMENT
  try:
    record = json.loads(path.read_text())
    config = dict(_flat(record['config']))
    seed, source = config['seed'], config['source']
    names, hardware = tuple(record['class_names']), dict(record['hardware'])
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
    raise UserError(f'{path} is damaged ({type(e).__name__}: {e})') from e
  if not isinstance(seed, int) or not isinstance(source, str):
    raise UserError(f'{path} is damaged: seed={seed!r}, source={source!r}')
  return Run(
    folder,
    config,
    names,
    hardware,
    run_folder.read_metrics(folder / run_folder.METRICS),
    predictions.read(folder / run_folder.PREDICTIONS),
  )


def _flat(config: Mapping, prefix=''):
  for name, value in config.items():
    if isinstance(value, Mapping):
      yield from _flat(value, f'{prefix}{name}.')
    else:
      yield f'{prefix}{name}', tuple(value) if isinstance(value, list) else value


def config_differences(groups: Sequence[Group]) -> dict[str, list]:
  """Returns {dotted key: its value in each group} of the keys in which the groups differ.

  The seed is not one of them where a group has several, and what a run says at its end never is; a
  key that an older run does not know is None.
  """
  first = [group.runs[0] for group in groups]
  configs = [run.config for run in first]
  keys = dict.fromkeys(key for config in configs for key in config)
  for key in ('closing_note', *_of_length(*first)):
    keys.pop(key, None)
  if any(len(group.runs) > 1 for group in groups):
    keys.pop('seed')
  rows = {key: [config.get(key) for config in configs] for key in keys}
  return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def default_output(folders: Sequence[str | pathlib.Path]) -> pathlib.Path:
  """Returns where a report goes: into the run's folder, for several into the first one's."""
  report = (storage.path_of(folders[0]) / run_folder.REPORT).parent
  return report / 'comparison' if len(folders) > 1 else report
