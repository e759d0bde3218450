"""Whole runs, through the same run() that train.py calls."""

import json
import pathlib
import shutil
import sys
import weakref

import jax
import numpy as np
import pytest
from PIL import Image

from cvt_flax import predict_images
from cvt_flax.errors import Diverged, UserError, told_of_memory
from cvt_flax.models.geometry import multiply_adds
from cvt_flax.training import experiment, hardware, loop, program, setup
from cvt_flax.training.config import freeze, get_config
from cvt_flax.training.engines import Resident
from cvt_flax.training.metrics import read_metrics
from cvt_flax.weights import pretrained

REPOSITORY = pathlib.Path(__file__).parents[2]


def test_a_run_learns_and_says_what_it_did(trained, capsys):
  config, folder, result = trained
  assert result['test/top1'] >= 0.9
  assert result['test/images'] == 50
  assert len(result['test/per_class']) == 2 and sum(result['test/predicted']) == 50
  assert result['test/auc'] > 0.9 > result['test/majority'] >= 0.5

  lines = read_metrics(folder / 'metrics.jsonl')
  assert [m['step'] for m in lines if 'train/loss' in m] == [7, 14, 21, 28, 33]
  assert [m['epoch'] for m in lines if 'val/top1' in m] == [1, 2, 3]
  assert [m['step'] for m in lines if 'test/top1' in m] == [33]
  norms = {'gradient_norm', 'parameter_norm', 'update_norm', 'learning_rate', 'images_per_sec'}
  assert {f'train/{name}' for name in norms} < lines[0].keys()

  held_out = json.loads((folder / 'held_out.json').read_text())
  assert len(held_out) == 20 and held_out == sorted(set(held_out))
  assert lines[1]['val/images'] == 20
  record = json.loads((folder / 'experiment.json').read_text())
  assert record['config']['source'] == config.source
  assert record['hardware']['versions']['jax'] == jax.__version__
  assert 'stage0' in (folder / 'parameters.txt').read_text()


def test_metrics_have_the_share_of_a_known_rate(config, tmp_path, monkeypatch):
  monkeypatch.setitem(hardware._MATRIX_RATES, jax.devices()[0].device_kind, 1e12)
  config.model.dtype, config.epochs, config.optimizer.warmup_epochs = 'bfloat16', 1, 0.0
  lines = []
  loop.run(config, tmp_path, watch=lines.append)
  image = 3 * 2 * multiply_adds(pretrained.load(tmp_path).description.model, 8, 8)
  shares = {m['train/mfu'] / m['train/images_per_sec'] for m in lines if 'train/mfu' in m}
  assert shares and all(share == pytest.approx(image / 1e12) for share in shares)


def test_a_finished_run_is_left_alone(trained, capsys):
  config, folder, result = trained
  before = (folder / 'metrics.jsonl').read_bytes()
  again = loop.run(config, folder)
  said = capsys.readouterr().out
  assert 'is finished' in said and "  F1 of '1' " in said and 'WARNING' not in said
  assert again['test/top1'] == result['test/top1']
  assert (folder / 'metrics.jsonl').read_bytes() == before


def test_evaluation_of_a_run_gives_what_training_reported(trained, copy):
  config, _, result = trained
  # In the copy, as Orbax, when a run is opened to go on, clears up beside what is done then.
  folder = copy
  unfinished = folder / 'checkpoints' / '99.orbax-checkpoint-tmp'
  unfinished.mkdir()  # of a process that is still training
  metrics = loop.run(config, folder, mode='eval')
  assert unfinished.exists()
  unfinished.rmdir()
  assert metrics['test/top1'] == result['test/top1']
  np.testing.assert_allclose(metrics['test/loss'], result['test/loss'], rtol=1e-6)
  best = max(
    (m for m in read_metrics(folder / 'metrics.jsonl') if 'val/top1' in m),
    key=lambda m: m['val/top1'],
  )
  assert metrics['val/top1'] == best['val/top1']


def test_a_run_folder_of_another_config_is_not_touched(trained):
  config, folder, _ = trained
  before = {p: p.stat().st_mtime_ns for p in folder.rglob('*')}
  other = config.copy_and_resolve_references()
  other.learning_rate = 0.5
  other.model.bn_group_size = 8
  with pytest.raises(UserError) as error:
    loop.run(other, folder)
  assert f'give another folder, --workdir={folder}-2, or the config' in str(error.value)
  assert 'learning_rate 0.01 -> 0.5' in str(error.value)
  assert 'model.bn_group_size 4 -> 8' in str(error.value)
  fewer = config.copy_and_resolve_references()
  fewer.epochs = 2
  with pytest.raises(UserError, match='epochs=2: .* started with 3, which can only be raised'):
    loop.run(fewer, folder)
  assert {p: p.stat().st_mtime_ns for p in folder.rglob('*')} == before


def test_steps_take_the_place_of_epochs(tmp_path):
  given = get_config().to_dict() | {'source': 'digits', 'epochs': 30, 'steps': 100}
  saved = freeze(given)
  experiment.check_config(tmp_path, saved, freeze(given | {'epochs': 3}), evaluation=False)
  with pytest.raises(UserError, match='steps=50: .* started with 100, which can only be raised'):
    experiment.check_config(tmp_path, saved, freeze(given | {'steps': 50}), evaluation=False)


def test_a_free_folder_is_beside_the_one_that_is_taken(tmp_path, monkeypatch):
  (tmp_path / 'run' / 'inner').mkdir(parents=True)
  (tmp_path / 'run-2').mkdir()
  monkeypatch.chdir(tmp_path)
  assert experiment.free(pathlib.Path('run')) == '--workdir=run-3'
  monkeypatch.chdir(tmp_path / 'run')
  assert experiment.free(pathlib.Path('.')) == f'--workdir={tmp_path / "run-3"}'
  monkeypatch.chdir(tmp_path / 'run' / 'inner')
  assert experiment.free(pathlib.Path('..')) == f'--workdir={tmp_path / "run-3"}'


def test_a_run_may_get_more_epochs_another_mesh_other_checkpoints_and_remat(config, tmp_path):
  config.epochs, config.mesh.data = 2, 8
  loop.run(config, tmp_path)
  before = read_metrics(tmp_path / 'metrics.jsonl')
  config.epochs, config.mesh.data, config.checkpoint.every_steps = 3, 4, 5
  config.model.remat = ('nothing_saveable',)
  watched = []
  loop.run(config, tmp_path, watch=watched.append)
  lines = read_metrics(tmp_path / 'metrics.jsonl')
  assert watched == lines and lines[: len(before)] == before  # what was, then what is new
  assert [m['step'] for m in lines if 'test/top1' in m] == [22, 33]
  assert [m['step'] for m in lines if 'val/top1' in m] == [11, 22, 33]


@pytest.fixture
def copy(trained, tmp_path):
  """A copy of the finished run's folder, to damage."""
  return shutil.copytree(trained[1], tmp_path / 'copy')


def test_a_config_that_has_changed_much_is_refused(config, copy):
  config.optimizer.clip_norm = 1.0
  with pytest.raises(UserError, match=r'another config \(optimizer.clip_norm \S+ -> 1.0\): give'):
    loop.run(config, copy)
  config.learning_rate = config.optimizer.weight_decay = config.augment.erase_prob = 0.5
  config.augment.label_smoothing, config.augment.flip = 0.2, False
  with pytest.raises(UserError, match=r'\((\S+ \S+ -> \S+ ){4}and 2 more\): give'):
    loop.run(config, copy)


def test_data_that_has_changed_is_refused(config, copy):
  record = json.loads((copy / 'experiment.json').read_text())
  record['data'] = '0' * 64
  (copy / 'experiment.json').write_text(json.dumps(record))
  with pytest.raises(UserError, match='the images of .* have changed since the run'):
    loop.run(config, copy)


def test_a_second_process_in_the_folder_is_refused(config, copy):
  with experiment.only_one(copy), pytest.raises(UserError, match='another process is training in'):
    loop.run(config, copy)
  with experiment.only_one(copy):  # and the lock is gone with its holder
    pass


@pytest.mark.parametrize(
  ('file', 'text', 'message'),
  [
    ('experiment.json', b'\xff\x00', 'experiment.json is damaged'),
    ('experiment.json', b'{}', 'experiment.json is damaged'),
    ('metrics.jsonl', b'3\n{"step": 1}\n', 'metrics.jsonl, line 1 is damaged'),
  ],
)
def test_a_damaged_folder_is_told(config, copy, file, text, message):
  (copy / file).write_bytes(text)
  with pytest.raises(UserError, match=message):
    loop.run(config, copy)


def test_a_workdir_out_of_reach(config, tmp_path):
  (tmp_path / 'file').write_text('')
  for folder in (tmp_path / 'file', tmp_path / 'file' / 'below'):
    with pytest.raises(UserError, match='is not a folder'):
      loop.run(config, folder)
  with pytest.raises(UserError, match='holds no run to evaluate'):
    loop.run(config, tmp_path / 'file', mode='eval')


def test_a_folder_with_something_else_in_it_is_refused(config, tmp_path):
  (tmp_path / 'thesis.txt').write_text('dear')
  with pytest.raises(UserError, match='is not empty and holds no run'):
    loop.run(config, tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == ['thesis.txt']
  (tmp_path / 'thesis.txt').rename(tmp_path / '.experiment.json.host.1')  # of one that was killed
  assert 'test/top1' in loop.run(config, tmp_path)


def test_evaluating_what_is_no_run(config, tmp_path):
  with pytest.raises(UserError, match='holds no run to evaluate'):
    loop.run(config, tmp_path / 'nothing', mode='eval')
  with pytest.raises(UserError, match="mode='evaluate': train or eval"):
    loop.run(config, tmp_path / 'nothing', mode='evaluate')
  assert not (tmp_path / 'nothing').exists()


def test_classes_that_do_not_match_the_checkpoint(trained, tmp_path):
  config, folder, _ = trained
  rng = np.random.default_rng(0)
  np.savez(
    tmp_path / 'three.npz',
    **{f'x_{s}': rng.integers(0, 255, (60, 8, 8, 3), np.uint8) for s in ('train', 'test')},
    **{f'y_{s}': np.arange(60) % 3 for s in ('train', 'test')},
  )
  other = config.copy_and_resolve_references()
  other.source = f'npz:{tmp_path}/three.npz'
  with pytest.raises(UserError, match='has 3 classes .* was trained on 2'):
    loop.run(other, folder, mode='eval')


def test_without_a_test_split_validation_is_reported(config, npz, tmp_path, capsys):
  arrays = np.load(npz)
  np.savez(tmp_path / 'train.npz', x_train=arrays['x_train'], y_train=arrays['y_train'])
  config.source = f'npz:{tmp_path}/train.npz'
  config.epochs = 2
  result = loop.run(config, tmp_path / 'run')
  assert 'val/top1' in result and 'test/top1' not in result
  assert 'has no labelled test split' in capsys.readouterr().out


def test_holdout_0_trains_on_everything_and_reports_the_last_checkpoint(config, tmp_path):
  config.epochs, config.eval.holdout = 2, 0.0
  result = loop.run(config, tmp_path)
  lines = read_metrics(tmp_path / 'metrics.jsonl')
  assert not any('val/top1' in m for m in lines)
  assert result['checkpoint'] == 24  # 200 images in batches of 16: 12 steps an epoch
  assert json.loads((tmp_path / 'held_out.json').read_text()) == []


@pytest.fixture
def flat(npz, tmp_path):
  """The tiny data without its test split: 200 images."""
  arrays = np.load(npz)
  np.savez(tmp_path / 'flat.npz', x_train=arrays['x_train'], y_train=arrays['y_train'])
  return tmp_path / 'flat.npz'


def test_test_images_held_out_of_train(config, flat, tmp_path):
  """Trained on are 126 images, validated with 14, tested with 60; the folder says which."""
  config.source, config.epochs, config.eval.test_holdout = f'npz:{flat}', 2, 0.3
  folder = tmp_path / 'run'
  result = loop.run(config, folder)
  assert (result['test/images'], result['val/images'], result['checkpoint'] % 7) == (60, 14, 0)
  held_out, tested = (
    json.loads((folder / name).read_text()) for name in ('held_out.json', 'held_out_test.json')
  )
  assert (len(held_out), len(tested), len({*held_out, *tested})) == (14, 60, 74)
  metrics = loop.run(config, folder, mode='eval')
  assert metrics['test/top1'] == result['test/top1'] and metrics['test/images'] == 60

  other = config.copy_and_resolve_references()
  other.eval.test_holdout = 0.2
  for mode in ('train', 'eval'):
    with pytest.raises(UserError, match='eval.test_holdout 0.3 -> 0.2'):
      loop.run(other, folder, mode=mode)
  config.eval.sets = (config.source,)
  with pytest.raises(UserError, match='has no images but those that are trained on'):
    loop.run(config, folder, mode='eval')
  config.eval.sets = ()

  arrays = dict(np.load(flat))  # more images: others would be held out
  np.savez(flat, **{name: np.concatenate([x, x[:40]]) for name, x in arrays.items()})
  with pytest.raises(UserError, match='held_out.json names others, and some that it was trained'):
    loop.run(config, folder, mode='eval')
  with pytest.raises(UserError, match='have changed since the run'):
    loop.run(config, folder)


def test_a_run_on_a_share_of_the_training_images(config, tmp_path, capsys):
  config.train_share, config.epochs, config.optimizer.warmup_epochs = 0.25, 1, 0.0
  result = loop.run(config, tmp_path / 'run')
  assert (
    'data npz:' in (said := capsys.readouterr().out) and ': 45 train, 20 validation, 50' in said
  )
  config.epochs = 2
  result = loop.run(config, tmp_path / 'run')
  assert 'going on from step 2' in capsys.readouterr().out
  assert loop.run(config, tmp_path / 'run', mode='eval')['test/top1'] == result['test/top1']
  other = config.copy_and_resolve_references()
  other.train_share = 1.0
  for mode in ('train', 'eval'):
    with pytest.raises(UserError, match=r'train_share 0\.25 -> 1\.0'):
      loop.run(other, tmp_path / 'run', mode=mode)


def test_the_test_split_gets_the_place_of_the_others(config, tmp_path, monkeypatch):
  opened, alive = [], []
  original = Resident.open

  def open_split(self, split):
    alive.append([reference() is not None for reference in opened])
    arrays = original(self, split)
    opened.append(weakref.ref(arrays.image))
    return arrays

  monkeypatch.setattr(Resident, 'open', open_split)
  config.epochs = 2
  loop.run(config, tmp_path / 'run')
  assert alive == [[], [True], [False, False]]  # train, validation, test


def test_a_test_split_and_test_images_held_out(config, tmp_path):
  config.eval.test_holdout = 0.3
  with pytest.raises(
    UserError, match='eval.test_holdout=0.3 has no effect: .* brings a test split'
  ):
    loop.run(config, tmp_path / 'run')


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'mesh.data': 3}, 'batch_size=16 does not divide over 3 devices: 15 or 18 would'),
    ({'mesh.data': 9}, 'mesh.data=9: there are 8 devices'),
    (
      {'mesh.data': 8, 'eval.batch_size': 10},
      'eval.batch_size=10 does not divide over 8 devices: 8 or 16 would',
    ),
    ({'batch_size': 1600}, 'batch_size=1600: .* has only 180 images'),
    (
      {'model.kv_strides': (4,), 'model.cls_token': (False,), 'model.pool': 'mean'},
      'leaves stage 0 of the model a single key',
    ),
    (
      {'image_size': 1, 'model.patch_strides': (8,), 'model.patch_paddings': (0,)},
      'image_size=1: too small, stage 0',
    ),
    ({'model.name': 'cvt-nona'}, "did you mean 'cvt-nano'?"),
    ({'model.num_heads': (3,)}, 'num_heads=.* 3 heads do not divide the 8 channels of stage 0'),
    ({'source': 'npz:nowhere.npz'}, 'nowhere.npz'),
    ({'model.bn_group_size': 5}, 'bn_group_size=5 does not divide batch_size=16'),
  ],
)
def test_wrong_input_is_told_before_anything_is_written(config, tmp_path, change, message):
  for name, value in change.items():
    group = config
    *path, last = name.split('.')
    for part in path:
      group = group[part]
    group[last] = value
  with pytest.raises(UserError, match=message) as error:
    loop.run(config, tmp_path / 'run')
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'run').exists()


def test_a_run_that_tells_nothing_apart_says_so(config, tmp_path, capsys):
  config.learning_rate, config.epochs, config.optimizer.warmup_epochs = 1e-9, 1, 0.0
  result = loop.run(config, tmp_path)
  assert 0 in result['test/predicted'] and result['test/balanced_accuracy'] == 0.5
  said = capsys.readouterr().out
  assert 'test: WARNING: all 50 images are taken for ' in said
  assert said.count('WARNING: all 20 images are taken for ') == 2  # when validated, in the end


@pytest.mark.parametrize(
  ('batch_size', 'devices', 'groups', 'words'),
  [
    (96, 1, 4, 'try --config.batch_size=48, or smaller images, or a larger optimizer.accumulate'),
    # 12 is not for 8 devices.
    (24, 8, 4, 'try --config.batch_size=8, or smaller images, or a larger'),
    (24, 1, 12, 'a smaller one has to be a multiple of 24: change mesh.data, model.bn_group_size'),
  ],
)
def test_too_little_memory_is_told_with_a_batch_to_try(
  batch_size, devices, groups, words, config, tmp_path, monkeypatch
):
  monkeypatch.setattr(program, 'make_train_step', lambda *_, **__: out_of_memory)
  config.batch_size, config.mesh.data, config.model.bn_group_size = batch_size, devices, groups
  config.optimizer.accumulate_steps = 2
  with pytest.raises(UserError, match=f'batch_size={batch_size} is too large .*: {words}') as error:
    loop.run(config, tmp_path / 'run')
  assert '\n' not in str(error.value)


def out_of_memory(state, batch):
  raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nMore')


@pytest.fixture
def to_nothing(monkeypatch):
  """to_nothing(config, folder) is a run that ends before its first checkpoint."""

  def run(config, folder):
    with monkeypatch.context() as patch, pytest.raises(UserError, match='is too large'):
      patch.setattr(program, 'make_train_step', lambda *_, **__: out_of_memory)
      loop.run(config, folder)

  return run


def test_a_run_that_came_to_nothing_keeps_no_other_from_its_folder(
  config, tmp_path, capsys, to_nothing
):
  expected = loop.run(config, tmp_path / 'new')
  larger = config.copy_and_resolve_references()
  larger.batch_size = 32
  to_nothing(larger, tmp_path / 'run')
  assert f'{tmp_path}/run holds' not in capsys.readouterr().out
  assert loop.run(config, tmp_path / 'run') == expected
  assert f'{tmp_path}/run holds a run that came to no checkpoint' in capsys.readouterr().out
  larger.batch_size = 48
  with pytest.raises(UserError, match='holds a run of another config'):
    loop.run(larger, tmp_path / 'run')
  # Metrics are worth keeping where somebody removed the checkpoints.
  shutil.rmtree(tmp_path / 'run' / 'checkpoints')
  with pytest.raises(UserError, match='holds a run of another config'):
    loop.run(larger, tmp_path / 'run')


def test_a_run_that_another_process_has_begun_meanwhile_is_kept(
  config, tmp_path, monkeypatch, to_nothing
):
  to_nothing(config, tmp_path / 'run')
  before, found = (tmp_path / 'run' / 'experiment.json').read_bytes(), iter([False, True])
  monkeypatch.setattr(experiment, 'has_begun', lambda _: next(found))
  config.batch_size = 32
  with pytest.raises(UserError, match='holds a run of another config .batch_size 16 -> 32'):
    loop.run(config, tmp_path / 'run')
  assert (tmp_path / 'run' / 'experiment.json').read_bytes() == before


def test_a_run_that_another_process_began_in_a_new_folder_meanwhile_is_kept(
  trained, config, tmp_path, monkeypatch
):
  only_one = experiment.only_one

  def after_another(folder):
    shutil.copytree(trained[1], folder)
    return only_one(folder)

  monkeypatch.setattr(experiment, 'only_one', after_another)
  config.batch_size = 32
  with pytest.raises(UserError, match='holds a run of another config .batch_size 16 -> 32'):
    loop.run(config, tmp_path / 'run')
  before = (trained[1] / 'experiment.json').read_bytes()
  assert (tmp_path / 'run' / 'experiment.json').read_bytes() == before


def test_what_a_run_that_came_to_nothing_held_out_is_forgotten(config, flat, tmp_path, to_nothing):
  config.source, config.eval.test_holdout = f'npz:{flat}', 0.3
  to_nothing(config, tmp_path / 'run')
  assert (tmp_path / 'run' / 'held_out_test.json').exists()
  config.eval.test_holdout, config.epochs, config.optimizer.warmup_epochs = 0.0, 1, 0.0
  result = loop.run(config, tmp_path / 'run')
  assert loop.run(config, tmp_path / 'run', mode='eval')['val/top1'] == result['val/top1']


def test_too_little_memory_for_an_evaluation_names_its_own_key(config, tmp_path, monkeypatch):
  def answer(variables, batch, classes):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.')

  monkeypatch.setattr(setup, 'make_answer', lambda *_: answer)
  config.mesh.data, config.eval.batch_size = 8, 40
  message = 'eval.batch_size=40 is too large .*: try --config.eval.batch_size=16, or smaller images'
  with pytest.raises(UserError, match=message):
    loop.run(config, tmp_path / 'run')


def test_another_error_of_xla_is_left_alone():
  with (
    pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'),
    told_of_memory('--config.batch_size', 16, 8),
  ):
    raise jax.errors.JaxRuntimeError('INTERNAL: something else')


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
  config, tmp_path
):
  # The rate explodes after the first epoch, 11 steps, whose checkpoint is good.
  config.optimizer.schedule, config.optimizer.milestones = 'multistep', (1.0,)
  config.optimizer.gamma, config.optimizer.warmup_epochs = 1e36, 0.0
  with pytest.raises(Diverged, match=r'step 1\d: the checkpoint of step 11 is kept'):
    loop.run(config, tmp_path)
  metrics = loop.run(config, tmp_path, mode='eval')
  assert metrics['checkpoint'] == 11 and np.isfinite(metrics['test/loss'])


def test_imagenet_takes_a_real_step_on_stand_in_arrays(tmp_path):
  sys.path.insert(0, str(REPOSITORY))
  try:
    from configs.cvt13_imagenet import get_config as imagenet
  finally:
    sys.path.remove(str(REPOSITORY))
  rng = np.random.default_rng(0)
  np.savez(
    tmp_path / 'stand_in.npz',
    **{f'x_{s}': rng.integers(0, 255, (8, 64, 64, 3), np.uint8) for s in ('train', 'val')},
    **{f'y_{s}': np.arange(8) for s in ('train', 'val')},
  )
  config = imagenet()
  config.source = f'npz:{tmp_path}/stand_in.npz'
  config.image_size = 64
  config.batch_size = 8
  config.epochs = config.eval.every_epochs = 6
  config.optimizer.min_learning_rate = 0.0  # the rate scales with the batch, this does not
  config.model.bn_group_size = 4
  config.mesh.data = 2
  config.model.depths = (1, 1, 1)
  config.tensorboard = False
  result = loop.run(config, tmp_path / 'run')
  assert np.isfinite(result['val/loss'])
  lines = read_metrics(tmp_path / 'run' / 'metrics.jsonl')
  rates = [m['train/learning_rate'] for m in lines if 'train/learning_rate' in m]
  # The last epoch, t = 5 of 6, is the first after the warm-up; 0.002 at 2,048 images.
  np.testing.assert_allclose(
    rates, [0.002 * 8 / 2048 * 0.5 * (1 + np.cos(np.pi * 5 / 6))], rtol=1e-5
  )


def test_a_compact_model_goes_all_the_way(config, tmp_path, capsys):
  """Trained, resumed, scored, read from its folder, and what a second run starts from."""
  config.model = get_config().model
  config.model.update({'name': 'mcvit', 'width': 16, 'depth': 1, 'attn_drop_rate': 0.1})
  config.epochs = 2
  loop.run(config, tmp_path / 'run')
  assert 'model mcvit: ' in capsys.readouterr().out
  config.epochs = 3
  result = loop.run(config, tmp_path / 'run')
  assert result['val/top1'] > 0.8
  assert loop.run(config, tmp_path / 'run', mode='eval') == result
  model = pretrained.load(tmp_path / 'run').model
  assert (model.image_size, model.width, model.pool) == (8, 16, 'seq')

  Image.new('RGB', (8, 8)).save(tmp_path / 'dark.png')
  (prediction,) = predict_images(tmp_path / 'run', tmp_path / 'dark.png', top=1)
  assert prediction.classes == (0,)
  (larger,) = predict_images(tmp_path / 'run', tmp_path / 'dark.png', image_size=12)
  assert larger.classes[0] == 0 and larger.probabilities != prediction.probabilities

  config.init_from, config.epochs = str(tmp_path / 'run'), 1
  config.optimizer.warmup_epochs = 0
  loop.run(config, tmp_path / 'second')
  assert '19 of 19 tensors' in capsys.readouterr().out
  config.model.name = 'cvit'
  with pytest.raises(UserError, match='missing: params/cls_token'):
    loop.run(config, tmp_path / 'third')


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'model.patch_size': 3}, 'model: images of 8x8: patch_size=3 does not divide them'),
    ({'model.patch_size': 8}, 'leaves the model a single token'),
    ({'model.bn_group_size': 4}, "mcvit: CompactViT has no attribute 'bn_group_size'"),
    ({'model.depths': (1,)}, "mcvit: CompactViT .* did you mean 'depth'"),
  ],
)
def test_wrong_input_of_a_compact_model(config, tmp_path, change, message):
  config.model = get_config().model
  config.model.name = 'mcvit'
  for name, value in change.items():
    config.model[name.removeprefix('model.')] = value
  with pytest.raises(UserError, match=message):
    loop.run(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
