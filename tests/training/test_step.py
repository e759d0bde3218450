"""The training step: what it computes, and that devices and microbatches do not change it."""

import collections
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvt_flax.models.cvt import CvT
from cvt_flax.models.layers import BatchNorm
from cvt_flax.ops.pixels import normalize_pixels
from cvt_flax.rng import Stream, stream_key
from cvt_flax.training import setup
from cvt_flax.training.config import AugmentConfig, OptimizerConfig, freeze, get_config
from cvt_flax.training.optimizer import make_optimizer
from cvt_flax.training.sharding import make_mesh, place, replicated, split_batch, split_microbatches
from cvt_flax.training.step import init_state, make_train_step

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
CLASSES = 5
PLAIN_SGD = OptimizerConfig(name='sgd', momentum=0.0, weight_decay=0.0)
COLLECTIVES = (
  'all-reduce|all-gather|all-to-all|ragged-all-to-all|reduce-scatter|collective-permute|'
  'collective-broadcast'
)


class Probe(nn.Module):
  """All that a step needs of a model, and compiled in no time."""

  num_classes: int = CLASSES
  bn_group_size: int = 0
  drop_rate: float = 0.0

  @nn.compact
  def __call__(self, images, train=False):
    x = images[:, :2, :2].reshape(len(images), 1, 1, -1)
    same = jnp.eye(x.shape[-1]), jnp.zeros(x.shape[-1])  # a linear layer that changes nothing
    x = BatchNorm(self.bn_group_size, name='bn')(x, *same, train)[:, 0, 0]
    x = nn.Dropout(self.drop_rate, deterministic=not train)(x)
    return nn.Dense(self.num_classes, name='head')(x)


def tiny_cvt(**attributes):
  """Returns a CvT of one stage of two blocks; compiling it is most of what these tests take."""
  options = dict(
    num_classes=CLASSES,
    embed_dims=(8,),
    depths=(2,),
    num_heads=(1,),
    patch_sizes=(3,),
    patch_strides=(2,),
    patch_paddings=(1,),
    mlp_ratios=(2.0,),
    cls_token=(True,),
    drop_path_rates=(),
    kv_strides=(2,),
  )
  return CvT(**options | attributes)


def batch_of(size=16, seed=0):
  rng = np.random.default_rng(seed)
  return {
    'image': jnp.asarray(rng.integers(0, 256, (size, 8, 8, 3)), jnp.uint8),
    'label': jnp.asarray(rng.integers(0, CLASSES, size), jnp.int32),
    'mask': jnp.ones(size),
  }


def build(
  model,
  *,
  augment=AugmentConfig(),  # noqa: B008  (frozen)
  optimizer=PLAIN_SGD,
  schedule=lambda step: 0.1 / (1 + step),
  ema_decay=0.0,
  accumulate_steps=1,
  seed=0,
  spread=None,
):
  """Returns (the jitted step, which donates its state; the state before it)."""
  tx = make_optimizer(optimizer, schedule)
  step = make_train_step(
    model,
    tx,
    schedule,
    seed=seed,
    mean=MEAN,
    std=STD,
    augment=augment,
    ema_decay=ema_decay,
    accumulate_steps=accumulate_steps,
    spread=spread,
  )
  state = init_state(model, tx, seed, 8, bool(ema_decay))
  return jax.jit(step, donate_argnums=0), state


def at_step(state, step):
  """Returns a copy of the state, which a step may donate, that has come to `step`."""
  return jax.tree.map(jnp.copy, state).replace(step=jnp.int32(step))


def norm(*trees):
  """Returns the Euclidean norm of the first tree less the second, over all of their numbers."""
  difference = trees[0] if len(trees) == 1 else jax.tree.map(np.subtract, *trees)
  return np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(difference)))


def largest_difference(a, b):
  return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), a, b)))


# Devices.


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """72 noisy 8x8 images of four classes."""
  rng = np.random.default_rng(0)
  path = tmp_path_factory.mktemp('data') / 'tiny.npz'
  labels = np.arange(72) % 4
  pixels = rng.normal(60 + 40 * labels[:, None, None, None], 40, (72, 8, 8, 3))
  np.savez(path, x_train=pixels.clip(0, 255).astype(np.uint8), y_train=labels)
  return f'npz:{path}'


def everything(source, devices, bn_group_size):
  """Returns a config with all that could depend on devices."""
  config = get_config()
  config.source = source
  config.image_size = 8
  config.batch_size = 16
  config.epochs = 3
  config.eval.holdout = 0.0
  config.mesh.data = devices
  config.model.bn_group_size = bn_group_size
  config.optimizer.ema_decay = 0.9
  config.optimizer.warmup_epochs = 1
  config.optimizer.clip_norm = 1.0
  config.augment.crop_padding = 1
  config.augment.flip = True
  config.augment.mixup = 0.8
  config.augment.cutmix = 1.0
  config.augment.erase_prob = 0.25
  config.augment.label_smoothing = 0.1
  return freeze(config)


Trajectory = collections.namedtuple('Trajectory', 'losses state hlo')


@pytest.fixture(scope='module')
def trajectory(source, tmp_path_factory):
  """trajectory(devices, bn_group_size) takes ten steps of a run, across epochs."""
  cache = {}

  def build_model(config, num_classes, image_size):
    blocks = 2 if config.bn_group_size else 1  # drop path is for the second, and takes a while
    return tiny_cvt(
      num_classes=num_classes,
      bn_group_size=config.bn_group_size,
      depths=(blocks,),
      drop_path_rates=(0.2,),
    )

  def take(devices, bn_group_size):
    if (devices, bn_group_size) not in cache:
      config = everything(source, devices, bn_group_size)
      with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, 'build_model', build_model)
        run = setup.TrainingSetup(config, tmp_path_factory.mktemp('runs') / 'none')
      assert run.steps_per_epoch == 4
      state, losses = run.program.init(), []
      step = None
      for fed in run.engine.feed_training(run.train_data, 0, 10):
        step = step or run.program.step.lower(state, *fed).compile()
        state, loss = step(state, *fed)
        assert len(loss.sharding.device_set) == devices
        losses.append(float(loss))
      cache[devices, bn_group_size] = Trajectory(losses, jax.device_get(state), step.as_text())
    return cache[devices, bn_group_size]

  return take


@pytest.mark.parametrize('bn_group_size', [0, 2], ids=['whole batch', 'groups'])
def test_one_device_and_eight_agree(trajectory, bn_group_size):
  one, eight = trajectory(1, bn_group_size), trajectory(8, bn_group_size)
  np.testing.assert_allclose(one.losses, eight.losses, rtol=0, atol=2e-6)
  assert np.ptp(one.losses) > 0.05
  assert one.state.step == eight.state.step == 10
  # Adam divides by the gradient's size: noise in a gradient near zero is a step of its own.
  assert largest_difference(one.state.batch_stats, eight.state.batch_stats) < 2e-5


def test_groups_within_a_device_need_nothing_but_all_reduce(trajectory):
  """Of gradients, running statistics and metrics; no image or map travels between devices."""
  text = trajectory(8, 2).hlo
  found = collections.Counter(re.findall(rf'\s({COLLECTIVES})(?:-start)?\(', text))
  print(f'collectives of the step on 8 devices: {dict(found)}')
  assert set(found) == {'all-reduce'}
  # More would be communication inside the network: one for each tensor of gradients and
  # statistics, and a few scalars.
  state = trajectory(8, 2).state
  tensors = len(jax.tree.leaves((state.params, state.batch_stats)))
  assert 1 <= found['all-reduce'] <= tensors + 4
  # The pattern finds what it is to find: on one device there is none.
  assert not re.search(rf'\s({COLLECTIVES})(?:-start)?\(', trajectory(1, 2).hlo)


# Microbatches.


@pytest.mark.parametrize('k', [2, 8])
def test_microbatches_change_nothing(k):
  def after_two_steps(k):
    augment = AugmentConfig(mixup=0.8, label_smoothing=0.1)
    step, state = build(Probe(bn_group_size=2), augment=augment, accumulate_steps=k, ema_decay=0.9)
    for t in range(2):
      state, loss = step(state, batch_of(seed=t))
    return jax.device_get(state), float(loss)

  (expected, expected_loss), (state, loss) = after_two_steps(1), after_two_steps(k)
  assert loss == pytest.approx(expected_loss, abs=1e-6)
  assert largest_difference(expected.params, state.params) < 1e-6
  assert largest_difference(expected.batch_stats, state.batch_stats) < 1e-6
  assert largest_difference(expected.ema, state.ema) < 1e-6
  for name, value in expected.window.compute().items():
    assert state.window.compute()[name] == pytest.approx(value, rel=1e-5), name
  # And there was something to compare.
  start = jax.device_get(build(Probe(bn_group_size=2))[1])
  assert largest_difference(start.params, state.params) > 1e-2
  assert largest_difference(start.batch_stats, state.batch_stats) > 1e-2


def test_microbatches_draw_their_own_dropout():
  """Of equal images, so that microbatches differ by nothing else."""
  batch = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], (2, *x.shape[1:])), batch_of())

  class Dropped(Probe):
    @nn.compact
    def __call__(self, images, train=False):
      x = nn.Dropout(0.5, deterministic=not train)(images.reshape(len(images), -1))
      return nn.Dense(self.num_classes)(x)

  model = Dropped(bn_group_size=1)
  step, state = build(model, accumulate_steps=2)

  def loss_of(microbatch):
    key = jax.random.fold_in(stream_key(0, Stream.DROPOUT, 3), microbatch)
    image = normalize_pixels(batch['image'][:1], MEAN, STD)
    logits = model.apply({'params': state.params}, image, train=True, rngs={'dropout': key})
    return -float(jax.nn.log_softmax(logits)[0, batch['label'][0]])

  expected = loss_of(0), loss_of(1)
  assert abs(expected[0] - expected[1]) > 1e-3
  _, loss = step(at_step(state, 3), batch)
  assert float(loss) == pytest.approx(np.mean(expected), abs=1e-6)


@pytest.mark.parametrize(('groups', 'k'), [(4, 2), (2, 8)])
def test_microbatches_over_devices_change_nothing(groups, k):
  """Four devices share groups; then, each microbatch is of two images, fewer than devices."""

  def after_a_step(devices):
    mesh = make_mesh(devices)
    model = Probe(bn_group_size=groups)
    step, state = build(model, accumulate_steps=k, spread=split_microbatches(mesh))
    state = place(state, replicated(mesh))
    state, loss = step(state, place(batch_of(), split_batch(mesh)))
    return jax.device_get(state), float(loss)

  (one, expected), (four, loss) = after_a_step(1), after_a_step(4)
  assert loss == pytest.approx(expected, abs=1e-6)
  assert largest_difference(one.params, four.params) < 1e-6
  assert largest_difference(one.batch_stats, four.batch_stats) < 1e-6


# What a step computes.


def test_pixels_are_normalised_exactly():
  pixels = np.arange(256, dtype=np.uint8)[:, None, None, None].repeat(3, -1)
  found = normalize_pixels(jnp.asarray(pixels), MEAN, STD)
  assert found.dtype == jnp.float32
  expected = (pixels / 255.0 - MEAN) / STD
  # Three roundings to float32 of numbers up to 5.
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_the_target_is_the_smoothed_label():
  smoothing = 0.3
  step, state = build(Probe(), augment=AugmentConfig(label_smoothing=smoothing))
  bias = np.array([0.5, -1.0, 2.0, 0.0, 0.3], np.float32)
  head = {'kernel': jnp.zeros_like(state.params['head']['kernel']), 'bias': jnp.asarray(bias)}
  state = state.replace(params=state.params | {'head': head})
  batch = batch_of()
  _, loss = step(state, batch)
  log_p = bias - np.log(np.exp(bias).sum())
  target = np.full((16, CLASSES), smoothing / CLASSES)
  target[np.arange(16), batch['label']] += 1 - smoothing
  assert float(loss) == pytest.approx(-(target @ log_p).mean(), rel=1e-6)


def test_an_image_that_is_missing_has_no_loss():
  def loss(**changes):
    step, state = build(Probe())
    return float(step(state, batch | changes)[1])

  batch, there = batch_of(), jnp.arange(16) < 5
  some, others = loss(mask=there * 1.0), loss(mask=~there * 1.0)
  assert some + others == pytest.approx(loss(), rel=1e-6)
  label = jnp.where(there, batch['label'], (batch['label'] + 1) % CLASSES)
  assert loss(label=label, mask=there * 1.0) == some


def test_the_window_holds_means_over_its_steps_and_the_last_rate():
  step, state = build(Probe(), optimizer=OptimizerConfig(name='sgd', momentum=0.0, clip_norm=0.05))
  losses, hits, updates, parameters, gradients = [], [], [], [], []
  for t in range(3):
    batch = batch_of(seed=t)
    before = jax.device_get(state.params)
    images = normalize_pixels(batch['image'], MEAN, STD)
    variables = {'params': before, 'batch_stats': state.batch_stats}

    def loss_fn(params, images=images, batch=batch, stats=variables['batch_stats']):
      logits, _ = Probe().apply(
        {'params': params, 'batch_stats': stats}, images, train=True, mutable=['batch_stats']
      )
      log_p = jax.nn.log_softmax(logits)[jnp.arange(16), batch['label']]
      return -log_p.mean(), jnp.mean(logits.argmax(-1) == batch['label'])

    (loss, top1), gradient = jax.value_and_grad(loss_fn, has_aux=True)(before)
    losses.append(float(loss))
    hits.append(float(top1))
    gradients.append(norm(jax.device_get(gradient)))
    state, found = step(state, batch)
    assert float(found) == pytest.approx(losses[-1], rel=1e-5)
    after = jax.device_get(state.params)
    updates.append(norm(after, before))
    parameters.append(norm(after))
  window = {name: float(value) for name, value in state.window.compute().items()}
  assert window == {
    'loss': pytest.approx(np.mean(losses), rel=1e-5),
    'top1': pytest.approx(np.mean(hits), rel=1e-5),
    'gradient_norm': pytest.approx(np.mean(gradients), rel=1e-5),  # before it is clipped
    'update_norm': pytest.approx(np.mean(updates), rel=1e-4),
    'parameter_norm': pytest.approx(np.mean(parameters), rel=1e-5),
    'learning_rate': pytest.approx(0.1 / 3, rel=1e-6),
  }
  assert min(gradients) > 0.05 and np.ptp(losses) > 1e-3  # it was clipped; the mean is not the last
  assert state.step == 3 and state.step.dtype == jnp.int32


def test_averages_of_parameters_and_statistics():
  decay = 0.75
  step, state = build(Probe(), ema_decay=decay)
  expected = jax.device_get({'params': state.params, 'batch_stats': state.batch_stats})
  for t in range(3):
    state, _ = step(state, batch_of(seed=t))
    new = jax.device_get({'params': state.params, 'batch_stats': state.batch_stats})
    expected = jax.tree.map(lambda e, n: decay * e + (1 - decay) * n, expected, new)
  assert largest_difference(expected, state.ema) < 1e-6
  assert largest_difference(new['params'], expected['params']) > 1e-3
  assert largest_difference(new['batch_stats'], expected['batch_stats']) > 1e-3
  assert state.variables is state.ema


def test_without_averages_the_state_evaluates_what_it_trains():
  _, state = build(Probe())
  assert state.ema is None
  assert state.variables == {'params': state.params, 'batch_stats': state.batch_stats}


def test_the_state_is_donated():
  """No buffer is in it twice, the averages' least of all; a warning would be an error."""
  step, state = build(Probe(), ema_decay=0.9, optimizer=OptimizerConfig(name='adamw'))
  batch = batch_of()
  new, _ = step(state, batch)
  old = jax.tree.leaves((state.params, state.batch_stats, state.ema, state.opt_state))
  assert all(x.is_deleted() for x in old)
  assert not any(x.is_deleted() for x in jax.tree.leaves((new, batch)))
  newer, _ = step(new, batch)
  assert newer.step == 2


# Randomness.


@pytest.fixture(scope='module')
def drop_path():
  """(a step that only drops paths, and does not learn; a state)."""
  return build(tiny_cvt(drop_path_rates=(0.5,)), schedule=lambda step: 0.0 * step)


def test_drop_path_depends_on_the_step_alone(drop_path):
  step, state = drop_path
  params = jax.device_get(state.params)
  params['stage0'] = jax.tree.map(lambda x: x + 0.1, params['stage0'])  # branches that matter
  state = state.replace(params=jax.device_put(params))
  losses = [float(step(at_step(state, t), batch_of())[1]) for t in (0, 1, 2, 0)]
  assert len(set(losses)) == 3
  assert losses[0] == losses[3]


@pytest.mark.parametrize(
  ('augment', 'random'),
  [
    (AugmentConfig(label_smoothing=0.1), False),
    (AugmentConfig(mixup=0.8), True),
    (AugmentConfig(cutmix=1.0), True),
    (AugmentConfig(erase_prob=0.5), True),
  ],
  ids=['smoothing', 'mixup', 'cutmix', 'erasing'],
)
def test_mixing_depends_on_seed_and_step_alone(augment, random):
  step, state = build(Probe(), augment=augment)
  losses = [float(step(at_step(state, t), batch_of())[1]) for t in (0, 1, 2, 0)]
  other_seed, _ = build(Probe(), augment=augment, seed=1)
  losses.append(float(other_seed(at_step(state, 0), batch_of())[1]))
  assert losses[0] == losses[3]
  assert (len(set(losses)) > 1) == random
  if random:
    assert losses[4] != losses[0]


def test_initialisation_depends_on_the_seed_alone():
  states = [build(Probe(), seed=seed)[1] for seed in (0, 0, 1)]
  a, b, c = (np.asarray(s.params['head']['kernel']) for s in states)
  assert np.array_equal(a, b) and not np.array_equal(a, c)
  assert states[0].step == 0 and states[0].window.loss.count == 0
