"""The page: what it shows of a run and of several, and what it says where something is missing."""

import html.parser
import json
import os
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
from clu import parameter_overview
from PIL import Image

from cvt_flax.data.sources import load
from cvt_flax.errors import UserError
from cvt_flax.report import figures, markup, records, single, statistics
from cvt_flax.report.__main__ import main
from cvt_flax.report.predictions import Predictions
from cvt_flax.report.writer import write_report


class Page(html.parser.HTMLParser):
  """The text of a page, what it refers to, and whether its elements are closed in order."""

  def __init__(self, path):
    super().__init__()
    self.words, self.links, self.open, self.headings = '', [], [], []
    self.feed(path.read_text(encoding='utf-8'))
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.links += [value for name, value in attrs if name in ('src', 'srcset', 'href')]
    if tag not in ('meta', 'img', 'source', '!doctype'):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] == 'h2':
      self.headings.append(data)
    if self.open and self.open[-1] not in ('style', 'script'):
      self.words += data + ' '


@pytest.fixture(scope='module')
def page(trained):  # noqa: F811
  """The page that the run itself wrote when it ended."""
  return Page(trained[1] / 'report' / 'index.html')


def test_a_run_ends_with_its_report(page):
  assert page.headings == [
    'Curves',
    'Results',
    'Classes',
    'Worst mistakes',
    'Attention',
    'Config',
    'Parameters',
  ]
  assert 'cannot be shown' not in page.words and 'is not there' not in page.words


def test_the_page_needs_nothing_else(page):
  assert len(page.links) > 10
  assert all(link.startswith('data:image/') for link in page.links)


def test_the_page_has_the_numbers_of_the_run(page, trained):  # noqa: F811
  _, folder, metrics = trained
  assert f'{metrics["test/top1"]:.2%}' in page.words and f'{metrics["test/loss"]:.4f}' in page.words
  hits = round(metrics['test/top1'] * 50)
  assert f'{hits} of 50 test images are right' in page.words
  assert 'AUC' in page.words
  with np.load(folder / 'predictions.npz') as p:
    right, sure = p['prediction'] == p['label'], p['probability'].astype(np.float64)
  places = np.minimum((sure * 15).astype(int), 14)
  error = sum(abs(np.sum(right[places == i]) - np.sum(sure[places == i])) for i in range(15)) / 50
  assert f'calibration error, over 15 bins, is {error:.2%}' in page.words
  last = (folder / 'parameters.txt').read_text().splitlines()[-1]
  assert f'all {last.partition(": ")[2].split()[0]}' in ' '.join(page.words.split())


def test_figures_lie_beside_the_page_for_both_themes(trained):  # noqa: F811
  folder = trained[1] / 'report'
  for name in (
    'loss',
    'accuracy',
    'learning_rate',
    'throughput',
    'classes',
    'confusion',
    'calibration',
    'mistakes',
    'attention-0',
  ):
    for ending in ('', '-dark'):
      with Image.open(folder / f'{name}{ending}.png') as image:
        pixels = np.asarray(image)
      assert pixels[0, 0, 3] == 0 and len(np.unique(pixels.reshape(-1, 4), axis=0)) > 20


def test_the_same_run_gives_the_same_page(trained, tmp_path):  # noqa: F811
  again = write_report([trained[1]], tmp_path)
  assert again.read_bytes() == (trained[1] / 'report' / 'index.html').read_bytes()


def test_what_is_missing_is_said(trained, npz, tmp_path):  # noqa: F811
  """Runs of before there were predictions, without a table of parameters or a checkpoint."""
  copy = shutil.copytree(trained[1], tmp_path / 'copy')
  (copy / 'predictions.npz').unlink()
  (copy / 'parameters.txt').unlink()
  shutil.rmtree(copy / 'checkpoints')
  words = Page(write_report([copy])).words
  assert 'predictions.npz is not there' in words
  assert 'parameters.txt is not there' in words
  assert 'This cannot be shown: ' in words and 'holds no checkpoint' in words


def test_a_source_that_has_changed_is_said(trained, npz, tmp_path):  # noqa: F811
  copy = shutil.copytree(trained[1], tmp_path / 'copy')
  arrays = dict(np.load(npz))
  np.savez(tmp_path / 'other.npz', **arrays | {'y_test': 1 - arrays['y_test']})
  record = json.loads((copy / 'experiment.json').read_text())
  record['config']['source'] = f'npz:{tmp_path}/other.npz'
  (copy / 'experiment.json').write_text(json.dumps(record))
  assert 'has changed since the run' in Page(write_report([copy])).words


def test_a_source_that_is_gone_leaves_out_its_images(make_run):
  words = Page(write_report([make_run('run')]))
  assert 'Images cannot be shown: ' in words.words and 'Classes' in words.headings


def test_a_run_that_is_not_finished(make_run):
  page = Page(write_report([make_run('run', finished=False)]))
  assert 'The run is not finished' in page.words and 'Curves' in page.headings


def test_names_are_text(make_run):
  names = ('<b>bold</b>', '$x^$', '"&', 'x' * 90)
  words = Page(write_report([make_run('run', names=names)])).words
  assert all(name in words for name in names)


def test_names_that_are_not_utf8_are_text_too(make_run, monkeypatch):
  name = os.fsdecode(b'caf\xe9.png')
  monkeypatch.setattr(single, 'sections', lambda run, folder: [markup.paragraph(name)])
  assert 'caf\\udce9.png' in Page(write_report([make_run('run')])).words


def test_a_page_that_fails_leaves_the_one_before(make_run, monkeypatch):
  page = write_report([make_run('run')])
  before = page.read_bytes()
  monkeypatch.setattr(single, 'sections', lambda run, folder: ['\udce9'])
  with pytest.raises(UnicodeEncodeError):
    write_report([page.parent.parent])
  assert page.read_bytes() == before


def test_many_classes_have_no_matrix(make_run):
  names = tuple(f'class {i}' for i in range(figures.MOST_IN_MATRIX + 5))
  folder = make_run('run', names=names)
  page = Page(write_report([folder]))
  assert not (folder / 'report' / 'confusion.png').exists()
  assert 'the 20 lowest and the 20 highest of 45' in (folder / 'report/index.html').read_text()
  assert all(name in page.words for name in names)


def test_thousands_of_classes_take_no_matrix(make_run, monkeypatch):
  """That of ImageNet-22k would take gigabytes."""
  monkeypatch.setattr(statistics, 'confusion', None)
  names = tuple(f'class {i}' for i in range(3000))
  words = Page(write_report([make_run('run', names=names, hits=58)])).words
  assert 'class 58 class 59 1 100.0%' in ' '.join(words.split())


def test_letters_that_the_font_lacks_are_no_warning(make_run):
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    assert '猫' in Page(write_report([make_run('run', names=('猫', '犬'))])).words


def test_a_run_that_goes_on_after_it_was_finished_is_not_finished(make_run):
  folder = make_run('run')
  with open(folder / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 25, "epoch": 2.5, "train/loss": 1.0}\n')
  assert 'The run is not finished' in Page(write_report([folder])).words


def test_images_of_a_test_split_that_was_held_out_are_found(tmp_path, make_run):
  rng = np.random.default_rng(0)
  labels = np.arange(200) % 2
  arrays = {'x_train': rng.integers(0, 256, (200, 8, 8, 3), np.uint8), 'y_train': labels}
  np.savez(tmp_path / 'all.npz', **arrays)
  changes = {'source': f'npz:{tmp_path}/all.npz', 'image_size': 8}
  folder = make_run('run', names=('0', '1'), eval={'test_holdout': 0.3}, **changes)
  dataset = load(changes['source'], test_holdout=0.3)
  index = dataset.held_out_test
  label, wrong = labels[index].astype(np.int32), (1 - labels[index]).astype(np.int32)
  p = np.full(len(index), 0.75, np.float32)
  Predictions('test', 10, index, label, wrong, p, 1 - p).save(folder / 'predictions.npz')
  page = Page(write_report([folder]))
  assert 'Worst mistakes' in page.headings and 'Images cannot be shown' not in page.words
  name = dataset.test.name_of(index[0])
  assert name.endswith(f'#{index[0]}') and name in page.words  # the first mistake's


def test_parameters_of_a_run_that_splits_them_are_read(make_run):
  """Its table says in a fifth column how each is split."""
  folder = make_run('a')
  params = {'head': {'kernel': np.zeros((4, 3)), 'bias': np.zeros(3)}}
  for columns in (False, 'sharding'):
    table = parameter_overview.get_parameter_overview(params, include_stats=columns)
    (folder / 'parameters.txt').write_text(table)
    found = records.read_run(folder).parameters()
    assert sorted(found) == [('head/bias', '(3,)', 3), ('head/kernel', '(4, 3)', 12)]


def test_a_seventh_line_is_no_first(make_run):
  drawn = [figures.Line(str(i), [0, 1], [0, i], i) for i in range(14)]
  lines = figures.lines(figures.LIGHT, drawn).axes[0].get_lines()
  assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 14


def test_a_name_may_begin_with_anything():
  drawn = [figures.Line('_a', [0, 1], [0, 1], 0), figures.Line('', [0, 1], [1, 2], 1)]
  (axes,) = figures.lines(figures.LIGHT, drawn).axes
  assert [text.get_text() for text in axes.get_legend().get_texts()] == ['_a']


def test_runs_of_two_configs_in_one_folder_are_refused(make_run, tmp_path):
  make_run('a/seed-0')
  make_run('a/seed-1', seed=1, learning_rate=0.5)
  with pytest.raises(UserError, match='seed-0 and seed-1 differ in learning_rate'):
    write_report([tmp_path / 'a'])


def test_two_runs_are_compared(make_run):
  a = make_run('a', hits=50)
  b = make_run('b', hits=40, learning_rate=0.5)
  path = write_report([a, b])
  assert path == a / 'report' / 'comparison' / 'index.html'
  page = Page(path)
  words = ' '.join(page.words.split())
  assert page.headings == [
    'Results',
    'Size and speed',
    'Is it chance?',
    'Curves',
    'In what the configs differ',
  ]
  assert 'config metric value a test top-1 83.33% b test top-1 66.67%' in words
  assert 'learning_rate 0.001 0.5' in words and 'epochs' not in words.partition('configs differ')[2]
  # 10 images that only a has right: 2 / 2 ** 10, two-sided.
  assert 'b against a 0 10 0.00195 60' in words
  assert 'Paired t-test' not in words


def test_seeds_are_one_config(make_run, tmp_path):
  for seed, hits in enumerate((48, 50, 55)):
    make_run(f'a/seed-{seed}', seed=seed, hits=hits)
    make_run(f'b/seed-{seed}', seed=seed, hits=hits - seed - 3, epochs=99)
  alone = Page(write_report([tmp_path / 'a']))
  words = ' '.join(alone.words.split())
  assert '3 seeds, 0, 1, 2' in words and 'Is it chance?' not in alone.headings
  assert 'a test top-1 85.00% 6.01% 80.00% 91.67% 3' in words  # of 48, 50 and 55 of 60
  both = ' '.join(Page(write_report([tmp_path / 'a', tmp_path / 'b'])).words.split())
  # Differences of 3, 4, 5 images of 60: t = -4 / (1 / sqrt(3)), 2 degrees of freedom.
  assert 'b less a test top-1 -6.67 points 0.0202 3' in both
  assert 'b against a 2 0 5 0.0625 60' in both
  assert 'epochs 10 99' in both and 'seed 0' not in both.partition('configs differ')[2]


def test_runs_of_one_config_are_put_together(make_run):
  folders = [make_run(f'a-seed{s}', seed=s, hits=h, log_every=9 + s) for s, h in ((2, 55), (0, 48))]
  path = write_report([*folders, make_run('b', seed=1, epochs=99)])
  assert path == folders[0] / 'report' / 'comparison' / 'index.html'
  words = ' '.join(Page(path).words.split())
  assert 'a: 2 seeds, 0, 2' in words and 'a test top-1 85.83% 8.25% 80.00% 91.67% 2' in words
  assert 'b test top-1 83.33% – – – 1' in words
  # A seed that is there already makes it another config's.
  again = make_run('a-again', seed=0, hits=30, log_every=9, closing_note='Next, ...')
  words = ' '.join(Page(write_report([*folders, again])).words.split())
  assert 'a-again test top-1 50.00%' in words and 'The configs do not differ.' in words


def test_of_runs_by_steps_epochs_say_nothing(make_run, tmp_path):
  for seed, epochs in enumerate((20, 5)):
    make_run(f'by_steps/seed-{seed}', seed=seed, steps=20, epochs=epochs)
  assert '2 seeds, 0, 1' in Page(write_report([tmp_path / 'by_steps'])).words
  other = make_run('other', steps=20, epochs=7, learning_rate=0.5)
  words = Page(write_report([tmp_path / 'by_steps', other])).words.partition('configs differ')[2]
  assert 'learning_rate' in words and 'epochs' not in words


def test_runs_that_may_differ_are_not_put_together(make_run):
  a = make_run('a-seed0')
  other = make_run('b-seed1', seed=1, names=('cat', 'dog', 'fox'))
  older = make_run('c-seed2', seed=2)
  record = json.loads((older / 'experiment.json').read_text())
  del record['config']['balance_classes']
  (older / 'experiment.json').write_text(json.dumps(record))
  seldom = make_run('d-seed3', seed=3, eval={'every_epochs': 2})
  groups = records.read_groups([a, other, older, seldom])
  assert [len(group.runs) for group in groups] == [1, 1, 1, 1]
  # A name that another group has is not taken.
  names = [make_run('e-seed0', epochs=3), make_run('e-seed1', seed=1, epochs=3), make_run('e')]
  assert [group.name for group in records.read_groups(names)] == ['e-seed0', 'e']
  more = [make_run(f'e-seed{s}', seed=s, epochs=4) for s in (2, 3)]
  found = records.read_groups([*names[:2], *more])
  assert [group.name for group in found] == ['e-seed0', 'e-seed2']


def test_runs_of_seeds_are_called_as_their_folder_is(make_run):
  folders = [
    make_run(f'{f}/seed-{s}', seed=s, epochs=e) for f, e in (('f', 1), ('g', 2)) for s in (0, 1)
  ]
  groups = records.read_groups(folders)
  assert [(group.name, len(group.runs)) for group in groups] == [('f', 2), ('g', 2)]
  (group,) = records.read_groups(folders[:2])
  assert group.name == 'f'


def test_uneven_classes_have_numbers_of_their_own(make_run):
  even = add(make_run('even'), balanced_accuracy=0.71, majority=0.34, per_class=[0.7] * 3)
  assert 'balanced' not in Page(write_report([even])).words
  uneven = add(make_run('uneven'), balanced_accuracy=0.71, majority=0.62, per_class=[0.7] * 3)
  words = ' '.join(Page(write_report([uneven])).words.split())
  assert 'most frequent class alone balanced accuracy' in words and '62.00% 71.00%' in words

  words = ' '.join(Page(write_report([even, uneven])).words.split())
  assert 'uneven test, most frequent class alone 62.00%' in words
  other = add(make_run('other'), majority=0.34, per_class=[0.7] * 3)
  assert 'most frequent' not in Page(write_report([even, other])).words


def test_a_run_that_takes_all_images_for_one_class_says_so(make_run):
  constant = make_run('constant', names=('cat', 'dog'))
  add(constant, majority=0.9, predicted=[60, 0], per_class=[1.0, 0.0])
  for folders in ([constant], [constant, make_run('other', names=('cat', 'dog'))]):
    words = ' '.join(Page(write_report(folders)).words.split())
    assert "test: WARNING: all 60 images are taken for 'cat', and" in words
    assert '90.00%' in words


def test_nothing_is_drawn_of_what_would_not_be_seen(make_run):
  run = make_run('short')
  page = write_report([run])
  assert (page.parent / 'accuracy.png').exists()  # a point of validation, and one of test
  assert not (page.parent / 'learning_rate.png').exists()
  begun = make_run('begun', finished=False)  # of the loss there is a point of a thin line
  assert 'There is not enough to draw yet' in Page(write_report([begun])).words
  path = run / 'metrics.jsonl'
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  lines[1]['train/learning_rate'] = 0.05
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  assert (write_report([run]).parent / 'learning_rate.png').exists()


def test_a_paired_test_that_says_nothing_says_why(make_run, tmp_path):
  for seed in range(2):
    make_run(f'a/seed-{seed}', seed=seed, hits=40 + seed)
    make_run(f'b/seed-{seed}', seed=seed, hits=46 + seed)
    make_run(f'c/seed-{seed + 1}', seed=seed + 1, hits=50 + seed)
  words = Page(write_report([tmp_path / name for name in 'abc'])).words
  assert 'b less a test top-1 +10.00 points – 2' in ' '.join(words.split())
  apart = 'Too few seeds in common for a paired test, of which two are the least: c and a, c and b.'
  assert apart in ' '.join(words.split())


def test_a_report_takes_folders_of_seeds_alone(make_run, tmp_path):
  for name, hits in (('seed-0', 50), ('seed-0-old', 30), ('seed-1', 50)):
    make_run(f'a/{name}', seed=int(name[5]), hits=hits)
  words = ' '.join(Page(write_report([tmp_path / 'a'])).words.split())
  assert '2 seeds, 0, 1' in words and 'a test top-1 83.33% 0.00% 83.33% 83.33% 2' in words


def test_predictions_of_a_run_that_goes_on_are_told_from_its_metrics(make_run):
  folder = make_run('a', names=('cat', 'dog'))
  with (folder / 'metrics.jsonl').open('a') as lines:
    lines.write(json.dumps({'step': 25, 'epoch': 2.5, 'train/loss': 0.5}) + '\n')
  words = Page(write_report([folder])).words
  assert 'has written so far; its predictions are of step 10.' in ' '.join(words.split())
  assert 'F1' not in words


def add(folder, **metrics):
  """Adds metrics to the last line of a made run, NAME of test and val_NAME of validation."""
  path = folder / 'metrics.jsonl'
  *lines, evaluated, last = map(json.loads, path.read_text().splitlines())
  for name, value in metrics.items():
    if name.startswith('val_'):
      evaluated[f'val/{name[4:]}'] = value
    else:
      last[f'test/{name}'] = value
  path.write_text(''.join(json.dumps(line) + '\n' for line in (*lines, evaluated, last)))
  return folder


def test_two_classes_have_numbers_of_their_own(make_run):
  a, b = (make_run(name, names=('cat', 'dog')) for name in 'ab')
  add(a, balanced_accuracy=0.75, f1=0.7, auc=0.9, top5=1.0, val_auc=0.6)
  add(b, balanced_accuracy=0.65, f1=0.6, auc=0.8, top5=1.0)
  words = ' '.join(Page(write_report([a, b])).words.split())
  for cells in ('b test balanced accuracy 65.00%', 'b test F1 60.00%', 'a validation AUC 60.00%'):
    assert cells in words
  assert 'a test AUC 90.00%' in words and "a: F1 and AUC are of 'dog'" in words
  alone = Page(write_report([a])).words
  assert 'AUC' in alone and 'top-1' in alone
  assert 'top-5' not in alone and 'top-5' not in words


def test_top5_is_of_more_than_five_classes(make_run):
  two = add(make_run('two', names=('cat', 'dog')), f1=0.7, top5=1.0)
  six = add(make_run('six', names=tuple('abcdef')), top5=0.875)
  assert '87.50%' in Page(write_report([six])).words
  words = ' '.join(Page(write_report([two, six])).words.split())
  assert 'six test top-5 87.50%' in words and 'two test top-5' not in words
  assert 'two test F1 70.00%' in words and 'six test F1' not in words
  assert 'two test top-1' in words and 'six test top-1' in words


def test_a_run_without_results_is_beside_one_with_them(make_run):
  words = Page(write_report([make_run('a'), make_run('b', finished=False)])).words
  assert 'a test top-1 83.33%' in ' '.join(words.split())
  assert 'Not finished, and not counted' in words


def test_other_images_have_no_paired_test(make_run, tmp_path):
  for seed in range(3):
    make_run(f'a/seed-{seed}', seed=seed, hits=48 + 2 * seed)
    make_run(f'b/seed-{seed}', seed=seed, hits=47 + 3 * seed, source='npz:other.npz')
    make_run(f'c/seed-{seed}', seed=seed, hits=46 + 4 * seed, eval={'holdout': 0.2})
  words = ' '.join(Page(write_report([tmp_path / name for name in 'abc'])).words.split())
  assert (
    'as source, classes, eval.holdout or eval.test_holdout differ: b and a, test top-1' in words
  )
  assert 'b and a, test top-1; b and a, validation top-1; c and a, val' in words
  assert 'c less a test top-1' in words and 'c less a validation' not in words
  assert 'b less a' not in words and 'c less b' not in words


def test_runs_of_before_a_key_was_there_are_compared(make_run, tmp_path):
  for seed in range(2):
    path = make_run(f'a/seed-{seed}', seed=seed, hits=48 + seed) / 'experiment.json'
    record = json.loads(path.read_text())
    del record['config']['eval']['test_holdout'], record['config']['eval']['holdout']
    path.write_text(json.dumps(record))
    make_run(f'b/seed-{seed}', seed=seed, hits=46 + 3 * seed)
  words = ' '.join(Page(write_report([tmp_path / 'a', tmp_path / 'b'])).words.split())
  for compared in ('b less a test top-1', 'b less a validation top-1', 'b against a 0'):
    assert compared in words


def test_runs_without_validation_have_chosen_nothing(make_run):
  a, b, c = (make_run(name) for name in 'abc')
  for run in (b, c):
    path = run / 'metrics.jsonl'
    lines = map(json.loads, path.read_text().splitlines())
    kept = [{k: v for k, v in line.items() if not k.startswith('val/')} for line in lines]
    path.write_text(''.join(json.dumps(line) + '\n' for line in kept))

  def words(*runs):
    return ' '.join(Page(write_report(runs)).words.split())

  assert 'Of the checkpoint that each run chose by validation.' in words(a, make_run('d'))
  assert 'chose by validation, or its last where it has none.' in words(a, b)
  assert 'Of the last checkpoint of each run.' in words(b, c)
  assert 'best checkpoint: 1' in words(a) and 'last checkpoint: 1' in words(b)


def test_sets_of_their_own_are_compared(make_run):
  a, b = make_run('a'), make_run('b')
  path = a / 'metrics.jsonl'
  lines = list(map(json.loads, path.read_text().splitlines()))
  lines[-1] |= {'real/top1': 0.75, 'real/loss': 1.0, 'real/images': 8}
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  words = ' '.join(Page(write_report([a, b])).words.split())
  assert 'a real top-1 75.00%' in words and 'b real' not in words and 'real loss' not in words


def test_predictions_of_other_weights_are_not_compared(make_run):
  a, b = make_run('a'), make_run('b', hits=40)
  with (a / 'metrics.jsonl').open('a') as lines:
    lines.write(json.dumps({'step': 25, 'epoch': 2.5, 'train/loss': 0.5}) + '\n')
  words = ' '.join(Page(write_report([a, b])).words.split())
  assert 'of another checkpoint than their metrics, are not compared' in words
  assert 'b against a' not in words


def test_a_finished_run_without_a_split_to_evaluate(make_run):
  run = make_run('a', finished=False)
  with (run / 'metrics.jsonl').open('a') as lines:
    lines.write(json.dumps({'step': 20, 'epoch': 2.0, 'checkpoint': 20}) + '\n')
  words = Page(write_report([run])).words
  assert 'no validation or test split' in words and 'There are none yet' not in words


def test_other_images_are_not_compared(make_run):
  a, b = make_run('a'), make_run('b', names=('cat', 'dog'))
  assert 'are not of the same images' in Page(write_report([a, b])).words


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['nowhere'], 'nowhere: there is no such folder'),
    (['{tmp}'], 'holds no run; .*below/run for example'),
    (['{run}', '{run}'], 'the same run is given twice'),
    ([], 'RUN'),
    (['{run}', '--out=x'], '--out=x'),
  ],
)
def test_what_cannot_be_reported_is_the_users_error(arguments, message, make_run, tmp_path):
  run = make_run('below/run')
  with pytest.raises(UserError, match=message):
    main([a.format(tmp=tmp_path, run=run) for a in arguments])
  assert not (run / 'report').exists()


@pytest.mark.parametrize(
  ('file', 'text'),
  [
    ('experiment.json', b'{}'),
    ('experiment.json', b'[]'),
    ('metrics.jsonl', b'3\n{}\n'),
    ('predictions.npz', b'PK'),
  ],
)
def test_a_damaged_folder_is_told(make_run, file, text):
  folder = make_run('run')
  (folder / file).write_bytes(text)
  with pytest.raises(UserError, match=f'{file}.* is damaged'):
    write_report([folder])


def test_the_command_line(make_run, clean_env, tmp_path):
  run = make_run('run')
  command = [sys.executable, '-m', 'cvt_flax.report', str(run), f'--output={tmp_path}/out']
  done = subprocess.run(command, env=clean_env, capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (0, f'{tmp_path}/out/index.html written\n')
  wrong = subprocess.run([*command[:3], 'x'], env=clean_env, capture_output=True, text=True)
  assert wrong.returncode == 2 and wrong.stderr.count('\n') == 1


def test_a_training_value_over_few_steps_is_not_drawn(make_run):
  """The end of a run between two lines, and the line after it when the run goes on."""
  folder = make_run('run')
  steps = (5, 10, 11, 15, 20, 22)
  lines = [{'step': s, 'epoch': s / 10, 'train/loss': float(s), 'val/loss': 1.0} for s in steps]
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  run = records.read_run(folder)
  assert run.curve('train/loss') == ([0.5, 1.0, 1.5, 2.0], [5.0, 10.0, 15.0, 20.0])
  assert run.curve('val/loss')[0] == [0.5, 1.0, 1.1, 1.5, 2.0, 2.2]
  assert run.curve('train/nothing') == ([], [])
  assert '2.2 epochs' in ' '.join(Page(write_report([folder])).words.split())


def test_a_confusion_matrix_has_its_zeros_but_nothing_for_a_class_without_images():
  matrix = np.array([[3, 1, 0], [0, 2, 0], [0, 0, 0]])
  axes = figures.confusion(figures.LIGHT, ['a', 'b', 'c'], matrix).axes[0]
  assert (axes.get_xlabel(), axes.get_ylabel()) == ('predicted', 'true')
  assert [t.get_text() for t in axes.texts] == ['75', '25', '0', '0', '100', '0']
  assert axes.images[0].get_array().mask.tolist() == [[False] * 3, [False] * 3, [True] * 3]


def test_a_title_is_as_broad_as_its_figure():
  figure = figures.bars(figures.LIGHT, ['a', 'b'], [0.5, 1.0])
  figures.entitle(figure, figures.LIGHT, '$1 of ' + 'many words ' * 9)
  figure.draw_without_rendering()
  box = figure._suptitle.get_window_extent()
  assert '\n' in figure._suptitle.get_text() and box.width < figure.bbox.width


def test_a_gallery_has_each_picture_above_its_caption():
  shown = [np.full((8, 8, 3), 30 * i, np.uint8) for i in range(8)]
  drawn = figures.gallery(figures.LIGHT, shown, [f'${i}' for i in range(8)])
  filled = [axes for axes in drawn.axes if axes.images]
  assert [axes.get_xlabel() for axes in filled] == [f'${i}' for i in range(8)]
  assert [axes.images[0].get_array()[0, 0, 0] for axes in filled] == [30 * i for i in range(8)]
  assert figures.png(drawn) != figures.png(figures.gallery(figures.LIGHT, [], []))
