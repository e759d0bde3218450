"""The page of one run."""

from __future__ import annotations

import pathlib
from collections import Counter
from collections.abc import Iterator

import numpy as np

from cvt_flax.report import figures, markup, shown, statistics
from cvt_flax.report.figures import Line
from cvt_flax.report.markup import number
from cvt_flax.report.plots import SHARES, SPLITS, Plots, curves, is_seen
from cvt_flax.report.predictions import Predictions
from cvt_flax.report.records import Run, alarm
from cvt_flax.weights import run_folder

# Metrics of two classes, as training.evaluate names them.
_TWO_CLASSES = {
  'balanced_accuracy': 'balanced accuracy',
  'f1': 'F1',
  'auc': 'AUC',
  'majority': 'accuracy of always taking the larger class',
}
_UNEVEN_CLASSES = {
  'majority': 'most frequent class alone',
  'balanced_accuracy': 'balanced accuracy',
}
_CONFUSED = 10  # of the most frequent mistakes


def sections(run: Run, folder: pathlib.Path) -> Iterator[str]:
  """Yields the parts of the page of a run, whose figures are written to `folder` too."""
  plots = Plots(folder)
  yield _head(run)
  yield _curves(run, plots)
  yield _results(run)
  p = run.predictions
  if p is None:
    yield markup.section(
      'Predictions',
      markup.paragraph(
        f'{run_folder.PREDICTIONS} is not there, so there are no confusion matrix and no mistakes: '
        'a run writes it with its last evaluation, if it has a test or validation split.'
      ),
    )
  else:
    yield _classes(run, p, plots)
  yield from shown.sections(run, p, plots)
  yield _config(run)
  yield _parameters(run)


def _head(run):
  c, final, p = run.config, run.final, run.predictions
  values = []
  for split, words in reversed(SPLITS.items()):
    if f'{split}/top1' in final:
      n = final[f'{split}/images']
      low, high = statistics.interval(round(final[f'{split}/top1'] * n), n)
      more = f'{n:,} images; 95 % interval {low:.1%} to {high:.1%}'
      values.append((f'{final[f"{split}/top1"]:.1%}', f'{words} top-1', more))
  if run.lines:
    words = 'best' if run.validated else 'last'
    which = f'{words} checkpoint: {final["epoch"]:g}' if 'epoch' in final else 'not finished'
    values.append((f'{run.lines[-1]["epoch"]:g}', 'epochs', which))
  parameters = sum(size for _, _, size in run.parameters())
  if parameters:
    values.append((f'{parameters / 1e6:.3g} M', 'parameters', str(c['model.name'])))
  _, rates = run.curve('train/images_per_sec')
  if rates:
    values.append((f'{np.median(rates):,.0f}', 'images a second', f'median, on {run.devices()}'))
  values.append((f'{len(run.class_names):,}', 'classes', c['source']))
  title = c['name'] or run.folder.absolute().name
  parts = [markup.heading(title, f'{run.folder}, seed {c["seed"]}')]
  if not final:
    words = 'The run is not finished: this is what it has written so far'
    of = f'; its predictions are of step {p.step}' if p is not None else ''
    parts.append(markup.paragraph(f'{words}{of}.'))
  elif p is not None and p.step != final['checkpoint']:
    parts.append(
      markup.paragraph(
        f'The predictions are of step {p.step}, the metrics of step {final["checkpoint"]}.'
      )
    )
  return '\n'.join([*parts, markup.cards(values)])


def _curves(run, plots):
  parts = []
  for metric, title, percent in (('loss', 'Loss', False), ('top1', 'Top-1 accuracy', True)):
    drawn = curves(run, metric)
    if is_seen(drawn):
      name = 'loss' if metric == 'loss' else 'accuracy'
      parts.append(plots(name, title, figures.lines, drawn, percent=percent))
  for metric, name, title in (
    ('train/learning_rate', 'learning_rate', 'Learning rate'),
    ('train/images_per_sec', 'throughput', 'Training images a second'),
  ):
    x, y = run.curve(metric)
    if len(x) > 1:
      parts.append(plots(name, title, figures.lines, [Line('', x, y, 0)]))
  if not parts:
    return markup.section('Curves', markup.paragraph('There is not enough to draw yet.'))
  note = markup.paragraph(
    'Training values are means over the steps since the point before, of augmented images and by '
    'weights that move on; one over less than half as many steps is not drawn. Validation and test '
    'are whole splits as they are.',
    faint=True,
  )
  return markup.section('Curves', note, markup.grid(parts))


def _results(run):
  splits = run.evaluations()
  shares = {
    key: words
    for key, words in SHARES.items()
    if any(run.score(f'{split}/{key}') is not None for split in splits)
  }
  if len(run.class_names) > 2 and run.uneven:
    shares |= _UNEVEN_CLASSES
  rows = []
  for split in splits:
    rows.append(
      [SPLITS.get(split, split), number(run.score(f'{split}/images'))]
      + [number(run.score(f'{split}/{key}'), '.2%') for key in shares]
      + [number(run.score(f'{split}/loss'), '.4f')]
    )
  parts = []
  if rows:
    parts.append(markup.table(['split', 'images', *shares.values(), 'loss'], rows))
    step = run.final['checkpoint']
    where = f', epoch {run.final["epoch"]:g}' if 'epoch' in run.final else ''
    parts.append(
      markup.paragraph(
        f'Of the checkpoint of step {step}{where}; it was chosen by validation, not by test.'
        if run.validated
        else f'Of the checkpoint of step {step}{where}, the last one.',
        faint=True,
      )
    )
  elif run.final:
    parts.append(markup.paragraph('The source has no validation or test split to evaluate.'))
  else:
    parts.append(
      markup.paragraph('There are none yet: the run has not evaluated its best weights.')
    )
  for split, metrics in splits.items():
    if warning := alarm(metrics, run.class_names):
      parts.append(markup.paragraph(f'{SPLITS.get(split, split)}: {warning}.'))
  p = run.predictions
  if p is not None and len(run.class_names) == 2:
    positive = run.class_names[1]
    found = [
      [words, number(run.final[f'{p.split}/{name}'], '.2%')]
      for name, words in _TWO_CLASSES.items()
      if run.final.get(f'{p.split}/{name}') is not None
    ]
    if found:
      parts.append(markup.table([f'two classes, {SPLITS[p.split]}', ''], found))
      words = f'F1 and AUC are of {positive!r} against the other.'
      parts.append(markup.paragraph(words, faint=True))
  return markup.section('Results', *parts)


def _classes(run, p: Predictions, plots):
  names = run.class_names
  counts = np.bincount(p.label, minlength=len(names))
  there = np.flatnonzero(counts)
  accuracy = np.bincount(p.label[p.hits], minlength=len(names))[there] / counts[there]
  order = np.argsort(accuracy, kind='stable')
  rows = [
    [names[there[i]], number(int(counts[there[i]])), number(float(accuracy[i]), '.1%')]
    for i in order
  ]
  shown, title = order, 'Accuracy by class'
  if len(order) > figures.MOST_BARS:
    half = figures.MOST_BARS // 2
    shown = np.concatenate([order[:half], order[-half:]])
    title = f'Accuracy by class, the {half} lowest and the {half} highest of {len(order)}'
  drawn = [plots('classes', title, figures.bars, [names[there[i]] for i in shown], accuracy[shown])]
  if len(names) <= figures.MOST_IN_MATRIX:
    heading, matrix = 'Confusion, % of the true class', statistics.confusion(p, len(names))
    drawn.append(plots('confusion', heading, figures.confusion, names, matrix))
  found = statistics.calibration(p)
  if found:
    values = found.probability, found.accuracy, found.low, found.high, found.share
    drawn.append(plots('calibration', 'What probabilities are worth', figures.calibration, *values))
  confused = [
    [names[i], names[j], number(n), number(n / int(counts[i]), '.1%')]
    for i, j, n in statistics.most_confused(p, _CONFUSED)
  ]
  parts = [
    markup.paragraph(f'{int(p.hits.sum()):,} of {len(p):,} {SPLITS[p.split]} images are right.')
  ]
  if not run.final.get('test/top1') and p.split == 'val':
    parts.append(markup.paragraph('There is no test split; the checkpoint was chosen by these.'))
  parts.append(markup.grid(drawn))
  if found:
    parts.append(
      markup.paragraph(
        'What probabilities are worth: the line lies on the diagonal where they are right, with '
        '95 % intervals; the faint bars are shares of the images. The expected calibration error, '
        f'over 15 bins, is {found.error:.2%}; with probabilities that are right it would be up to '
        f'{found.by_chance:.2%} on {len(p):,} images, by chance (95 %).',
        faint=True,
      )
    )
  if confused:
    head = ['true', 'predicted', 'images', 'of the true class']
    parts.append('<h3>Most frequent mistakes</h3>' + markup.table(head, confused))
  parts.append(markup.details('all classes', markup.table(['class', 'images', 'accuracy'], rows)))
  return markup.section('Classes', *parts)


def _config(run):
  rows = [[name, str(value)] for name, value in run.config.items()]
  versions = [
    [name, ', '.join(map(str, v)) if isinstance(v, list) else str(v)]
    for name, v in (run.hardware | run.hardware.get('versions', {})).items()
    if name != 'versions'
  ]
  return markup.section(
    'Config',
    markup.details(f'{len(rows)} keys', markup.table(['key', 'value'], rows)),
    markup.details('versions and devices', markup.table(['', ''], versions)),
  )


def _parameters(run):
  table = run.parameters()
  if not table:
    return markup.section('Parameters', markup.paragraph(f'{run_folder.PARAMETERS} is not there.'))
  sums = Counter()
  for name, _, size in table:
    sums[name.partition('/')[0]] += size
  total = sums.total()
  rows = [[name, number(size), number(size / total, '.1%')] for name, size in sums.items()]
  rows.append(['all', number(total), number(1.0, '.1%')])
  every = [[name, shape, number(size)] for name, shape, size in table]
  return markup.section(
    'Parameters',
    markup.table(['part', 'parameters', ''], rows),
    markup.details('every parameter', markup.table(['name', 'shape', 'size'], every)),
  )
