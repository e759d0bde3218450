"""Every named model: its parameter counts, its costs, its shapes."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from cvt_flax import create_model, list_models
from cvt_flax.models.geometry import multiply_adds, stage_geometry
from cvt_flax.models.zoo import COMPACT_VARIANTS, VARIANTS

# Trainable parameters with 1000 classes, those of each stage, and the batch norms' statistics.
# The official three follow from the definitions of the authors' model and agree with their
# table (20M, 32M, 277M): a norm 2 C and a head 1000 (C + 1) come on top of the stages.
COUNTS = {
  'cvt-13': (19_997_480, (61_696, 1_013_568, 18_536_448), 25_728),
  'cvt-21': (31_622_696, (61_696, 1_915_968, 29_259_264), 41_856),
  'cvt-w24': (277_196_392, (931_200, 15_555_840, 259_682_304), 134_400),
  'cvt-13-small-images': (19_989_800, (54_016, 1_013_568, 18_536_448), 25_728),
  'cvt-21-small-images': (31_615_016, (54_016, 1_915_968, 29_259_264), 41_856),
  'cvt-small': (5_077_608, (54_016, 479_104, 4_286_976), 9_600),
  'cvt-nano': (468_328, (14_720, 70_720, 285_696), 1_728),
}
# (model, classes) -> parameters: CIFAR-10, CIFAR-100, Oxford-IIIT Pets, Flowers-102.
OTHER_HEADS = {
  ('cvt-13', 10): 19_616_330,
  ('cvt-21', 10): 31_241_546,
  ('cvt-13', 100): 19_650_980,
  ('cvt-21', 100): 31_276_196,
  ('cvt-13', 37): 19_626_725,
  ('cvt-21', 37): 31_251_941,
  ('cvt-13', 102): 19_651_750,
  ('cvt-21', 102): 31_276_966,
}

# Parameters of a CompactViT with 10 and with 100 classes. Those of cct are counted in SHI-Labs'
# PyTorch modules cct_2_3x2_32 and cct_7_3x1_32; those of c-ViT and mc-ViT in vit.py of the two
# repositories that have them.
COMPACT_COUNTS = {
  'cvit': (119_098, 123_508),
  'mcvit': (119_051, 123_461),
  'cct-2/3x2': (283_723, 295_333),
  'cct-7/3x1': (3_760_139, 3_783_269),
}

# Multiply-adds of one image, in units of 1e9: counted from the definitions, and as published. At
# 224 that is table 2 of the paper (the authors' README has 4.5 and 7.1, cut to one decimal), at
# 384 both.
GIGA_MULTIPLY_ADDS = {
  ('cvt-13', 224): (4.566, 4.53),
  ('cvt-21', 224): (7.178, 7.13),
  ('cvt-w24', 224): (60.917, 60.86),
  ('cvt-13', 384): (16.269, 16.3),
  ('cvt-21', 384): (24.849, 24.9),
  ('cvt-w24', 384): (194.222, 193.2),
}

FOR_SMALL_IMAGES = ['cvt-13-small-images', 'cvt-21-small-images', 'cvt-small', 'cvt-nano']
ODD = (70, 45)


@functools.cache
def shapes(name, num_classes=1000):
  """The shapes of a model's variables; nothing is computed."""
  model = create_model(name, num_classes)
  return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def size(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_every_variant_has_its_count():
  assert [*COUNTS, *COMPACT_COUNTS] == list_models(), 'a new variant needs its counts'
  assert list(COMPACT_COUNTS) == list(COMPACT_VARIANTS)


@pytest.mark.parametrize('name', COMPACT_COUNTS)
def test_counts_of_compact_models(name):
  assert tuple(size(shapes(name, classes)) for classes in (10, 100)) == COMPACT_COUNTS[name]


@pytest.mark.parametrize('name', VARIANTS)
def test_counts(name):
  total, stages, statistics = COUNTS[name]
  params = shapes(name)['params']
  assert size(params) == total
  assert tuple(size(params[f'stage{s}']) for s in range(len(stages))) == stages
  assert size(shapes(name)['batch_stats']) == statistics
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes(name))} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(('name', 'num_classes'), OTHER_HEADS)
def test_counts_with_other_heads(name, num_classes):
  assert size(shapes(name, num_classes)['params']) == OTHER_HEADS[name, num_classes]


@pytest.mark.parametrize(
  ('name', 'buffers'), [('cvt-13', 25_767), ('cvt-21', 41_919), ('cvt-w24', 134_472)]
)
def test_statistics_are_pytorchs_buffers(name, buffers):
  # PyTorch also counts batches, one number for each of the three batch norms of a block.
  blocks = sum(create_model(name).depths)
  assert size(shapes(name)['batch_stats']) == buffers - 3 * blocks


def test_no_classes_is_no_head():
  params = shapes('cvt-13', 0)['params']
  assert 'head' not in params
  assert size(params) == COUNTS['cvt-13'][0] - 1000 * 385


@pytest.mark.parametrize(('name', 'pixels'), GIGA_MULTIPLY_ADDS)
def test_multiply_adds(name, pixels):
  exact, published = GIGA_MULTIPLY_ADDS[name, pixels]
  cost = multiply_adds(create_model(name), pixels, pixels) / 1e9
  assert round(cost, 3) == exact
  assert cost == pytest.approx(published, rel=0.01)


def test_multiply_adds_with_a_key_for_every_pixel():
  # The paper's ablation of the kv stride (table 7): 6.55; counted from the definitions: 6.643.
  assert multiply_adds(create_model('cvt-13', kv_strides=(1, 1, 1)), 224, 224) == pytest.approx(
    6.643e9, rel=1e-3
  )


def test_sequence_pooling_costs_a_score_and_a_weight_of_every_pixel():
  mean, seq = (
    multiply_adds(create_model('cvt-13', cls_token=(), pool=pool), 224, 224)
    for pool in ('mean', 'seq')
  )
  assert seq - mean == 2 * 14 * 14 * 384
  model = create_model('cvt-13', 10, pool='seq')
  variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  assert size(variables['params']) == OTHER_HEADS['cvt-13', 10] + 384 + 1


def test_official_tokens_at_224_and_384():
  def tokens(pixels):
    stages = stage_geometry(create_model('cvt-13'), pixels, pixels)
    return [(stage.height, stage.width, stage.tokens, stage.keys) for stage in stages]

  assert tokens(224) == [(56, 56, 3136, 784), (28, 28, 784, 196), (14, 14, 197, 50)]
  assert tokens(384) == [(96, 96, 9216, 2304), (48, 48, 2304, 576), (24, 24, 577, 145)]


@pytest.mark.parametrize('name', FOR_SMALL_IMAGES)
def test_small_images_keep_sixteen_keys(name):
  last = stage_geometry(create_model(name), 32, 32)[-1]
  assert last.keys - 1 >= 16  # beside the class token


def pytorch_size(n, kernel, stride, padding):
  """The output size that torch.nn.Conv2d documents."""
  return math.floor((n + 2 * padding - (kernel - 1) - 1) / stride + 1)


@pytest.mark.parametrize('name', VARIANTS)
def test_shapes(name):
  model = create_model(name, num_classes=7, depths=(1, 1, 1))  # depths do not change them
  images = jnp.zeros((2, *ODD, 3))

  def apply(key, images):
    logits, variables = model.init_with_output(key, images)
    return logits, model.apply(variables, images, method='stage_maps')

  logits, maps = jax.eval_shape(apply, jax.random.key(0), images)
  assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)
  size, expected = ODD, []
  for s, channels in enumerate(model.embed_dims):
    window = model.patch_sizes[s], model.patch_strides[s], model.patch_paddings[s]
    size = tuple(pytorch_size(n, *window) for n in size)
    expected.append((2, *size, channels))
  assert [stage_map.shape for stage_map in maps] == expected
  geometry = stage_geometry(model, *ODD)
  assert [(stage.height, stage.width) for stage in geometry] == [shape[1:3] for shape in expected]


@pytest.mark.parametrize('name', list_models())
def test_variants_are_linen_modules_that_hash_and_compare(name):
  assert isinstance(create_model(name), nn.Module)
  assert create_model(name) == create_model(name)
  assert hash(create_model(name)) == hash(create_model(name))


def test_attributes_replace_the_variants():
  model = create_model('cvt-21', 10, depths=(1, 1, 1), activation='gelu')
  assert (model.num_classes, model.depths, model.activation) == (10, (1, 1, 1), 'gelu')
  assert create_model('cvt-21').depths == (1, 4, 16)


@pytest.mark.parametrize(
  ('name', 'attributes', 'message'),
  [
    ('cvt13', {}, r"model 'cvt13': one of cvt-13, .* is needed, did you mean 'cvt-13'\?"),
    ('resnet', {}, r"model 'resnet': one of "),
    ('cvt-13', {'depth': (1, 1, 1)}, r"no attribute 'depth', did you mean 'depths'\?"),
    ('cvt-13', {'parent': None}, "no attribute 'parent'"),
    ('cvt-13', {'width': 48}, "cvt-13: CvT has no attribute 'width'"),
    ('mcvit', {'depths': (1,)}, r"mcvit: CompactViT has no .* 'depths', did you mean 'depth'\?"),
    ('mcvit', {'num_heads': 4}, r"no attribute 'num_heads', did you mean 'heads'\?"),
    ('cct-7-3x1', {}, r"did you mean 'cct-7/3x1'\?"),
  ],
)
def test_unknown_names(name, attributes, message):
  with pytest.raises(ValueError, match=message):
    create_model(name, **attributes)
