"""What every CvT keeps to, whatever its options; tiny ones, two stages deep."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from cvt_flax import CompactViT, CvT, create_model
from cvt_flax.models.options import resolve
from tests.models.torch_weights import assert_close, draw, drawn_variables, quick_jit, to_official

TINY = dict(
  num_classes=5,
  embed_dims=(8, 12),
  depths=(1, 1),
  num_heads=(1, 3),
  patch_sizes=(7, 3),
  patch_strides=(4, 2),
  patch_paddings=(2, 1),
  mlp_ratios=(2.0, 2.0),
  cls_token=(False, True),
  drop_path_rates=(),
)
CONFIGS = {
  'official': TINY | dict(depths=(1, 2)),
  'mean': TINY | dict(cls_token=(), pool='mean'),
  'seq': TINY | dict(cls_token=(), pool='seq'),
  'cls ignored': TINY
  | dict(cls_token=(True, True), pool='mean', final_norm=False, out_bias=False, mlp_bias=False),
  'dw': TINY | dict(projection='dw'),
  'avg': TINY | dict(projection='avg'),
  'linear': TINY | dict(projection='linear', cls_token=(), pool='mean'),
  'vit-pytorch': TINY
  | dict(
    cls_token=(),
    pool='mean',
    patch_paddings=(3, 1),
    head_dim=5,
    shared_kv=True,
    qkv_bias=False,
    attention_scale='head_dim',
    activation='gelu',
    final_norm=False,
  ),
}
SIZE = (37, 30)  # neither even nor square


def images(count=4):
  return draw('images', (count, *SIZE, 3))


@functools.cache
def variables(name):
  """Variables with none at its initial value: every one has its effect."""
  return drawn_variables(CvT(**CONFIGS[name]))


@functools.cache
def evaluated(name):
  """Returns (logits, maps, maps with train=True, logits of the first image alone)."""
  model = CvT(**CONFIGS[name])

  @quick_jit
  def evaluate(variables, x):
    maps = model.apply(variables, x, method='stage_maps')
    return model.apply(variables, x), maps, model.apply(variables, x[:1])

  return evaluate(variables(name), images())


@functools.cache
def trained(name):
  """Returns (gradients, logits, updated statistics) of a step with train=True."""
  model = CvT(**CONFIGS[name])

  def loss_fn(params, batch_stats):
    logits, updates = model.apply(
      {'params': params, 'batch_stats': batch_stats}, images(), train=True, mutable=['batch_stats']
    )
    # Not quadratic and not linear, so that no gradient vanishes by symmetry.
    return jnp.sum(jnp.sin(logits) * jnp.arange(1, 6)), (logits, updates)

  gradients, (logits, updates) = quick_jit(jax.grad(loss_fn, has_aux=True))(
    variables(name)['params'], variables(name)['batch_stats']
  )
  return gradients, logits, updates


every_config = pytest.mark.parametrize('name', CONFIGS)


@every_config
def test_logits(name):
  logits, _, _ = evaluated(name)
  assert (logits.shape, logits.dtype) == ((4, 5), jnp.float32)
  assert np.isfinite(logits).all()
  assert np.std(logits, axis=0).min() > 1e-3  # they depend on the images


@every_config
def test_stage_maps(name):
  _, maps, _ = evaluated(name)
  first = {2: (9, 7), 3: (10, 8)}[CONFIGS[name]['patch_paddings'][0]]
  assert [stage_map.shape for stage_map in maps] == [(4, *first, 8), (4, 5, 4, 12)]


@pytest.mark.parametrize('name', ['mean', 'seq', 'vit-pytorch'])
def test_the_classifier_reads_the_last_map(name):
  logits, maps, _ = evaluated(name)
  params = variables(name)['params']
  x = np.asarray(maps[-1], np.float64)
  if CONFIGS[name].get('final_norm', True):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * params['norm']['scale'] + params['norm']['bias']
  weights = np.full(x.shape[:3], 1 / np.prod(x.shape[1:3]))
  if name == 'seq':
    score = params['seq_pool']['score']
    weights = np.exp(x @ score['kernel'][:, 0] + score['bias'])
    weights /= weights.sum((1, 2), keepdims=True)
    assert weights.max() > 1.2 * weights.min()
  pooled = np.einsum('bhw,bhwc->bc', weights, x)
  expected = pooled @ params['head']['kernel'] + params['head']['bias']
  assert_close(logits, expected)


@every_config
def test_batch_mates_do_not_matter_in_evaluation(name):
  logits, _, alone = evaluated(name)
  assert alone.shape == (1, 5)
  np.testing.assert_allclose(logits[:1], alone, rtol=1e-5, atol=1e-6)


def without_gradient(model):
  """Names of the parameters that cannot change the logits in training.

  A constant added to all keys of a query leaves the softmax as it is: the bias of k always, and
  that of its batch norm where no class token goes round it; so does one added to all scores of a
  sequence pooling. What only the last map's queries pass
  does not reach a classifier that reads the class token; a class token that nothing reads reaches
  it through the attention, but not from the last block's queries.
  """
  names = set()
  stages = resolve(model)
  for s, o in enumerate(stages):
    for j in range(o.depth):
      attention = f'stage{s}.blocks.{j}.attn'
      if o.qkv_bias:
        names.add(f'{attention}.proj_k.bias')
      if o.projection == 'dw_bn' and not o.cls_token and not o.shared_kv:
        names.add(f'{attention}.conv_proj_k.bn.bias')
  if model.pool == 'seq':
    names.add('seq_pool.score.bias')
  if model.pool == 'cls' and stages[-1].projection in ('dw_bn', 'dw'):
    q = f'stage{len(stages) - 1}.blocks.{stages[-1].depth - 1}.attn.conv_proj_q'
    norm = {f'{q}.bn.weight', f'{q}.bn.bias'}
    names |= {f'{q}.conv.weight'} | (norm if model.projection == 'dw_bn' else {f'{q}.conv.bias'})
  return names


@every_config
def test_every_parameter_has_a_gradient(name):
  gradients = to_official({'params': trained(name)[0]})
  largest = max(np.abs(g).max() for g in gradients.values())
  vanishing = {key for key, g in gradients.items() if np.abs(g).max() <= 1e-5 * largest}
  assert vanishing == without_gradient(CvT(**CONFIGS[name]))


@every_config
def test_training_updates_every_statistic(name):
  before = traverse_util.flatten_dict(variables(name)['batch_stats'])
  after = traverse_util.flatten_dict(trained(name)[2].get('batch_stats', {}))
  assert before.keys() == after.keys()
  for path, value in after.items():
    assert value.dtype == jnp.float32
    assert np.all(value != before[path]), path


@pytest.mark.parametrize('name', ['official', 'vit-pytorch'])
def test_evaluation_updates_none(name):
  model = CvT(**CONFIGS[name])
  before = variables(name)
  _, after = quick_jit(functools.partial(model.apply, mutable=['batch_stats']))(before, images())
  jax.tree.map(np.testing.assert_array_equal, after['batch_stats'], before['batch_stats'])


@pytest.mark.parametrize('name', ['official', 'avg'])
def test_bfloat16(name):
  model = CvT(**CONFIGS[name], dtype=jnp.bfloat16)
  x = jnp.asarray(images(), jnp.bfloat16)
  initial = jax.eval_shape(model.init, jax.random.key(0), x)
  assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {jnp.dtype(jnp.float32)}

  def step(variables):
    def loss_fn(params):
      logits, updates = model.apply(
        {**variables, 'params': params}, x, train=True, mutable=['batch_stats']
      )
      return jnp.sum(logits), updates

    return jax.grad(loss_fn, has_aux=True)(variables['params'])

  results = jax.eval_shape(step, initial)
  assert {leaf.dtype for leaf in jax.tree.leaves(results)} == {jnp.dtype(jnp.float32)}

  @quick_jit
  def evaluate(variables):
    return model.apply(variables, x), model.apply(variables, x, method='stage_maps')

  logits, maps = evaluate(variables(name))
  assert logits.dtype == jnp.float32
  assert all(stage_map.dtype == jnp.bfloat16 for stage_map in maps)
  expected, _, _ = evaluated(name)
  assert_close(logits, expected, 0.03)


ONE_STAGE = dict(
  num_classes=5,
  embed_dims=(8,),
  depths=(2,),
  num_heads=(2,),
  patch_sizes=(3,),
  patch_strides=(2,),
  patch_paddings=(1,),
  mlp_ratios=(2.0,),
  cls_token=(True,),
  drop_path_rates=(),
)


@functools.cache
def one_stage(**rates):
  """Returns (logits, logits with train=True as a function of a seed) of a model with dropouts."""
  model = CvT(**ONE_STAGE | rates)
  variables = drawn_variables(CvT(**ONE_STAGE))
  x = draw('images', (3, 8, 8, 3))

  @quick_jit
  def train(variables, seed):
    rngs = {'dropout': jax.random.key(seed)}
    return model.apply(variables, x, train=True, mutable=['batch_stats'], rngs=rngs)[0]

  return quick_jit(model.apply)(variables, x), functools.partial(train, variables)


@pytest.mark.parametrize(
  'rates', ['drop_rates', 'embed_drop_rates', 'attn_drop_rates', 'drop_path_rates']
)
def test_every_dropout_acts_in_training_alone(rates):
  logits, _ = one_stage()
  same, train = one_stage(**{rates: (0.4,)})
  np.testing.assert_array_equal(same, logits)
  draws = np.stack([train(seed) for seed in range(8)])
  np.testing.assert_array_equal(draws[0], train(0))
  assert np.std(draws, axis=0).max() > 1e-2


def test_position_embedding_is_added_to_the_map_and_resized_for_another():
  model = CvT(**ONE_STAGE | {'pos_embed': (4,), 'depths': (1,)})
  variables = drawn_variables(model)
  table = variables['params']['stage0'].pop('pos_embed')
  assert table.shape == (1, 4, 4, ONE_STAGE['embed_dims'][0])

  def maps(model, variables, images):
    return model.apply(variables, images, method='stage_maps')[0]

  def with_table(table):
    stage = variables['params']['stage0'] | {'pos_embed': table}
    return variables | {'params': variables['params'] | {'stage0': stage}}

  # A table of one value everywhere is the same on a map of any size: another bias of the embedding.
  plain = CvT(**ONE_STAGE | {'depths': (1,)})
  constant = jnp.broadcast_to(table[:, :1, :1], table.shape)
  norm = variables['params']['stage0']['patch_embed']['norm']
  biased = jax.tree.map(lambda x: x, variables)
  biased['params']['stage0']['patch_embed']['norm']['bias'] = norm['bias'] + table[0, 0, 0]
  for size in ((8, 8), (12, 20)):
    x = draw('images', (2, *size, 3))
    same = maps(plain, biased, x)
    np.testing.assert_allclose(maps(model, with_table(constant), x), same, atol=2e-5)
    assert np.abs(maps(model, with_table(table), x) - same).max() > 1e-2


def test_without_dropouts_training_needs_no_key():
  model = CvT(**ONE_STAGE)
  shapes = jax.eval_shape(
    lambda x: model.init_with_output({'params': jax.random.key(0)}, x, train=True),
    draw('images', (3, 8, 8, 3)),
  )
  assert shapes[0].shape == (3, 5)


def test_no_classes_returns_the_features():
  model = CvT(**CONFIGS['mean'] | dict(num_classes=0))
  params = {k: v for k, v in variables('mean')['params'].items() if k != 'head'}
  features = quick_jit(model.apply)({**variables('mean'), 'params': params}, images())
  assert features.shape == (4, 12)
  head = variables('mean')['params']['head']
  logits, _, _ = evaluated('mean')
  np.testing.assert_allclose(features @ head['kernel'] + head['bias'], logits, atol=1e-5)


@functools.cache
def nano():
  return quick_jit(create_model('cvt-nano').init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def flat(tree):
  return {'/'.join(path): leaf for path, leaf in traverse_util.flatten_dict(tree).items()}


def test_initial_linear_layers():
  for name, value in flat(nano()['params']).items():
    if name.endswith('kernel') and value.ndim == 2:
      # Four standard errors. A distribution cut at two sigma would have a deviation of 0.0176.
      assert abs(np.std(value) / 0.02 - 1) < 4 / (2 * value.size) ** 0.5, name
      assert abs(np.mean(value)) < 4 * 0.02 / value.size**0.5, name
      assert np.abs(value).max() > 3 * 0.02, name
    elif name.endswith('bias') and not name.endswith(('patch_embed/proj/bias', 'head/bias')):
      np.testing.assert_array_equal(value, 0, name)
    elif name.endswith('scale'):
      np.testing.assert_array_equal(value, 1, name)


def test_initial_convolutions_and_head_are_pytorchs_uniform():
  bounds = {
    'stage0/patch_embed/proj': 27**-0.5,
    'stage1/patch_embed/proj': (9 * 32) ** -0.5,
    'stage2/patch_embed/proj': (9 * 64) ** -0.5,
    'head/bias': 96**-0.5,
    'conv/kernel': 1 / 3,
  }
  seen = 0
  for name, value in flat(nano()['params']).items():
    for part, bound in bounds.items():
      if part in name:
        seen += 1
        assert 0.8 * bound < np.abs(value).max() <= bound, name
        assert abs(np.std(value) / (bound / 3**0.5) - 1) < 2 / value.size**0.5, name
  assert seen == 3 * 2 + 1 + 3 * 4


def test_initial_class_token_and_statistics():
  token = nano()['params']['stage2']['cls_token']
  assert token.shape == (1, 1, 96)
  assert 0.7 * 0.02 < np.std(token) < 1.3 * 0.02
  for name, value in flat(nano()['batch_stats']).items():
    np.testing.assert_array_equal(value, {'mean': 0, 'var': 1}[name.rpartition('/')[2]], name)


def loss_of(model, train):
  def loss(params, batch_stats):
    variables = {'params': params, 'batch_stats': batch_stats}
    logits, _ = model.apply(variables, images(), train=train, mutable=['batch_stats'])
    return jnp.sum(jnp.sin(logits) * jnp.arange(1, 6))

  return loss


@pytest.mark.parametrize('train', [True, False])
def test_forward_over_reverse_is_reverse_over_reverse(train):
  """Hessian-vector products, in the two ways that JAX has."""
  model, drawn = CvT(**CONFIGS['official']), variables('official')
  params, stats = drawn['params'], drawn['batch_stats']
  direction = jax.tree.map(lambda x: draw('direction', x.shape), params)
  gradient = jax.grad(loss_of(model, train))

  @quick_jit
  def forward(params, stats):
    return jax.jvp(lambda p: gradient(p, stats), (params,), (direction,))[1]

  @quick_jit
  def reverse(params, stats):
    def along(p):
      return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient(p, stats), direction)))

    return jax.grad(along)(params)

  found, expected = forward(params, stats), reverse(params, stats)
  scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert jnp.abs(a - b).max() <= 1e-4 * scale


def test_parameters_are_float32_where_jax_has_64_bits():
  with jax.enable_x64(True):
    model = CvT(**CONFIGS['official'])
    made = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *SIZE, 3)))
    assert {x.dtype for x in jax.tree.leaves(made)} == {jnp.dtype('float32')}
    gradient = jax.eval_shape(jax.grad(loss_of(model, True)), made['params'], made['batch_stats'])
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype('float32')}


def test_parameters_may_be_made_bfloat16():
  model, drawn = CvT(**CONFIGS['official']), variables('official')
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), drawn['params'])
  gradient = jax.eval_shape(jax.grad(loss_of(model, True)), params, drawn['batch_stats'])
  assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype('bfloat16')}


@pytest.mark.parametrize('name', ['official', 'mean'])
def test_no_images(name):
  model, drawn = CvT(**CONFIGS[name]), variables(name)
  assert model.apply(drawn, images()[:0]).shape == (0, 5)
  with pytest.raises(ValueError, match='batch normalisation of no images'):
    model.apply(drawn, images()[:0], train=True, mutable=['batch_stats'])


@pytest.mark.parametrize('make', [lambda: CvT(**TINY), CompactViT])
@pytest.mark.parametrize('shape', [(32, 32, 3), (1, 32, 32, 1)])
def test_what_is_no_batch_of_colour_images(make, shape):
  with pytest.raises(ValueError, match=r'in_channels=3: images \[b h w 3\] are needed'):
    make().init(jax.random.key(0), jnp.zeros(shape))
