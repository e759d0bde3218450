"""What a CvT refuses, and what it warns of."""

import warnings

import jax
import jax.numpy as jnp
import pytest

from cvt_flax import CvT, create_model
from cvt_flax.models.cvt import ConvProjection
from cvt_flax.models.options import resolve
from cvt_flax.models.zoo import VARIANTS

PER_STAGE = {
  'depths': 1,
  'num_heads': 1,
  'patch_sizes': 3,
  'patch_strides': 1,
  'patch_paddings': 1,
  'mlp_ratios': 4.0,
  'cls_token': True,
  'pos_embed': 8,
  'qkv_kernels': 3,
  'q_strides': 1,
  'kv_strides': 2,
  'drop_rates': 0.0,
  'embed_drop_rates': 0.0,
  'attn_drop_rates': 0.0,
  'drop_path_rates': 0.0,
  'remat': '',
}
LINEAR = dict(projection='linear')
AVG = dict(projection='avg')

# What is wrong -> what the message must say: the attribute first of all.
REFUSED = [
  (dict(num_heads=(1, 3, 5)), r'num_heads=\(1, 3, 5\): 5 heads do not divide .* 384 .* stage 2'),
  (dict(num_heads=(1, 3, 0)), r'num_heads=\(1, 3, 0\): at least 1'),
  (dict(embed_dims=()), r'embed_dims: at least one stage'),
  (dict(embed_dims=(64, 192)), r'depths has 3 entries, embed_dims has 2'),
  (dict(embed_dims=(0, 192, 384)), r'embed_dims=\(0, 192, 384\): at least 1'),
  (dict(depths=(1, 0, 10)), r'depths=\(1, 0, 10\): at least 1'),
  (dict(depths=13), r'depths=13: one entry for each of the 3 stages'),
  (dict(patch_sizes=(7, 0, 3)), r'patch_sizes=\(7, 0, 3\): at least 1'),
  (dict(patch_strides=(4, 0, 2)), r'patch_strides=\(4, 0, 2\): at least 1'),
  (dict(patch_paddings=(2, -1, 1)), r'patch_paddings=\(2, -1, 1\): at least 0'),
  (dict(mlp_ratios=(4.0, 0.0, 4.0)), r'mlp_ratios=\(4\.0, 0\.0, 4\.0\): stage 1'),
  (dict(kv_strides=(2, 2, 0)), r'kv_strides=\(2, 2, 0\): at least 1'),
  (dict(qkv_kernels=(3, 2, 3)), r'qkv_kernels=\(3, 2, 3\): .*odd'),
  (dict(q_strides=(1, 1, 2)), r'q_strides=\(1, 1, 2\): only 1 fits'),
  (dict(drop_rates=(0.0, 0.0, 1.0)), r'drop_rates=\(0\.0, 0\.0, 1\.0\): rates from 0'),
  (dict(attn_drop_rates=(-0.1, 0.0, 0.0)), r'attn_drop_rates=\(-0\.1, .*: rates from 0'),
  (dict(drop_path_rates=(0.0, 0.0, 1.5)), r'drop_path_rates=\(0\.0, 0\.0, 1\.5\): rates from 0'),
  (dict(projection='dw-bn'), r"projection='dw-bn': one of dw_bn, .*did you mean 'dw_bn'\?"),
  (dict(projection='conv'), r"projection='conv': one of dw_bn, dw, avg, linear"),
  (dict(activation='quickgelu'), r"activation='quickgelu': .*did you mean 'quick_gelu'\?"),
  (dict(attention_scale='dim'), r"attention_scale='dim': one of embed_dim, head_dim"),
  (dict(pool='max'), r"pool='max': one of cls, seq, mean"),
  (dict(cls_token=()), r"pool='cls' reads the last stage's class token, .*pool='mean'"),
  (dict(cls_token=(True, True, False)), r"pool='cls' reads the last stage's class token"),
  (dict(remat=('', 'dots', '')), r"remat=\('', 'dots', ''\): 'dots' is none of '', 'dots_s"),
  (dict(pos_embed=(8, -1, 0)), r'pos_embed=\(8, -1, 0\): at least 0'),
  (dict(num_classes=-1), r'num_classes=-1: at least 0'),
  (dict(in_channels=0), r'in_channels=0: at least 1'),
  (dict(embed_drop_rates=(1.0, 0.0, 0.0)), r'embed_drop_rates=\(1\.0, .*: rates from 0'),
  (dict(head_dim=-64), r'head_dim=-64: at least 0'),
  (dict(bn_group_size=-1), r'bn_group_size=-1: at least 0'),
  (LINEAR | dict(qkv_kernels=(3, 3, 3)), r"qkv_kernels=\(3, 3, 3\): projection='linear' has none"),
  (LINEAR | dict(kv_strides=(2, 2, 2)), r"kv_strides=\(2, 2, 2\): projection='linear' has none"),
  (LINEAR | dict(q_strides=(1, 1, 1)), r"q_strides=\(1, 1, 1\): projection='linear' has none"),
  (LINEAR | dict(shared_kv=True), r"shared_kv=True: projection='linear' has none"),
  (LINEAR | dict(bn_group_size=8), r"bn_group_size=8: projection='linear' has none"),
  (AVG | dict(q_strides=(1, 1, 1)), r"q_strides=\(1, 1, 1\): projection='avg' has none"),
  (AVG | dict(shared_kv=True), r"shared_kv=True: projection='avg' has none"),
  (AVG | dict(bn_group_size=8), r"bn_group_size=8: projection='avg' has none"),
]


@pytest.mark.parametrize(('attributes', 'message'), REFUSED, ids=[r[1][:40] for r in REFUSED])
def test_refused(attributes, message):
  with pytest.raises(ValueError, match=message):
    create_model('cvt-13', **attributes)


@pytest.mark.parametrize('name', PER_STAGE)
@pytest.mark.parametrize('length', [1, 2, 4])
def test_other_lengths(name, length):
  values = (PER_STAGE[name],) * length
  with pytest.raises(ValueError, match=f'{name} has {length} entries, embed_dims has 3'):
    CvT(**{name: values})


@pytest.mark.parametrize('name', VARIANTS)
def test_every_variant_refuses_heads_that_do_not_divide(name):
  with pytest.raises(ValueError, match='num_heads'):
    create_model(name, num_heads=(7, 7, 7))


def test_a_head_dim_of_its_own_needs_no_division():
  model = CvT(num_heads=(5, 5, 5), head_dim=8)
  assert [(o.head_dim, o.scale) for o in resolve(model)] == [
    (8, 64**-0.5),
    (8, 192**-0.5),
    (8, 384**-0.5),
  ]


def test_attention_scale():
  assert [o.scale for o in resolve(CvT())] == [64**-0.5, 192**-0.5, 384**-0.5]
  assert [o.scale for o in resolve(CvT(attention_scale='head_dim'))] == [64**-0.5] * 3


def test_defaults_of_empty_tuples():
  stages = resolve(CvT(drop_path_rates=(), cls_token=(), pool='mean'))
  assert [(o.qkv_kernel, o.q_stride, o.kv_stride) for o in stages] == [(3, 1, 2)] * 3
  assert [(o.drop_rate, o.attn_drop_rate, o.drop_path_rate) for o in stages] == [(0, 0, 0)] * 3
  assert not any(o.cls_token for o in stages)


def test_dropout_after_the_embedding_is_that_of_the_stage_unless_given():
  rates = (0.1, 0.2, 0.3)
  assert [o.embed_drop_rate for o in resolve(CvT(drop_rates=rates))] == [*rates]
  stages = resolve(CvT(drop_rates=rates, embed_drop_rates=(0.0, 0.0, 0.5)))
  assert [o.embed_drop_rate for o in stages] == [0.0, 0.0, 0.5]
  assert [o.drop_rate for o in stages] == [*rates]


@pytest.mark.parametrize(
  ('name', 'last'), [('cvt-13', 0.1 / 9), ('cvt-21', 0.1 / 15), ('cvt-w24', 0.3 / 19)]
)
def test_drop_path_rises_within_every_stage(name, last):
  *stages, stage = resolve(create_model(name))
  assert all(rate == 0 for o in stages for rate in o.drop_path_schedule())
  assert stage.drop_path_schedule() == pytest.approx([j * last for j in range(stage.depth)])


def test_drop_path_of_a_stage_with_one_block_is_zero():
  options = resolve(CvT(depths=(1, 1, 2), drop_path_rates=(0.5, 0.0, 0.2)))
  assert [o.drop_path_schedule() for o in options] == [[0], [0], [0, 0.2]]


def trace(model, height, width):
  """Runs the model's Python, without compiling or computing anything."""
  return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, height, width, 3)))


def test_single_key_warns_with_the_remedy():
  model = create_model('cvt-13', cls_token=(), pool='mean', depths=(1, 1, 1))
  with pytest.warns(UserWarning, match='2x2 map with kv stride 2 .* single key') as record:
    trace(model, 32, 32)
  assert all('kv stride 1' in str(w.message) for w in record)
  assert all('smaller patch stride' in str(w.message) for w in record)


@pytest.mark.parametrize(
  'attributes',
  [
    dict(),  # the class token is a second key
    dict(cls_token=(), pool='mean', kv_strides=(2, 2, 1)),
    dict(cls_token=(), pool='mean', patch_strides=(4, 2, 1)),
  ],
)
def test_no_warning_where_there_are_more_keys(attributes):
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    trace(create_model('cvt-13', depths=(1, 1, 1), **attributes), 32, 32)


def test_images_that_are_too_small():
  with pytest.raises(ValueError, match='images are too small.*0x9'):
    trace(create_model('cvt-13', patch_paddings=(0, 0, 0)), 4, 40)


@pytest.mark.parametrize('height_width', [(7, 4), (8, 8), (1, 5), (2, 3)])
@pytest.mark.parametrize('kernel', [1, 3, 5])
@pytest.mark.parametrize('stride', [1, 2, 3])
@pytest.mark.parametrize('projection', ['dw_bn', 'avg'])
def test_key_map_size(projection, stride, kernel, height_width):
  model = CvT(projection=projection, kv_strides=(stride,) * 3, qkv_kernels=(kernel,) * 3)
  options = resolve(model)[0]
  module = ConvProjection(options, projection, stride, jnp.float32)

  def project(key, x):
    return module.init_with_output(key, x, jnp.zeros((4, 6)), jnp.zeros(6), False)[0]

  result = jax.eval_shape(project, jax.random.key(0), jnp.zeros((1, *height_width, 4)))
  assert result.shape == (1, *options.key_map_size(*height_width), 6)
