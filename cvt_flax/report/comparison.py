"""The page of several runs: configs beside each other, each over one seed or several."""

from __future__ import annotations

import itertools
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from cvt_flax.data.sources import are_same
from cvt_flax.report import figures, markup, records, statistics
from cvt_flax.report.figures import Line
from cvt_flax.report.markup import number
from cvt_flax.report.plots import SHARES, SPLITS, Plots, is_seen
from cvt_flax.report.records import Group, Run

_CURVES = (
  ('val/top1', 'val_accuracy', 'Validation top-1 accuracy', True),
  ('val/loss', 'val_loss', 'Validation loss', False),
  ('train/loss', 'train_loss', 'Training loss', False),
  ('train/learning_rate', 'learning_rate', 'Learning rate', False),
  ('train/images_per_sec', 'throughput', 'Training images a second', False),
)
_METRICS = (
  ('test/top1', 'test top-1', '.2%'),
  ('test/majority', 'test, most frequent class alone', '.2%'),
  ('test/top5', 'test top-5', '.2%'),
  ('test/balanced_accuracy', 'test balanced accuracy', '.2%'),
  ('test/f1', 'test F1', '.2%'),
  ('test/auc', 'test AUC', '.2%'),
  ('test/loss', 'test loss', '.4f'),
  ('val/top1', 'validation top-1', '.2%'),
  ('val/majority', 'validation, most frequent class alone', '.2%'),
  ('val/top5', 'validation top-5', '.2%'),
  ('val/balanced_accuracy', 'validation balanced accuracy', '.2%'),
  ('val/f1', 'validation F1', '.2%'),
  ('val/auc', 'validation AUC', '.2%'),
  ('val/loss', 'validation loss', '.4f'),
)
_TESTED = 'test/top1', 'val/top1'
# The keys that say which images of its source a split has, and what they are where an older run
# has none.
_OF_TEST = {'eval.test_holdout': 0.0}
_IMAGES = {'test': _OF_TEST, 'val': _OF_TEST | {'eval.holdout': 0.1}}


def sections(groups: Sequence[Group], folder: pathlib.Path) -> Iterator[str]:
  """Yields the parts of the page of several runs, whose figures are written to `folder` too."""
  title = ' and '.join(group.name for group in groups)
  seeds = [f'{g.name}: {_seeds(g)}' for g in groups if len(g.runs) > 1]
  yield markup.heading(title, *seeds)
  yield _results(groups)
  yield _sizes(groups)
  tests = [*_paired_tests(groups), *_mcnemar(groups)]
  if tests:
    yield markup.section('Is it chance?', *tests)
  yield _curves(groups, Plots(folder))
  yield _differences(groups)


def _seeds(group):
  return f'{len(group.runs)} seeds, {", ".join(str(run.seed) for run in group.runs)}'


def _results(groups):
  even = not any(len(run.class_names) == 2 or run.uneven for g in groups for run in g.runs)
  found = [
    m
    for m in (*_METRICS, *_of_other_sets(groups))
    if any(g.finals(m[0]) for g in groups) and not (even and m[0].endswith('/majority'))
  ]
  several = any(len(group.runs) > 1 for group in groups)
  head = ['config', 'metric', 'value']
  if several:
    head = ['config', 'metric', 'mean', 'deviation', 'lowest', 'highest', 'runs']
  rows = []
  for metric, name, form in found:
    for group in groups:
      values = list(group.finals(metric).values())
      if not values and any(run.final for run in group.runs):
        continue  # it is not a metric of these classes, or of these splits
      mean, deviation = statistics.mean_and_deviation(values) if values else (None, None)
      ends = (min(values), max(values)) if len(values) > 1 else (None, None)
      numbers = [number(value, form) for value in (mean, deviation, *ends)]
      rows.append([group.name, name, *numbers, number(len(values))][: len(head)])
  parts = []
  if rows:
    parts.append(markup.table(head, rows))
    validated = {run.validated for group in groups for run in group.runs if run.final}
    if validated == {False}:
      chosen = 'the last checkpoint of each run'
    else:
      chosen = 'the checkpoint that each run chose by validation'
      chosen += ', or its last where it has none' if False in validated else ''
    deviation = '; the deviation is that of a sample, n - 1, over seeds' if several else ''
    parts.append(markup.paragraph(f'Of {chosen}{deviation}.', faint=True))
  for group in groups:
    if group.finals('test/f1') or group.finals('val/f1'):
      positive = group.runs[0].class_names[1]
      parts.append(
        markup.paragraph(
          f'{group.name}: F1 and AUC are of {positive!r} against the other.', faint=True
        )
      )
  parts += [
    markup.paragraph(f'{run.folder}, {SPLITS.get(split, split)}: {warning}.')
    for group in groups
    for run in group.runs
    for split, metrics in run.evaluations().items()
    if (warning := records.alarm(metrics, run.class_names))
  ]
  unfinished = [str(run.folder) for group in groups for run in group.runs if not run.final]
  if unfinished:
    parts.append(markup.paragraph(f'Not finished, and not counted: {", ".join(unfinished)}.'))
  each = [
    [str(run.folder), *(number(run.score(metric), form) for metric, _, form in found)]
    for group in groups
    for run in group.runs
    if run.final
  ]
  if len(each) > len(groups):
    head = ['run', *(name for _, name, _ in found)]
    parts.append(markup.details('every run', markup.table(head, each)))
  return markup.section('Results', *parts)


def _sizes(groups):
  rows = []
  for group in groups:
    first = group.runs[0]
    same = [run for run in group.runs if run.devices() == first.devices()]
    rates = [rate for run in same for rate in run.curve('train/images_per_sec')[1]]
    rows.append(
      [group.name, str(first.config['model.name'])]
      + [number(sum(size for _, _, size in first.parameters()) or None)]
      + [number(float(np.median(rates)) if rates else None, ',.0f')]
      + [first.devices()]
    )
  head = ['config', 'model', 'parameters', 'images a second', 'on']
  words = (
    'Images a second are the median of training, evaluations and checkpoints not counted, of the '
    'runs that were on the same devices as the first.'
  )
  table = markup.table(head, rows)
  return markup.section('Size and speed', table, markup.paragraph(words, faint=True))


def _of_other_sets(groups):
  """Yields the shares of eval.sets, as `_METRICS` has those of the splits."""
  names = (name for group in groups for run in group.runs for name in run.final)
  for name in dict.fromkeys(names):
    split, _, metric = name.partition('/')
    if split not in _IMAGES and metric in SHARES:
      yield name, f'{split} {SHARES[metric]}', '.2%'


def _difference(value, form):
  """Returns the difference of two numbers of a form, of two percentages in points."""
  if form.endswith('%'):
    return f'{100 * value:+{form[:-1]}f} points'
  return number(value, f'+{form}')


def _paired_tests(groups):
  """Yields a paired t-test over the seeds of every two configs; of single runs there is none."""
  rows, apart, other_images = [], [], []
  for a, b in itertools.combinations(groups, 2):
    if len(_pairs(a, b)) < 2 <= max(len(a.runs), len(b.runs)):
      apart.append(f'{b.name} and {a.name}')
    for metric, name, form in (m for m in _METRICS if m[0] in _TESTED):
      test = statistics.paired_t(a.finals(metric), b.finals(metric))
      if test and not _same_images(a.runs[0], b.runs[0], metric.partition('/')[0]):
        other_images.append(f'{b.name} and {a.name}, {name}')
      elif test:
        rows.append(
          [f'{b.name} less {a.name}', name, _difference(test.difference, form)]
          + [number(test.p, '.3g'), number(test.n)]
        )
  if rows:
    yield '<h3>Paired t-test over seeds</h3>'
    yield markup.table(['configs', 'metric', 'difference', 'p', 'seeds'], rows)
    yield markup.paragraph(
      'Two-sided; p is of a mean difference of zero over seeds. With few seeds only a large '
      'difference shows. Where every seed differs by the same there is no p.',
      faint=True,
    )
  if apart:
    words = 'Too few seeds in common for a paired test, of which two are the least'
    yield markup.paragraph(f'{words}: {", ".join(apart)}.')
  if other_images:
    words = 'No paired test, as source, classes, eval.holdout or eval.test_holdout differ'
    yield markup.paragraph(f'{words}: {"; ".join(other_images)}.')


def _same_images(a: Run, b: Run, split: str) -> bool:
  """Whether two runs of a seed have the same images in a split, as far as their configs say."""
  keys = _IMAGES[split].items()
  return (
    are_same(a.config['source'], b.config['source'])
    and all(a.config.get(key, default) == b.config.get(key, default) for key, default in keys)
    and a.class_names == b.class_names
  )


def _mcnemar(groups):
  """Yields McNemar's exact test on the images of every two runs of a seed."""
  rows, other_images, other_weights, compared = [], False, False, set()
  for a, b in itertools.combinations(groups, 2):
    for first, second in _pairs(a, b):
      if first.predictions is None or second.predictions is None:
        continue
      if any(run.final.get('checkpoint') != run.predictions.step for run in (first, second)):
        other_weights = True
        continue
      test = statistics.mcnemar(first.predictions, second.predictions)
      if test is None or not _same_images(first, second, first.predictions.split):
        other_images = True
        continue
      compared.add(first.predictions.split)
      seed = '' if len(a.runs) == len(b.runs) == 1 else str(first.seed)
      rows.append(
        [f'{b.name} against {a.name}', seed, number(test.only_second), number(test.only_first)]
        + [number(test.p, '.3g'), number(test.n)]
      )
  if rows:
    yield "<h3>McNemar's exact test on images</h3>"
    head = ['configs', 'seed', 'only the first is right', 'only the second', 'p', 'images']
    yield markup.table(head, rows)
    yield markup.paragraph(
      'Two-sided; p is of two trained networks that are right equally often. It says nothing of '
      'networks of other seeds.',
      faint=True,
    )
  if 'val' in compared:
    yield markup.paragraph('Validation images are compared, by which checkpoints were chosen.')
  if other_images:
    yield markup.paragraph('Runs whose predictions are not of the same images are not compared.')
  if other_weights:
    yield markup.paragraph(
      'Runs that are not finished, or whose predictions are of another checkpoint than their '
      'metrics, are not compared.'
    )


def _pairs(a: Group, b: Group):
  """Returns the runs to compare: those of a seed, or of a group of one run each."""
  if len(a.runs) == len(b.runs) == 1:
    return [(a.runs[0], b.runs[0])]
  second = {run.seed: run for run in b.runs}
  return [(run, second[run.seed]) for run in a.runs if run.seed in second]


def _curves(groups, plots):
  parts = []
  for metric, name, title, percent in _CURVES:
    drawn = []
    for color, group in enumerate(groups):
      label, style = group.name, 'thin' if len(group.runs) > 1 else 'line'
      for run in group.runs:
        x, y = run.curve(metric)
        if x:
          drawn.append(Line(label, x, y, color, style))
          label = ''  # one line of a group is named
    if is_seen(drawn):
      parts.append(plots(name, title, figures.lines, drawn, percent=percent))
  if not parts:
    return markup.section('Curves', markup.paragraph('There is not enough to draw yet.'))
  return markup.section('Curves', markup.grid(parts))


def _differences(groups):
  if len(groups) == 1:
    rows = [
      [key, str(value)]
      for key, value in groups[0].runs[0].config.items()
      if key not in ('seed', 'seeds')
    ]
    table = markup.details(f'{len(rows)} keys', markup.table(['key', 'value'], rows))
    return markup.section('Config', table)
  found = records.config_differences(groups)
  if not found:
    return markup.section('Config', markup.paragraph('The configs do not differ.'))
  rows = [[key, *(str(value) for value in values)] for key, values in found.items()]
  head = ['key', *(group.name for group in groups)]
  return markup.section('In what the configs differ', markup.table(head, rows))
