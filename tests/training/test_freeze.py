"""What is frozen stays byte for byte as it was, and acts as in evaluation."""

import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict

from cvt_flax import save_pretrained
from cvt_flax.errors import Interrupted, UserError
from cvt_flax.ops.pixels import normalize_pixels
from cvt_flax.training import loop
from cvt_flax.training.config import AugmentConfig, OptimizerConfig, freeze
from cvt_flax.training.freeze import Frozen, find_frozen
from cvt_flax.training.network import build_model
from cvt_flax.training.optimizer import make_optimizer
from cvt_flax.training.setup import Setup, TrainingSetup
from cvt_flax.training.step import init_state, make_train_step
from cvt_flax.weights.preprocessing import Preprocessing
from tests.models.torch_weights import drawn_variables
from tests.training.test_step import MEAN, STD, batch_of, tiny_cvt

# A softmax does not see the biases of keys, and the class token alone is a query of the last block.
WITHOUT_GRADIENT = r'proj_k/bias|stage1/blocks_0/attn/conv_proj_q'


@pytest.fixture
def from_weights(stateful, tmp_path):
  """The tiny config, of which all that moves numbers is on, from weights with drawn statistics."""
  config = stateful
  model = build_model(freeze(config).model, 2)
  save_pretrained(
    tmp_path / 'weights', model, drawn_variables(model), ('0', '1'), Preprocessing(8, 1.0)
  )
  config.init_from = str(tmp_path / 'weights')
  config.optimizer.clip_norm = 1.0
  return config


def saved(folder, step):
  """Returns all that a checkpoint holds, as {(item, *path): array}."""
  with ocp.CheckpointManager(folder / 'checkpoints') as manager:
    names = ('model', 'ema', 'optimizer')
    args = ocp.args.Composite(**{name: ocp.args.StandardRestore() for name in names})
    tree = manager.restore(step, args=args)
  leaves = jax.tree_util.tree_leaves_with_path(dict(tree.items()))
  return {jax.tree_util.keystr(path, simple=True, separator='/'): x for path, x in leaves}


def assert_moved_but_for(frozen, config, end):
  """Checks a checkpoint against the weights: what `frozen` matches is the same, the rest is not."""
  start = drawn_variables(build_model(freeze(config).model, 2))
  start = {'/'.join(path): np.asarray(x) for path, x in flatten_dict(start).items()}
  names = {name for name in start if re.fullmatch(frozen, name)}
  assert names and names != start.keys()
  for name, x in start.items():
    for item in ('model', 'ema'):
      same = np.asarray(end[f'{item}/{name}']).tobytes() == x.tobytes()
      assert same == (name in names) or re.search(WITHOUT_GRADIENT, name), (item, name)
  return start, names


@pytest.mark.parametrize(
  ('expression', 'frozen'),
  [
    ('backbone', r'params/(?!head/).*|batch_stats/.*'),
    (r'.*/bn/scale', r'params/.*/bn/scale'),  # the biases are trained, so statistics move
  ],
)
def test_what_is_frozen_is_the_same_bytes_after_a_run(
  expression, frozen, from_weights, tmp_path, capsys
):
  config = from_weights
  config.optimizer.freeze, config.epochs = expression, 2
  loop.run(config, tmp_path / 'run')
  said = capsys.readouterr().out
  end = saved(tmp_path / 'run', 22)
  start, names = assert_moved_but_for(frozen, config, end)

  # Nor does the optimizer know of it.
  sizes = {name: x.size for name, x in start.items() if name.startswith('params/')}
  trained = sum(size for name, size in sizes.items() if name not in names)
  known = [x.size for name, x in end.items() if name.startswith('optimizer/') and '/mu/' in name]
  assert sum(known) == trained
  norms = sum(name.endswith('/mean') for name in names)
  assert (
    f'trained: {trained:,} parameters; frozen: {sum(sizes.values()) - trained:,}, and the '
    f'statistics of {norms} batch norms\n'
  ) in said


def test_a_frozen_run_goes_on_bit_for_bit(from_weights, tmp_path, monkeypatch):
  config = from_weights
  config.optimizer.freeze, config.optimizer.layer_decay, config.epochs = 'stage0/.*', 0.7, 2
  loop.run(config, tmp_path / 'whole')
  original = Setup.evaluate

  def interrupted(self, variables, arrays, signals):
    signals._noted = signal.SIGTERM
    return original(self, variables, arrays, signals)

  with monkeypatch.context() as patch:
    patch.setattr(Setup, 'evaluate', interrupted)
    with pytest.raises(Interrupted, match='saved step 11'):
      loop.run(config, tmp_path / 'stopped')
  loop.run(config, tmp_path / 'stopped')
  expected, got = saved(tmp_path / 'whole', 22), saved(tmp_path / 'stopped', 22)
  assert_moved_but_for(r'(params|batch_stats)/stage0/.*', config, expected)
  assert got.keys() == expected.keys()
  for name, array in expected.items():
    assert np.asarray(got[name]).tobytes() == np.asarray(array).tobytes(), name


def build(expression, **attributes):
  """Returns (the step, its first state) of a model with dropout, drop path and its statistics."""
  model = tiny_cvt(drop_rates=(0.3,), drop_path_rates=(0.5,), **attributes)
  config = OptimizerConfig(name='sgd', momentum=0.0, weight_decay=0.0)
  tx = make_optimizer(config, lambda step: 0.1)
  paths = flatten_dict(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3))))
  frozen = find_frozen(expression, [p[1:] for p in paths if p[0] == 'params'])
  step = make_train_step(
    model,
    tx,
    lambda step: 0.1,
    seed=0,
    mean=MEAN,
    std=STD,
    augment=AugmentConfig(),
    ema_decay=0.0,
    accumulate_steps=1,
    frozen=frozen,
  )
  return model, step, init_state(model, tx, 0, 8, False, frozen).replace(**drawn_variables(model))


def test_a_frozen_backbone_computes_as_in_evaluation():
  """No statistics of the batch, no dropout, no drop path: the loss of the model as it is used."""
  model, step, state = build('backbone')
  batch = batch_of()
  images = normalize_pixels(batch['image'], MEAN, STD)

  def loss_of(head):
    params = state.params | {'head': head}
    logits = model.apply({'params': params, 'batch_stats': state.batch_stats}, images)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']))

  expected, gradient = jax.jit(jax.value_and_grad(loss_of))(state.params['head'])
  after, loss = jax.jit(step)(state, batch)
  assert float(loss) == pytest.approx(float(expected), rel=1e-6)
  # Norms, by which gradients are clipped, are of what is trained.
  window = after.window.compute()
  assert float(window['gradient_norm']) == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-5)
  head = after.params['head']
  assert float(window['parameter_norm']) == pytest.approx(float(optax.tree.norm(head)), rel=1e-6)


def test_dropouts_are_on_where_anything_is_trained():
  """A frozen batch norm alone: the loss is one with dropout and the running statistics."""
  _, step, state = build('.*/bn/.*')
  losses = {float(jax.jit(step)(state.replace(step=jnp.int32(s)), batch_of())[1]) for s in (0, 1)}
  assert len(losses) == 2
  _, step, state = build('backbone')
  losses = {float(jax.jit(step)(state.replace(step=jnp.int32(s)), batch_of())[1]) for s in (0, 1)}
  assert len(losses) == 1


def test_no_gradient_is_computed_for_what_is_frozen():
  def flops(expression):
    _, step, state = build(expression)
    return jax.jit(step).lower(state, batch_of()).cost_analysis()['flops']

  assert flops('backbone') < 0.5 * flops('')
  # What lies above is trained, and its gradients go no further down.
  assert flops('stage0/(patch_embed|cls_token|blocks_0).*') < 0.85 * flops('')


@pytest.mark.parametrize('expression', ['', 'none'])
def test_by_default_nothing_is_frozen(expression):
  assert find_frozen(expression, [('head', 'kernel'), ('stage0', 'kernel')]) == Frozen()


@pytest.mark.parametrize(
  ('expression', 'message'),
  [
    ('stage9/.*', r"optimizer\.freeze='stage9/\.\*' is the name of none of the \d+ parameters"),
    ('stage0', 'is the name of none'),  # of a module, not of parameters
    ('.*', 'is the name of all'),
    ('stage[0', 'is no regular expression: unterminated character set'),
    ('backbone', "optimizer.freeze='backbone' without init_from"),
  ],
)
def test_what_cannot_be_frozen(expression, message, config, tmp_path):
  config.optimizer.freeze = expression
  with pytest.raises(UserError, match=message) as error:
    TrainingSetup(freeze(config), tmp_path / 'run')
  assert '\n' not in str(error.value) and not (tmp_path / 'run').exists()
