"""A folded model gives the logits of the whole one, with fewer parameters and no statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from cvt_flax import CvT, create_model, fold, load_pretrained, save_pretrained
from cvt_flax.models.options import resolve
from tests.models.test_cvt import CONFIGS, SIZE, TINY
from tests.models.torch_weights import assert_close, draw, drawn_variables, quick_jit

WITH_BATCH_NORM = {
  name: config for name, config in CONFIGS.items() if 'projection' not in config
} | {
  'no qkv bias': TINY | dict(qkv_bias=False),
  'shared, with a class token': TINY | dict(shared_kv=True, cls_token=(True, True)),
  'kernels of 5': TINY | dict(qkv_kernels=(5, 5), kv_strides=(1, 3)),
}


def images(count, size=SIZE):
  return draw('images', (count, *size, 3))


def evaluate(model, variables, x):
  return quick_jit(model.apply)(variables, x)


@pytest.mark.parametrize('count', [1, 3])
@pytest.mark.parametrize('name', WITH_BATCH_NORM)
def test_same_logits_and_maps(name, count):
  model = CvT(**WITH_BATCH_NORM[name], bn_group_size=2)
  variables = drawn_variables(model)
  folded, less = fold(model, variables)
  assert_close(evaluate(folded, less, images(count)), evaluate(model, variables, images(count)))
  whole, small = (
    quick_jit(lambda v, x, m=m: m.apply(v, x, method='stage_maps'))(v, images(count))
    for m, v in ((model, variables), (folded, less))
  )
  jax.tree.map(assert_close, small, whole)


def test_statistics_far_from_those_of_the_start():
  model = CvT(**TINY)
  variables = drawn_variables(model)
  statistics = jax.tree.map(lambda x: x * np.float32(1e3), variables['batch_stats'])
  variables = variables | {'batch_stats': statistics}
  folded, less = fold(model, variables)
  assert_close(evaluate(folded, less, images(2)), evaluate(model, variables, images(2)))


@pytest.mark.parametrize('name', WITH_BATCH_NORM)
def test_nothing_of_the_batch_norms_is_left(name):
  model = CvT(**WITH_BATCH_NORM[name], bn_group_size=2)
  folded, less = fold(model, drawn_variables(model))
  assert (folded.projection, folded.bn_group_size) == ('dw', 0)
  assert folded.clone(projection='dw_bn', bn_group_size=2) == model
  assert less.keys() == {'params'}
  expected = jax.eval_shape(folded.init, jax.random.key(0), images(1))
  assert jax.tree.map(jnp.shape, less) == jax.tree.map(jnp.shape, dict(expected))
  names = {'/'.join(path) for path in flatten_dict(less['params'])}
  assert not any('/bn/' in name for name in names)
  for s, options in enumerate(resolve(model)):
    bias = options.cls_token or not options.qkv_bias
    convolution = f'stage{s}/blocks_0/attn/conv_proj_q/conv/bias'
    assert (convolution in names) == bias


def test_a_model_without_batch_norms():
  for model in (CvT(**CONFIGS['avg']), create_model('mcvit', 5, image_size=16, width=8, heads=2)):
    variables = drawn_variables(model)
    folded, less = fold(model, variables)
    assert folded == model
    jax.tree.map(np.testing.assert_array_equal, less['params'], variables['params'])
    again, same = fold(folded, less)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, same, less)


@pytest.mark.parametrize(
  'model',
  [
    CvT(**TINY, dtype=jnp.bfloat16),
    CvT(**CONFIGS['seq'], dtype=jnp.bfloat16),
    CvT(**CONFIGS['linear'] | dict(pos_embed=(9, 5), dtype=jnp.bfloat16)),
    create_model('mcvit', 5, dtype=jnp.bfloat16),
    create_model('cct-7/3x1', 5, depth=1, dtype=jnp.bfloat16),
  ],
  ids=['cvt', 'seq', 'linear', 'mcvit', 'cct'],
)
def test_rounded_parameters_give_the_very_same_logits(model):
  """What is kept in bfloat16 is what the computation would round itself."""
  x = images(2, SIZE if isinstance(model, CvT) else (32, 32))
  folded, rounded = fold(model, drawn_variables(model))
  _, exact = fold(model.clone(dtype=jnp.float32), drawn_variables(model))
  np.testing.assert_array_equal(evaluate(folded, rounded, x), evaluate(folded, exact, x))
  kinds = {x.dtype for x in jax.tree.leaves(rounded)}
  assert kinds == {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}
  assert rounded['params']['head']['kernel'].dtype == jnp.float32
  sizes = [sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (rounded, exact)]
  assert sizes[0] < 0.7 * sizes[1]


def test_bfloat16_stays_near_float32():
  model = CvT(**TINY)
  variables = drawn_variables(model)
  folded, less = fold(model.clone(dtype=jnp.bfloat16), variables)
  exact = evaluate(model, variables, images(3))
  assert_close(evaluate(folded, less, images(3)), exact, 3e-2)


def test_variables_of_another_model():
  variables = drawn_variables(CvT(**TINY))
  with pytest.raises(ValueError, match='no stage0/blocks_0/attn/conv_proj_q/bn/mean'):
    fold(CvT(**TINY), {'params': variables['params']})
  with pytest.raises(ValueError, match='no stage1/blocks_1/attn/conv_proj_q/bn/scale'):
    fold(CvT(**TINY | dict(depths=(1, 2))), variables)


def test_a_folded_model_is_saved_and_read(tmp_path):
  folded, less = fold(CvT(**TINY), drawn_variables(CvT(**TINY)))
  save_pretrained(tmp_path / 'w', folded, less)
  model, variables = load_pretrained(tmp_path / 'w')
  assert model == folded
  jax.tree.map(np.testing.assert_array_equal, variables['params'], less['params'])
