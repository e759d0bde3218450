"""Schedules against the authors' numbers, decay groups by count, update rules against PyTorch."""

import importlib.util
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from cvt_flax.models.zoo import create_model
from cvt_flax.training.config import OptimizerConfig, freeze
from cvt_flax.training.optimizer import (
  decayed,
  layer_scales,
  make_optimizer,
  make_schedule,
  peak_learning_rate,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]

# The learning rate of every epoch t of the authors' ImageNet runs: lib/scheduler/build.py and
# experiments/imagenet/cvt/*.yaml of github.com/microsoft/CvT with timm 0.3.2's CosineLRScheduler,
# at 2,048 images a step.
OFFICIAL = {
  0: 1e-6,
  1: 4.008e-4,
  2: 8.006e-4,
  3: 1.2004e-3,
  4: 1.6002e-3,
  5: 1.99864e-3,
  10: 1.99455e-3,
  100: 1.5025e-3,
  150: 1.005e-3,
  200: 5.075e-4,
  299: 1.00546e-5,
}


def cosine(t, epochs, peak, floor):
  return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * t / epochs))


def imagenet_config():
  path = ROOT / 'configs' / 'cvt13_imagenet.py'
  spec = importlib.util.spec_from_file_location('imagenet_config', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return freeze(module.get_config())


def rates(config, peak, epochs, steps_per_epoch):
  """Returns the learning rate of every step, as it is computed inside the jitted step."""
  schedule = make_schedule(config, peak, epochs * steps_per_epoch, steps_per_epoch)
  steps = jnp.arange(epochs * steps_per_epoch, dtype=jnp.int32)
  return np.asarray(jax.jit(jax.vmap(schedule))(steps))


# Schedules.


def test_the_imagenet_config_has_the_authors_learning_rates():
  config = imagenet_config()
  peak = peak_learning_rate(config.optimizer, config.learning_rate, 2048)
  assert peak == 0.002
  steps_per_epoch = 4
  found = rates(config.optimizer, peak, config.epochs, steps_per_epoch).reshape(300, -1)
  assert np.all(found == found[:, :1])  # constant within an epoch
  for epoch, rate in OFFICIAL.items():
    assert found[epoch, 0] == pytest.approx(rate, rel=1e-4), epoch
    exact = 1e-6 + epoch * (peak - 1e-6) / 5 if epoch < 5 else cosine(epoch, 300, peak, 1e-5)
    assert found[epoch, 0] == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize(
  ('reference_batch', 'batch_size', 'peak'),
  [(2048, 2048, 0.002), (2048, 512, 0.0005), (512, 2048, 0.008), (0, 512, 0.002)],
)
def test_the_rate_scales_with_the_batch_where_a_reference_is_given(
  reference_batch, batch_size, peak
):
  config = OptimizerConfig(reference_batch=reference_batch)
  assert peak_learning_rate(config, 0.002, batch_size) == pytest.approx(peak, rel=1e-12)


def test_warmup_and_least_rate_are_not_scaled():
  config = OptimizerConfig(
    reference_batch=100,
    warmup_epochs=1.0,
    warmup_learning_rate=1e-4,
    min_learning_rate=1e-3,
    schedule_per='step',
  )
  found = rates(config, peak_learning_rate(config, 0.1, 400), epochs=10, steps_per_epoch=1000)
  assert found[0] == pytest.approx(1e-4, rel=1e-3)
  assert found[-1] == pytest.approx(1e-3, rel=1e-3)
  assert found[1000] == pytest.approx(cosine(1, 10, 0.4, 1e-3), rel=1e-5)


def test_a_cosine_per_step_moves_at_every_step():
  config = OptimizerConfig(
    warmup_epochs=1.5, warmup_learning_rate=0.01, min_learning_rate=0.001, schedule_per='step'
  )
  found = rates(config, 0.1, epochs=8, steps_per_epoch=10)
  for step, rate in enumerate(found):
    warm = 0.01 + step * (0.1 - 0.01) / 15
    expected = warm if step < 15 else cosine(step, 80, 0.1, 0.001)
    assert rate == pytest.approx(expected, rel=1e-5), step
  assert np.all(np.diff(found[:15]) > 0) and np.all(np.diff(found[15:]) < 0)


def test_a_constant_rate_per_epoch_with_warmup():
  config = OptimizerConfig(schedule='constant', schedule_per='epoch', warmup_epochs=2.0)
  found = rates(config, 0.1, epochs=4, steps_per_epoch=3).reshape(4, 3)
  np.testing.assert_allclose(found, [[0.0] * 3, [0.05] * 3, [0.1] * 3, [0.1] * 3], rtol=1e-6)


@pytest.mark.parametrize(
  ('per', 'second'), [('step', 35), ('epoch', 40)], ids=['per step', 'per epoch']
)
def test_milestones_multiply_by_gamma(per, second):
  config = OptimizerConfig(
    schedule='multistep', schedule_per=per, milestones=(2.0, 3.5), gamma=0.5, warmup_epochs=1.0
  )
  found = rates(config, 0.8, epochs=5, steps_per_epoch=10)
  expected = np.where(np.arange(50) < 20, 0.8, np.where(np.arange(50) < second, 0.4, 0.2))
  np.testing.assert_allclose(found[10:], expected[10:], rtol=1e-6)
  assert found[0] == 0


def test_a_rate_of_zero_is_zero_throughout():
  assert np.all(rates(OptimizerConfig(), 0.0, epochs=2, steps_per_epoch=3) == 0)


# Decay groups.


@pytest.mark.parametrize(
  ('name', 'decay', 'no_decay'),
  [('cvt-13', 121, 221), ('cvt-21', 193, 349), ('cvt-w24', 220, 397)],
)
def test_decay_groups_have_the_authors_sizes(name, decay, no_decay):
  """The counts are those of the authors' lib/optim/build.py on their models."""
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  shapes = jax.eval_shape(create_model(name).init, jax.random.key(0), images)['params']
  mask = decayed(shapes)
  leaves = jax.tree_util.tree_leaves_with_path(mask)
  assert (sum(v for _, v in leaves), sum(not v for _, v in leaves)) == (decay, no_decay)
  assert mask['stage2']['cls_token'] is False
  block = mask['stage1']['blocks_0']
  assert block['attn']['conv_proj_k']['conv'] == {'kernel': True}  # depthwise
  assert block['attn']['conv_proj_k']['bn'] == {'scale': False, 'bias': False}
  assert block['norm1'] == {'scale': False, 'bias': False}
  assert block['mlp']['fc1'] == mask['head'] == {'kernel': True, 'bias': False}
  assert mask['stage0']['patch_embed']['proj'] == {'kernel': True, 'bias': False}


# Layer-wise rates.


def paths_of(name):
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  shapes = jax.eval_shape(create_model(name).init, jax.random.key(0), images)['params']
  return ['/'.join(path) for path in flatten_dict(shapes)]


@pytest.mark.parametrize('name', ['cvit', 'cct-7/3x1'])
def test_the_tokens_of_a_compact_transformer_are_its_lowest_layer(name):
  model = create_model(name)
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images)['params']
  for path, scale in layer_scales(0.5, flatten_dict(shapes)).items():
    if path[0].startswith('blocks_'):
      assert scale == 0.5 ** (model.depth - int(path[0][7:]))
    else:
      above = path[0] in ('head', 'norm', 'seq_pool')
      assert scale == (1.0 if above else 0.5 ** (model.depth + 1)), path


@pytest.mark.parametrize(('name', 'layers'), [('cvt-13', 17), ('cvt-21', 25), ('cvt-nano', 8)])
def test_each_layer_below_the_head_is_slower(name, layers):
  """As BEiT: the head whole, the last block times the decay, ..., the first embedding slowest."""
  scales = layer_scales(0.5, [tuple(path.split('/')) for path in paths_of(name)])
  scales = {'/'.join(path): scale for path, scale in scales.items()}
  assert scales.keys() == set(paths_of(name))
  depths = create_model(name).depths
  order = [
    top for s, n in enumerate(depths) for top in (f'stage{s}/e', *(f'{s}/{j}' for j in range(n)))
  ]
  assert len(order) + 1 == layers
  for path, scale in scales.items():
    if path.startswith(('head/', 'norm/')):
      expected = 1.0
    else:
      stage, below = path.split('/')[:2]
      is_block = below.startswith('blocks_')
      layer = f'{stage[5:]}/{below[7:]}' if is_block else f'{stage}/e'
      expected = 0.5 ** (len(order) - order.index(layer))
    assert scale == expected, path


def test_cvt_13_with_layer_decay_has_these_rates():
  names = {
    'head/bias': 0,
    'norm/scale': 0,
    'stage2/blocks_9/mlp/fc1/kernel': 1,
    'stage2/blocks_0/attn/conv_proj_q/bn/scale': 10,
    'stage2/patch_embed/proj/kernel': 11,
    'stage2/cls_token': 11,
    'stage1/blocks_1/norm1/bias': 12,
    'stage1/blocks_0/norm1/bias': 13,
    'stage1/patch_embed/norm/scale': 14,
    'stage0/blocks_0/mlp/fc2/bias': 15,
    'stage0/patch_embed/proj/bias': 16,
  }
  scales = layer_scales(0.75, [tuple(path.split('/')) for path in paths_of('cvt-13')])
  for name, depth in names.items():
    assert scales[tuple(name.split('/'))] == pytest.approx(0.75**depth), name


@pytest.mark.parametrize('name', ['adamw', 'adam', 'sgd', 'rmsprop'])
def test_a_layers_rate_is_that_share_of_the_learning_rate(name):
  """Of all that an update is made of, weight decay too: as another rate altogether."""
  config = OptimizerConfig(name=name, weight_decay=0.1, clip_norm=1.0)
  scales = {('dense', 'kernel'): 0.25, ('dense', 'bias'): 0.25, ('norm', 'scale'): 1.0}
  _, _, params = problem()
  grads = jax.tree.map(lambda x: jnp.cos(3 * x), params)

  def updates(rate, scales=None):
    tx = make_optimizer(config, lambda step: rate / (1 + step), scales)
    state = tx.init(params)
    for _ in range(2):
      found, state = tx.update(grads, state, params)
    return found

  found, whole, quarter = updates(0.1, scales), updates(0.1), updates(0.025)
  np.testing.assert_array_equal(found['norm']['scale'], whole['norm']['scale'])
  for leaf in ('kernel', 'bias'):
    np.testing.assert_allclose(found['dense'][leaf], quarter['dense'][leaf], rtol=1e-6)


# Update rules.

STEPS = 5


def problem():
  """Returns inputs [8 4], targets [8 3] and the parameters of tanh(x kernel + bias) scale."""
  rng = np.random.default_rng(0)
  params = {
    'dense': {'kernel': rng.normal(size=(4, 3)), 'bias': rng.normal(size=3)},
    'norm': {'scale': rng.normal(size=3)},
  }
  params = jax.tree.map(lambda x: x.astype(np.float32), params)
  return (
    rng.normal(size=(8, 4)).astype(np.float32),
    3 * rng.normal(size=(8, 3)).astype(np.float32),
    params,
  )


def flax_updates(config, schedule):
  """Returns the parameters after every step."""
  x, y, params = problem()
  tx = make_optimizer(config, schedule)

  def loss_fn(p):
    out = jnp.tanh(x @ p['dense']['kernel'] + p['dense']['bias']) * p['norm']['scale']
    return jnp.mean((out - y) ** 2)

  @jax.jit
  def step(params, opt_state):
    updates, opt_state = tx.update(jax.grad(loss_fn)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  opt_state, history = tx.init(params), []
  for _ in range(STEPS):
    params, opt_state = step(params, opt_state)
    history.append(params)
  return history


def torch_updates(torch, optimizer_class, schedule, weight_decay, clip_norm, **options):
  """Returns the same from PyTorch, with decay on the kernel alone."""
  x, y, params = problem()
  x, y = torch.tensor(x), torch.tensor(y)
  kernel, bias = (torch.tensor(params['dense'][k], requires_grad=True) for k in ('kernel', 'bias'))
  scale = torch.tensor(params['norm']['scale'], requires_grad=True)
  groups = [
    {'params': [kernel], 'weight_decay': weight_decay},
    {'params': [bias, scale], 'weight_decay': 0.0},
  ]
  optimizer = optimizer_class(groups, lr=0.0, **options)
  history = []
  for step in range(STEPS):
    for group in optimizer.param_groups:
      group['lr'] = schedule(step)
    optimizer.zero_grad()
    loss = ((torch.tanh(x @ kernel + bias) * scale - y) ** 2).mean()
    loss.backward()
    if clip_norm:
      torch.nn.utils.clip_grad_norm_([kernel, bias, scale], clip_norm)
    optimizer.step()
    k, b, s = (t.detach().numpy().copy() for t in (kernel, bias, scale))
    history.append({'dense': {'kernel': k, 'bias': b}, 'norm': {'scale': s}})
  return history


def assert_same_history(ours, theirs):
  start = problem()[2]
  for a, b in zip(ours, theirs, strict=True):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), a, b)
  moved = jax.tree.map(lambda a, b: np.abs(a - b).min(), ours[-1], start)
  assert min(jax.tree.leaves(moved)) > 1e-4  # more than the tolerance, for every number


def constant(step):
  return 0.05


def falling(step):
  return 0.1 / (1 + step)


# Our options, PyTorch's optimizer, its options.
RULES = {
  'adamw': (
    dict(name='adamw', beta1=0.8, beta2=0.95, epsilon=1e-3),
    'AdamW',
    dict(betas=(0.8, 0.95), eps=1e-3),
  ),
  'adam': (
    dict(name='adam', beta1=0.8, beta2=0.95, epsilon=1e-3),
    'Adam',
    dict(betas=(0.8, 0.95), eps=1e-3),
  ),
  'sgd': (dict(name='sgd', momentum=0.0), 'SGD', {}),
  'momentum': (dict(name='sgd', momentum=0.8), 'SGD', dict(momentum=0.8)),
  'nesterov': (
    dict(name='sgd', momentum=0.8, nesterov=True),
    'SGD',
    dict(momentum=0.8, nesterov=True),
  ),
  'rmsprop': (
    dict(name='rmsprop', rms_decay=0.9, epsilon=1e-2, momentum=0.0),
    'RMSprop',
    dict(alpha=0.9, eps=1e-2),
  ),
  'rmsprop with momentum': (
    dict(name='rmsprop', rms_decay=0.9, epsilon=1e-2, momentum=0.7),
    'RMSprop',
    dict(alpha=0.9, eps=1e-2, momentum=0.7),
  ),
}


@pytest.mark.parametrize('clip_norm', [0.0, 0.1], ids=['unclipped', 'clipped'])
@pytest.mark.parametrize('rule', RULES)
def test_optimizers_do_what_pytorchs_do(rule, clip_norm, peer):
  """With weight decay on the kernel alone; PyTorch clips before its optimizers add decay."""
  torch = peer('torch')
  options, theirs, their_options = RULES[rule]
  config = OptimizerConfig(weight_decay=0.3, clip_norm=clip_norm, **options)
  optimizer_class = getattr(torch.optim, theirs)
  ours = flax_updates(config, constant)
  expected = torch_updates(torch, optimizer_class, constant, 0.3, clip_norm, **their_options)
  assert_same_history(ours, expected)
  undecayed = torch_updates(torch, optimizer_class, constant, 0.0, clip_norm, **their_options)
  difference = np.abs(undecayed[-1]['dense']['kernel'] - ours[-1]['dense']['kernel'])
  assert difference.max() > 1e-3


@pytest.mark.parametrize('rule', RULES)
def test_optimizers_follow_a_schedule_as_pytorchs_do(rule, peer):
  torch = peer('torch')
  options, theirs, their_options = RULES[rule]
  ours = flax_updates(OptimizerConfig(weight_decay=0.3, **options), falling)
  optimizer_class = getattr(torch.optim, theirs)
  expected = torch_updates(torch, optimizer_class, falling, 0.3, 0.0, **their_options)
  assert_same_history(ours, expected)


def test_defaults_are_pytorchs(peer):
  torch = peer('torch')
  tensor = torch.zeros(1, requires_grad=True)
  config = OptimizerConfig()
  adamw = torch.optim.AdamW([tensor]).defaults
  assert (config.beta1, config.beta2, config.epsilon) == (*adamw['betas'], adamw['eps'])
  assert config.rms_decay == torch.optim.RMSprop([tensor]).defaults['alpha']


def test_a_gradient_within_the_norm_is_left_alone():
  config = OptimizerConfig(name='sgd', momentum=0.0, weight_decay=0.0, clip_norm=100.0)
  unclipped = OptimizerConfig(name='sgd', momentum=0.0, weight_decay=0.0)
  ours, expected = flax_updates(config, constant), flax_updates(unclipped, constant)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, expected)
