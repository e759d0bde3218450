"""Which checkpoints are kept, and that they come back as they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvt_flax.training.checkpoint import Checkpoints
from cvt_flax.training.config import OptimizerConfig
from cvt_flax.training.optimizer import make_optimizer
from cvt_flax.training.sharding import make_mesh, replicated
from cvt_flax.training.step import TrainMetrics, TrainState

TX = make_optimizer(OptimizerConfig(clip_norm=1.0), lambda step: 0.1)


def state_of(step, ema=True, devices=1):
  """Returns a state whose numbers depend on the step; all of it differs from all else."""
  rng = np.random.default_rng(step)

  def like(tree):
    def random(x):
      if jnp.issubdtype(x.dtype, jnp.integer):
        return np.asarray(rng.integers(1, 1000, x.shape), x.dtype)
      return rng.normal(size=x.shape).astype(x.dtype)

    return jax.tree.map(random, tree)

  params = {
    'stage0': {'proj': {'kernel': jnp.zeros((3, 3, 3, 8)), 'bias': jnp.zeros(8)}},
    'head': {'kernel': jnp.zeros((8, 5))},
  }
  stats = {'stage0': {'bn': {'mean': jnp.zeros(8), 'var': jnp.ones(8)}}}
  state = TrainState(
    step=np.int32(step),
    params=like(params),
    batch_stats=like(stats),
    opt_state=like(TX.init(params)),
    ema=like({'params': params, 'batch_stats': stats}) if ema else None,
    window=like(TrainMetrics.empty()),
  )
  return jax.device_put(state, replicated(make_mesh(devices)))


def abstract_of(tree, devices=1):
  sharding = replicated(make_mesh(devices))
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def assert_same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype and x.shape == y.shape
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture
def open_checkpoints(tmp_path):
  """Opens the checkpoints of a run folder, as often as asked; closes them all."""
  opened = []

  def open_them(keep=2):
    opened.append(Checkpoints(tmp_path / 'checkpoints', keep))
    return opened[-1]

  yield open_them
  for checkpoints in opened:
    checkpoints.close()


def save(checkpoints, accuracies):
  """Saves a checkpoint for every {step: validation top-1}, None for no validation."""
  for step, top1 in accuracies.items():
    checkpoints.save(step, state_of(step), top1)
  checkpoints.wait()


def on_disk(tmp_path):
  return {int(p.name) for p in (tmp_path / 'checkpoints').iterdir()}


# What is kept.


def test_of_an_empty_folder_there_is_no_step(open_checkpoints):
  checkpoints = open_checkpoints()
  assert checkpoints.latest_step() is None
  assert checkpoints.best_step() is None


def test_the_latest_and_the_best_are_kept(open_checkpoints, tmp_path):
  checkpoints = open_checkpoints(keep=2)
  save(checkpoints, {1: 0.1, 2: 0.9, 3: 0.2, 4: 0.3, 5: 0.4})
  assert on_disk(tmp_path) == {2, 4, 5}
  assert (checkpoints.latest_step(), checkpoints.best_step()) == (5, 2)
  again = open_checkpoints(keep=2)  # another process
  assert (again.latest_step(), again.best_step()) == (5, 2)
  save(again, {6: 0.95})
  assert on_disk(tmp_path) == {5, 6}
  assert again.best_step() == 6


def test_the_newest_is_never_deleted(open_checkpoints, tmp_path):
  """Be it the worst, or not evaluated: a run that stops goes on from it."""
  checkpoints = open_checkpoints(keep=1)
  accuracies = {1: 0.9, 2: None, 3: 0.1, 4: 0.1, 5: None}
  for step, top1 in accuracies.items():
    save(checkpoints, {step: top1})
    assert step in on_disk(tmp_path)
    assert checkpoints.latest_step() == step
    assert checkpoints.best_step() == 1
  assert on_disk(tmp_path) == {1, 5}


def test_a_run_without_validation_keeps_its_latest(open_checkpoints, tmp_path):
  checkpoints = open_checkpoints(keep=2)
  save(checkpoints, {1: None, 2: None, 3: None})
  assert on_disk(tmp_path) == {2, 3}
  assert checkpoints.best_step() == checkpoints.latest_step() == 3


def test_of_equally_good_ones_the_best_step_is_one_that_is_kept(open_checkpoints, tmp_path):
  checkpoints = open_checkpoints(keep=1)
  save(checkpoints, {1: 0.1, 2: 0.9, 3: 0.9, 4: 0.9, 5: 0.2})
  kept = on_disk(tmp_path)
  assert 5 in kept and len(kept) == 2
  best = checkpoints.best_step()
  assert best in kept - {1, 5}
  assert open_checkpoints(keep=1).best_step() == best


def test_a_checkpoint_of_the_same_step_is_replaced(open_checkpoints, tmp_path):
  """A signal during an evaluation saved it without its metric."""
  checkpoints = open_checkpoints()
  save(checkpoints, {3: 0.5, 6: None})
  assert checkpoints.best_step() == 3
  again = open_checkpoints()
  replacement = state_of(600).replace(step=jnp.int32(6))
  again.save(6, replacement, 0.8)
  again.wait()
  assert on_disk(tmp_path) == {3, 6}
  assert again.best_step() == 6
  assert_same_bits(again.restore(6, abstract_of(replacement)), replacement)


def test_what_a_killed_save_left_is_ignored_and_removed(open_checkpoints, tmp_path):
  save(open_checkpoints(), {3: 0.5})
  for step in (6, 9):  # one that is saved again, and one that is not
    left = tmp_path / 'checkpoints' / f'{step}.orbax-checkpoint-tmp'
    (left / 'model.orbax-checkpoint-tmp').mkdir(parents=True)
    (left / 'model.orbax-checkpoint-tmp' / 'manifest.ocdbt').write_bytes(b'half')
  checkpoints = open_checkpoints()
  assert (checkpoints.latest_step(), checkpoints.best_step()) == (3, 3)
  save(checkpoints, {6: 0.6})
  assert {p.name for p in (tmp_path / 'checkpoints').iterdir()} == {'3', '6'}
  assert_same_bits(checkpoints.restore(6, abstract_of(state_of(6))), state_of(6))


# What comes back.


@pytest.mark.parametrize('ema', [True, False], ids=['averages', 'no averages'])
@pytest.mark.parametrize(('before', 'after'), [(1, 1), (1, 8), (8, 1), (8, 2)])
def test_a_state_comes_back_bit_for_bit_on_any_devices(open_checkpoints, before, after, ema):
  state = state_of(7, ema, before)
  checkpoints = open_checkpoints()
  checkpoints.save(7, state, 0.5)
  checkpoints.wait()
  restored = open_checkpoints().restore(7, abstract_of(state, after))
  assert_same_bits(restored, state)
  assert type(restored.window) is TrainMetrics
  expected = replicated(make_mesh(after))
  assert all(x.sharding == expected for x in jax.tree.leaves(restored))
  assert (restored.ema is not None) == ema


def test_a_state_may_be_donated_once_save_returns(open_checkpoints):
  """What is saved is what it was then, whatever becomes of its buffers."""
  state, expected = state_of(7), state_of(7)
  checkpoints = open_checkpoints()
  checkpoints.save(7, state, None)
  overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
  overwrite(state)  # what is still being written jax copies
  free = state_of(7)
  overwrite(free)
  assert free.params['head']['kernel'].is_deleted()
  checkpoints.wait()
  assert_same_bits(checkpoints.restore(7, abstract_of(expected)), expected)


def test_numbers_that_are_not_ordinary_come_back(open_checkpoints):
  state = state_of(7, ema=False)
  odd = jnp.array([[jnp.nan, jnp.inf, -0.0, 1e-45, -jnp.inf]] * 8, jnp.float32)
  state = state.replace(params=state.params | {'head': {'kernel': odd}})
  checkpoints = open_checkpoints()
  checkpoints.save(7, state, None)
  checkpoints.wait()
  assert_same_bits(checkpoints.restore(7, abstract_of(state)), state)


@pytest.mark.parametrize('devices', [1, 8])
def test_variables_are_the_averages_where_they_are_kept(open_checkpoints, devices):
  checkpoints = open_checkpoints()
  save(checkpoints, {7: 0.5})
  state = state_of(7)
  trained = {'params': state.params, 'batch_stats': state.batch_stats}
  abstract = abstract_of(trained, devices)
  reader = open_checkpoints()
  assert_same_bits(reader.restore_variables(7, abstract, averaged=True), state.ema)
  assert_same_bits(reader.restore_variables(7, abstract, averaged=False), trained)
  restored = reader.restore_variables(7, abstract, averaged=True)
  expected = replicated(make_mesh(devices))
  assert all(x.sharding == expected for x in jax.tree.leaves(restored))


def test_a_model_without_batch_norm_has_no_statistics(open_checkpoints):
  state = state_of(7).replace(batch_stats={})
  state = state.replace(ema=state.ema | {'batch_stats': {}})
  checkpoints = open_checkpoints()
  checkpoints.save(7, state, 0.5)
  checkpoints.wait()
  reader = open_checkpoints()
  assert_same_bits(reader.restore(7, abstract_of(state)), state)
  variables = reader.restore_variables(7, abstract_of({'params': state.params}), averaged=True)
  assert_same_bits(variables['params'], state.ema['params'])
