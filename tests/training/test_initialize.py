"""init_from: runs and evaluations that start from weights."""

import ast
import json
import shlex
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cvt_flax import CompactViT, convert_weights, load_pretrained, predict_images, save_pretrained
from cvt_flax.errors import UserError
from cvt_flax.training import experiment, loop
from cvt_flax.training.config import freeze, get_config
from cvt_flax.training.metrics import read_metrics
from cvt_flax.training.network import build_model
from cvt_flax.training.setup import TrainingSetup
from cvt_flax.weights import pretrained
from cvt_flax.weights.preprocessing import Preprocessing
from tests.models.torch_weights import drawn_variables
from tests.weights.models import assert_same_bytes


@pytest.fixture
def weights(config, tmp_path):
  """Writes weights for the config's model, of the classes that are given; returns the folder."""

  def write(class_names=('0', '1'), **attributes):
    model = build_model(freeze(config).model, len(class_names)).clone(**attributes)
    folder = tmp_path / 'weights'
    save_pretrained(folder, model, drawn_variables(model), class_names, Preprocessing(8, 1.0))
    return folder

  return write


def first_state(config, folder):
  training = TrainingSetup(freeze(config), folder)
  return training, training.from_weights(training.program.init())


def test_a_run_starts_from_weights(config, weights, tmp_path, capsys):
  config.init_from = str(weights())
  training, state = first_state(config, tmp_path / 'run')
  expected = drawn_variables(training.model)
  assert_same_bytes({'params': state.params, 'batch_stats': state.batch_stats}, expected)
  assert_same_bytes(state.ema, expected)
  count = len(jax.tree.leaves(expected))
  assert f'(flax): {count} of {count} tensors\n' in capsys.readouterr().out


@pytest.mark.parametrize('class_names', [('ant', 'bee', 'cat'), ('ant', 'bee')])
def test_the_head_starts_anew_for_other_classes(class_names, config, weights, tmp_path, capsys):
  config.init_from = str(weights(class_names))
  training, state = first_state(config, tmp_path / 'run')
  fresh = flatten_dict(jax.device_get(training.program.init().params))
  drawn = flatten_dict(drawn_variables(training.model)['params'])
  for path, leaf in flatten_dict(jax.device_get(state.params)).items():
    expected = fresh if path[0] == 'head' else drawn
    np.testing.assert_array_equal(leaf, expected[path])
  said = capsys.readouterr().out
  assert f'the head starts anew, for 2 classes in place of {len(class_names)} others' in said


def test_weights_without_names_may_be_of_any_classes(config, weights, tmp_path, capsys):
  folder = weights()
  (folder / 'config.json').write_text(
    (folder / 'config.json').read_text().replace('"id2label"', '"other"')
  )
  config.init_from = str(folder)
  first_state(config, tmp_path / 'run')
  assert 'anew' not in capsys.readouterr().out


def test_another_model_is_said(config, weights, tmp_path, capsys):
  config.init_from = str(weights(activation='gelu', attention_scale='head_dim', drop_rates=()))
  first_state(config, tmp_path / 'run')
  said = capsys.readouterr().out.splitlines()[-1]
  assert "activation ['gelu'] -> ['quick_gelu']" in said
  assert 'scale' not in said  # one head: both scales are the same
  assert 'drop_rate' not in said  # of training alone


def test_another_preprocessing_is_said(config, weights, tmp_path, capsys):
  config.init_from = str(weights())
  first_state(config, tmp_path / 'run')
  assert 'not as' not in capsys.readouterr().out
  config.mean, config.crop_ratio = (0.5, 0.5, 0.5), 0.9
  first_state(config, tmp_path / 'other')
  said = capsys.readouterr().out
  assert 'crop_ratio 1.0 -> 0.9' in said
  assert 'mean (0.485, 0.456, 0.406) -> (0.5, 0.5, 0.5)' in said


def test_what_a_file_does_not_spell_out_is_no_difference(config, weights, tmp_path, capsys):
  config.model.kv_strides = (2,)  # the default, () elsewhere
  config.init_from = str(weights(kv_strides=()))
  first_state(config, tmp_path / 'run')
  assert 'not as' not in capsys.readouterr().out


def test_weights_of_another_network_are_not_evaluated(config, weights, tmp_path, capsys):
  config.init_from = str(weights(kv_strides=(1,)))
  with pytest.raises(UserError, match=r'another network than this config: kv_stride \[1\] -> \['):
    loop.run(config, tmp_path / 'run', mode='eval')


def test_weights_are_evaluated_with_the_activation_that_is_chosen(
  config, weights, tmp_path, capsys
):
  config.init_from = str(weights(activation='gelu'))
  loop.run(config, tmp_path / 'run', mode='eval')
  assert "activation ['gelu'] -> ['quick_gelu']" in capsys.readouterr().out


@pytest.mark.parametrize(
  ('attributes', 'message'),
  [
    (dict(depths=(2,)), r'params/stage0/blocks_1/attn/conv_proj_k/bn/bias'),
    (dict(patch_sizes=(5,)), r'stage0/patch_embed/proj/kernel \[5, 5, 3, 8\] instead of \[3, 3'),
  ],
)
def test_weights_that_do_not_fit(attributes, message, config, weights, tmp_path):
  config.init_from = str(weights(**attributes))
  with pytest.raises(UserError, match=rf'^init_from=\S+ does not fit the model; .*{message}'):
    loop.run(config, tmp_path / 'run')


def test_a_run_that_does_not_fit_says_by_which_flags_it_would(trained, npz, tmp_path):
  config = get_config()
  config.source, config.image_size, config.batch_size = f'npz:{npz}', 32, 16
  config.init_from, config.model.name = str(trained[1]), 'cvt-nano'
  config.model.pool, config.model.qkv_kernels = 'mean', (3, 3, 3)  # of the run: its model's
  with pytest.raises(UserError, match='does not fit the model; .*; it was trained with ') as error:
    loop.run(config, tmp_path / 'run')
  flags = shlex.split(str(error.value).partition('trained with ')[2])
  assert '--config.model.patch_sizes=(3,)' in flags and not any('bn_group' in f for f in flags)
  assert {'--config.model.pool=', '--config.model.qkv_kernels=()'} <= set(flags)
  for flag in flags:
    name, _, value = flag.removeprefix('--config.').partition('=')
    kind = str if name in ('model.name', 'model.pool') else ast.literal_eval
    config.update_from_flattened_dict({name: kind(value)})
  config.model.bn_group_size = 4
  first_state(config, tmp_path / 'run')


def test_weights_of_another_named_network(npz, tmp_path):
  config = get_config()
  config.source, config.image_size, config.batch_size = f'npz:{npz}', 32, 16
  config.init_from, config.model.name = 'cvt-nano-cifar10', 'cvt-13-small-images'
  with pytest.raises(UserError) as error:
    loop.run(config, tmp_path / 'run')
  assert str(error.value) == (
    'init_from=cvt-nano-cifar10 is of cvt-nano, and this config of cvt-13-small-images: '
    '--config.model.name=cvt-nano is needed'
  )


def of_another_size(npz, folder, **attributes):
  """Writes weights of an mcvit for 16x16 pixels; returns a config for 8x8, and their variables."""
  model = CompactViT(**dict(num_classes=2, pool='seq', image_size=16) | attributes)
  variables = drawn_variables(model)
  save_pretrained(folder, model, variables, ('0', '1'), Preprocessing(16, 1.0))
  config = get_config()
  config.source, config.image_size, config.batch_size = f'npz:{npz}', 8, 16
  config.init_from, config.model.name = str(folder), 'mcvit'
  return config, variables


def test_positions_of_another_size_are_resized(npz, tmp_path, capsys):
  config, variables = of_another_size(npz, tmp_path / 'w')
  _, state = first_state(config, tmp_path / 'run')
  said = capsys.readouterr().out
  assert ' tensors\nits positions, for images of 16x16, are resized for 8x8\n' in said
  assert 'as this config does: image_size 16 -> 8' in said and 'WARNING' not in said
  assert "\nimages as the weights' own: --config.image_size=16" in said
  got, before = flatten_dict(jax.device_get(state.params)), flatten_dict(variables['params'])
  table = before[('pos_embed',)].reshape(1, 4, 4, -1)
  expected = np.asarray(jax.image.resize(table, (1, 2, 2, table.shape[-1]), 'bicubic'))
  np.testing.assert_array_equal(got.pop(('pos_embed',)), expected.reshape(1, 4, -1))
  for path, leaf in got.items():
    np.testing.assert_array_equal(leaf, before[path])


def test_what_no_shape_shows_is_a_difference_beside_other_positions(npz, tmp_path, capsys):
  config, _ = of_another_size(npz, tmp_path / 'w', heads=8)
  first_state(config, tmp_path / 'run')
  said = capsys.readouterr().out
  assert 'are resized for 8x8' in said and 'WARNING: not as the weights say' in said
  assert 'heads 8 -> 4' in said and 'image_size 16 -> 8' in said


def test_positions_of_other_tokens_are_not_resized(npz, tmp_path):
  config, _ = of_another_size(npz, tmp_path / 'w', patch_size=2)
  with pytest.raises(UserError, match=r'does not fit the model; .*pos_embed \[1, 64, 48\] instead'):
    loop.run(config, tmp_path / 'run')


def test_sines_are_evaluated_on_images_of_another_size(npz, tmp_path):
  config, _ = of_another_size(npz, tmp_path / 'w', position='sine')
  config.model.position = 'sine'
  assert loop.run(config, tmp_path / 'run', mode='eval')['test/images'] == 50


def test_of_a_single_split_nothing_is_called_test(config, weights, npz, tmp_path, capsys):
  with np.load(npz) as arrays:
    np.savez(tmp_path / 'one.npz', **{k: v for k, v in arrays.items() if 'train' in k})
  config.source, config.init_from = f'npz:{tmp_path}/one.npz', str(weights())
  found = loop.run(config, tmp_path / 'nothing', mode='eval')
  assert found['all/images'] == 200 and not any(name.startswith('test/') for name in found)
  said = capsys.readouterr().out
  assert 'all: top-1' in said and 'whether the weights were trained on it is not known' in said


def test_a_run_killed_before_its_first_checkpoint_begins_again_from_the_weights(
  config, weights, tmp_path
):
  config.init_from = str(weights())
  training, _ = first_state(config, tmp_path / 'run')
  with experiment.only_one(tmp_path / 'run'):
    training.write_experiment()
  _, state = first_state(config, tmp_path / 'run')
  assert_same_bytes({'params': state.params}, {'params': drawn_variables(training.model)['params']})


def test_weights_that_are_not_there(config, tmp_path):
  config.init_from = str(tmp_path / 'nowhere')
  with pytest.raises(UserError, match='nowhere: there is no such file or folder'):
    loop.run(config, tmp_path / 'run')
  with pytest.raises(UserError, match='nowhere: there is no such file or folder'):
    loop.run(config, tmp_path / 'run', mode='eval')
  assert not (tmp_path / 'run').exists()


def test_a_run_folder_is_as_good_as_a_file(config, trained, tmp_path, capsys):
  """A trained run is loaded, evaluated elsewhere, fine-tuned, converted, and predicts."""
  _, folder, result = trained
  weights = pretrained.load(folder)
  assert weights.kind == 'run'
  assert weights.notes == (
    f'the checkpoint of step {result["checkpoint"]}, its averaged parameters',
  )
  assert weights.description.class_names == ('0', '1')
  assert weights.description.preprocessing == Preprocessing(8, 1.0)

  config.init_from, config.eval.holdout, config.train_share = str(folder), 0.2, 0.5
  found = loop.run(config, tmp_path / 'nothing', mode='eval')
  config.eval.holdout, config.train_share = 0.1, 1.0
  assert not (tmp_path / 'nothing').exists()
  assert found['test/top1'] == result['test/top1']
  assert found['test/loss'] == pytest.approx(result['test/loss'], rel=1e-6)
  assert 'val/top1' not in found  # what it was validated with is part of train
  said = capsys.readouterr().out
  assert '(these weights)' in said and 'eval.holdout=0.2 has no effect' in said
  assert 'train_share=0.5 has no effect' in said

  config.epochs = 1
  config.learning_rate = 0.0
  config.optimizer.warmup_epochs = 0.0
  result = loop.run(config, tmp_path / 'fine')
  assert result['test/top1'] >= 0.9  # nothing has moved but the running statistics
  assert loop.run(config, tmp_path / 'fine', mode='eval')['test/top1'] == result['test/top1']
  # Once the run is there, the weights are not needed to go on with it.
  assert loop.run(config, tmp_path / 'fine')['test/top1'] == result['test/top1']

  convert_weights(folder, tmp_path / 'flax')
  assert_same_bytes(load_pretrained(tmp_path / 'flax')[1], weights.variables)
  np.testing.assert_array_equal(len(list(predict_images(folder, [_picture(tmp_path)]))), 1)


def test_a_chain_of_runs_to_a_folder_of_other_classes(
  trained, streamed, pictures, tmp_path, capsys
):
  """A run, then a new head alone on a folder without a test split, then that run as weights."""
  _, first, _ = trained
  streamed.source = f'folder:{pictures}/train'
  streamed.init_from = str(first)
  streamed.optimizer.freeze, streamed.eval.test_holdout = 'backbone', 0.25
  streamed.optimizer.name, streamed.learning_rate = 'sgd', 0.5
  result = loop.run(streamed, tmp_path / 'second')
  said = capsys.readouterr().out
  assert 'the head starts anew, for 2 classes in place of 2 others' in said
  assert 'trained: 18 parameters; frozen: ' in said  # 8 channels, 2 classes
  assert result['test/images'] == 24 and result['test/top1'] > result['test/majority']

  folders = (first, tmp_path / 'second')
  backbone, tuned = (flatten_dict(pretrained.load(folder).variables) for folder in folders)
  for path, x in backbone.items():
    same = np.asarray(tuned[path]).tobytes() == np.asarray(x).tobytes()
    assert same == (path[1] != 'head'), path
  (found,) = predict_images(tmp_path / 'second', [_picture(tmp_path)])
  assert set(found.names) == {'bright', 'dark'}
  streamed.init_from, streamed.optimizer.freeze, streamed.steps = str(tmp_path / 'second'), '', 5
  capsys.readouterr()
  loop.run(streamed, tmp_path / 'third')
  said = capsys.readouterr().out
  assert 'second (run): ' in said and 'anew' not in said


def _picture(folder):
  from PIL import Image

  Image.new('RGB', (20, 10), (250, 250, 250)).save(folder / 'bright.png')
  return folder / 'bright.png'


def test_a_bright_picture_is_bright(trained, tmp_path):
  """The run learned dark (0) and bright (1) images."""
  (found,) = predict_images(trained[1], [_picture(tmp_path)])
  assert found.names[0] == '1' and found.probabilities[0] > 0.5


def test_evaluating_weights_of_other_classes(config, weights, tmp_path):
  config.init_from = str(weights(('ant', 'bee', 'cat')))
  with pytest.raises(UserError, match=r'has 3 classes \(ant, bee, cat\), the data 2 \(0, 1\)'):
    loop.run(config, tmp_path / 'run', mode='eval')


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'embed_dims': [16]}, r'39 of another shape: batch_stats/\S+ \[8\] instead of \[16\], '),
    ({'depths': [10**4 + 1]}, '10001 blocks'),
  ],
)
def test_a_run_folder_that_says_it_is_of_another_model(change, message, trained, tmp_path):
  folder = tmp_path / 'run'
  shutil.copytree(trained[1], folder)
  description = json.loads((folder / 'model.json').read_text())
  description['architecture'] |= change
  (folder / 'model.json').write_text(json.dumps(description))
  with pytest.raises(UserError, match=message):
    pretrained.load(folder)


def test_a_run_folder_without_its_preprocessing(trained, tmp_path):
  folder = tmp_path / 'run'
  shutil.copytree(trained[1], folder)
  description = json.loads((folder / 'model.json').read_text())
  del description['preprocessor']
  (folder / 'model.json').write_text(json.dumps(description))
  with pytest.raises(UserError, match=r'model\.json: an object is needed'):
    pretrained.load(folder)


def test_a_run_without_a_checkpoint_holds_no_weights(config, trained, tmp_path):
  (tmp_path / 'model.json').write_text((trained[1] / 'model.json').read_text())
  with pytest.raises(UserError, match='holds no checkpoint yet'):
    pretrained.load(tmp_path)


def test_the_metrics_of_a_run_from_weights_say_so(config, weights, tmp_path):
  config.init_from = str(weights())
  config.epochs = 1
  config.optimizer.warmup_epochs = 0.0
  loop.run(config, tmp_path / 'run')
  assert read_metrics(tmp_path / 'run' / 'metrics.jsonl')
  other = config.copy_and_resolve_references()
  other.init_from = ''
  with pytest.raises(UserError, match='init_from'):
    loop.run(other, tmp_path / 'run')
