"""Two classes by one logit, and classes that count more than others."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight

from cvt_flax import convert_weights, load_pretrained, predict_images
from cvt_flax.errors import UserError
from cvt_flax.ops.pixels import normalize_pixels
from cvt_flax.training import loop, setup
from cvt_flax.training.config import AugmentConfig, OptimizerConfig, freeze
from cvt_flax.training.optimizer import make_optimizer
from cvt_flax.training.step import init_state, make_train_step
from tests.training.test_step import CLASSES, MEAN, STD, Probe, batch_of


def first_loss(model, batch, augment, class_weights):
  """Returns (the logits of a Probe, the loss of its first step, its share of hits)."""
  tx = make_optimizer(OptimizerConfig(name='sgd', weight_decay=0.0), lambda step: 0.1)
  step = make_train_step(
    model,
    tx,
    lambda step: 0.1,
    seed=0,
    mean=MEAN,
    std=STD,
    augment=augment,
    ema_decay=0.0,
    accumulate_steps=1,
    class_weights=class_weights,
  )
  state = init_state(model, tx, 0, 8, False)
  images = normalize_pixels(batch['image'], MEAN, STD)
  logits, _ = model.apply(
    {'params': state.params, 'batch_stats': state.batch_stats},
    images,
    train=True,
    mutable=['batch_stats'],
  )
  after, loss = jax.jit(step)(state, batch)
  return logits, float(loss), float(after.window.compute()['top1'])


def test_the_loss_of_one_logit_is_the_binary_cross_entropy():
  batch = batch_of()
  batch |= {'label': batch['label'] % 2, 'mask': jnp.ones(16).at[3].set(0)}
  logits, loss, top1 = first_loss(
    Probe(num_classes=1), batch, AugmentConfig(label_smoothing=0.2), ()
  )
  assert logits.shape == (16, 1)
  each = optax.sigmoid_binary_cross_entropy(logits[:, 0], 0.1 + 0.8 * batch['label'])
  assert loss == pytest.approx(float(jnp.sum(each * batch['mask']) / 16), rel=1e-6)
  hits = ((jax.nn.sigmoid(logits[:, 0]) > 0.5) == (batch['label'] == 1)) * batch['mask']
  assert top1 == pytest.approx(float(hits.mean())) and 0 < top1 < 1


def test_classes_count_as_their_weights_say():
  weights = (0.1, 5.0, 0.0, 3.0, 2.0)
  assert len(weights) == CLASSES
  batch = batch_of()
  logits, loss, _ = first_loss(Probe(), batch, AugmentConfig(), weights)
  each = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
  counts = np.array(weights)[batch['label']]
  assert loss == pytest.approx(float(jnp.mean(each * counts)), rel=1e-6)
  assert loss != pytest.approx(float(jnp.mean(each)), rel=1e-2)


def test_a_run_with_one_logit(config, tmp_path, capsys):
  """It learns, is evaluated and predicts both classes; PyTorch's layouts have no place for it."""
  config.loss, config.class_weights = 'binary', (1.0, 1.5)
  result = loop.run(config, tmp_path / 'run')
  assert result['test/top1'] >= 0.9 and result['test/auc'] > 0.9
  assert result['test/top1'] > result['test/majority'] and 0 not in result['test/predicted']
  again = loop.run(config, tmp_path / 'run', mode='eval')
  assert again['test/top1'] == result['test/top1']

  convert_weights(tmp_path / 'run', tmp_path / 'flax')
  model, variables = load_pretrained(tmp_path / 'flax')
  assert variables['params']['head']['kernel'].shape == (8, 1)
  for brightness, name in ((30, '0'), (250, '1')):
    path = tmp_path / f'{brightness}.png'
    Image.new('RGB', (8, 8), (brightness,) * 3).save(path)
    (found,) = predict_images(tmp_path / 'flax', [path])
    pixels = np.full((1, 8, 8, 3), brightness, np.uint8)
    z = model.apply(variables, normalize_pixels(pixels, config.mean, config.std))[0, 0]
    positive = found.probabilities[found.names.index('1')]
    assert positive == pytest.approx(float(jax.nn.sigmoid(z)), rel=1e-5)
    assert found.names[0] == name and sum(found.probabilities) == pytest.approx(1)
  with pytest.raises(UserError, match="'official' has a logit for each class, and this model one"):
    convert_weights(tmp_path / 'flax', tmp_path / 'official.pth')

  config.init_from, config.loss, config.class_weights = str(tmp_path / 'flax'), 'softmax', ()
  with pytest.raises(UserError, match='has a head of 1 logits, this config one of 2'):
    loop.run(config, tmp_path / 'nothing', mode='eval')
  with pytest.raises(UserError, match="loss 'binary' -> 'softmax'"):
    loop.run(config, tmp_path / 'run')


@pytest.mark.parametrize(
  ('source', 'change', 'message'),
  [
    ('digits', {'loss': 'binary'}, "loss='binary': digits has 10 classes, and it is for two"),
    (None, {'class_weights': (1.0, 2.0, 3.0)}, 'one for each of the 2 classes of npz:'),
  ],
)
def test_a_loss_that_does_not_fit_the_classes(source, change, message, config, tmp_path):
  config.source = source or config.source
  config.update(change)
  with pytest.raises(UserError, match=message):
    loop.run(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_balanced_classes(config, tmp_path, monkeypatch, capsys):
  labels, given = np.repeat([0, 1, 2], [90, 25, 10]), []
  pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8, 3), np.uint8)
  np.savez(tmp_path / 'uneven.npz', x_train=pixels, y_train=labels)
  config.source, config.balance_classes = f'npz:{tmp_path}/uneven.npz', True
  make_program = setup.make_program

  def kept(config, *arguments, **options):
    given.append(config.class_weights)
    return make_program(config, *arguments, **options)

  monkeypatch.setattr(setup, 'make_program', kept)
  training = setup.TrainingSetup(freeze(config), tmp_path / 'run')
  there = training.dataset.train.labels
  expected = compute_class_weight('balanced', classes=np.arange(3), y=there)
  np.testing.assert_allclose(given, [expected])
  assert np.mean(expected[there]) == pytest.approx(1)
  words = f'count from {expected[0]:.3g} (0) to {expected[2]:.3g} (2)\n'
  assert words in capsys.readouterr().out
