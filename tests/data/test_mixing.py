"""Mixup, CutMix, label smoothing and random erasing: exact targets, and timm's distributions."""

import collections
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from cvt_flax.data import mixing

KEY = jax.random.key(11)
mix = jax.jit(
  mixing.mix,
  static_argnames=('group_size', 'mixup_alpha', 'cutmix_alpha', 'prob', 'switch_prob'),
)
random_erase = jax.jit(mixing.random_erase, static_argnames=('prob', 'tries'))


def distinct_images(b, h, w):
  """Returns images [b, h, w, b], image i all 1 in channel i: the mixture can be read off."""
  return jnp.broadcast_to(jnp.eye(b)[:, None, None], (b, h, w, b))


def pairs(n, h, w):
  """Returns 2 n images [2 n, h, w, 1], 0 and 1 in turn: mixed in twos they show what was done."""
  return jnp.broadcast_to((jnp.arange(2 * n) % 2.0)[:, None, None, None], (2 * n, h, w, 1))


def timm_cutmix_area(random, h, w, share):
  """Returns how many pixels timm's CutMix replaces (timm/data/mixup.py, rand_bbox)."""
  ratio = math.sqrt(1 - share)
  half_y, half_x = int(h * ratio) // 2, int(w * ratio) // 2
  y, x = random.integers(h), random.integers(w)
  box_h = min(y + half_y, h) - max(y - half_y, 0)
  box_w = min(x + half_x, w) - max(x - half_x, 0)
  return box_h * box_w


def timm_erased_box(random, h, w, tries):
  """Returns height and width of timm's box (timm/data/random_erasing.py), None for no box."""
  for _ in range(tries):
    area = random.uniform(0.02, 1 / 3) * h * w
    aspect = math.exp(random.uniform(math.log(0.3), -math.log(0.3)))
    height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if height < h and width < w:
      return height, width
  return None


# ----- Targets ---------------------------------------------------------------------------------


def test_smoothed_targets_are_timms():
  targets = mixing.smoothed_targets(jnp.array([3, 0]), 1000, 0.1)
  assert targets.dtype == jnp.float32
  expected = np.full((2, 1000), 1e-4, np.float32)
  expected[0, 3] = expected[1, 0] = 0.9001
  np.testing.assert_allclose(targets, expected, rtol=1e-6)
  np.testing.assert_array_equal(mixing.smoothed_targets(jnp.array([1]), 3, 0.0), [[0, 1, 0]])


# ----- Mixup and CutMix ------------------------------------------------------------------------


@pytest.mark.parametrize('alphas', [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0)], ids=str)
@pytest.mark.parametrize('group_size', [0, 2, 3, 4])
def test_targets_are_the_true_shares_of_the_images(group_size, alphas):
  b, h, w = 12, 9, 14
  mixup_alpha, cutmix_alpha = alphas
  images, targets = mix(
    KEY,
    distinct_images(b, h, w),
    jnp.eye(b),
    group_size=group_size,
    mixup_alpha=mixup_alpha,
    cutmix_alpha=cutmix_alpha,
  )
  np.testing.assert_allclose(images.mean((1, 2)), targets, atol=1e-6)
  np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
  size = group_size or b
  own = np.arange(b)
  partner = own // size * size + size - 1 - own % size
  kept = np.asarray(images)[own, :, :, own]
  partners_part = np.asarray(images)[own, :, :, partner]
  alone = own == partner
  np.testing.assert_allclose(partners_part[alone], 1, atol=1e-6)
  np.testing.assert_allclose(kept[~alone] + partners_part[~alone], 1, atol=1e-6)
  for group in range(b // size):  # one lambda, one choice and one box for all
    members = kept[group * size : (group + 1) * size][~alone[group * size : (group + 1) * size]]
    np.testing.assert_allclose(members, np.broadcast_to(members[0], members.shape), atol=1e-6)
    is_cutmix = np.isin(members, (0, 1)).all()
    if 0 in alphas:
      assert is_cutmix == (mixup_alpha == 0)
    if not is_cutmix:
      assert np.ptp(members) < 1e-6
  if size < b:
    assert len(np.unique(np.round(np.asarray(targets)[own, own][~alone], 5))) > 1


@pytest.mark.parametrize('alpha', [0.2, 0.8, 1.0, 8.0])
def test_mixup_draws_lambda_from_its_beta_distribution(alpha):
  n = 4000
  images, _ = mix(
    KEY,
    pairs(n, 1, 1),
    jnp.zeros((2 * n, 1)),
    group_size=2,
    mixup_alpha=alpha,
    cutmix_alpha=0.0,
  )
  share = 1 - np.asarray(images)[::2, 0, 0, 0]  # of the image that is 0
  assert stats.kstest(share, stats.beta(alpha, alpha).cdf).pvalue > 0.01
  assert abs(share.var() * 4 * (2 * alpha + 1) - 1) < 0.06


@pytest.mark.parametrize(('h', 'w', 'alpha'), [(32, 32, 1.0), (7, 20, 0.5)])
def test_cutmix_boxes_are_distributed_as_timms(h, w, alpha):
  n = 3000
  images, targets = mix(
    KEY,
    pairs(n, h, w),
    jnp.tile(jnp.eye(2), (n, 1)),
    group_size=2,
    mixup_alpha=0.0,
    cutmix_alpha=alpha,
  )
  replaced = np.asarray(images)[::2, :, :, 0]
  assert set(np.unique(replaced)) == {0, 1}
  rows, columns = replaced.any(2), replaced.any(1)
  np.testing.assert_array_equal(replaced, rows[:, :, None] & columns[:, None])
  for sides in (rows, columns):  # without gaps
    assert np.all(np.abs(np.diff(sides.astype(int), axis=1)).sum(1) <= 2)
  area = replaced.sum((1, 2))
  np.testing.assert_allclose(targets[::2, 1], area / (h * w), atol=1e-6)
  random = np.random.default_rng(0)
  expected = [timm_cutmix_area(random, h, w, random.beta(alpha, alpha)) for _ in range(20000)]
  assert stats.ks_2samp(area, expected).pvalue > 0.01
  # All pixels are alike as centres, so the boxes lie evenly about the middle of all but the last
  # row and column: timm's box reaches from centre - half to centre + half - 1.
  for covered in (rows.mean(0)[:-1], columns.mean(0)[:-1]):
    np.testing.assert_allclose(covered, covered[::-1], atol=0.04)


def test_mixing_and_switching_have_their_probabilities():
  n = 2000
  original = pairs(n, 16, 16)
  images, targets = mix(
    KEY,
    original,
    jnp.tile(jnp.eye(2), (n, 1)),
    group_size=2,
    mixup_alpha=1.0,
    cutmix_alpha=1.0,
    prob=0.6,
    switch_prob=0.3,
  )
  first = np.asarray(images)[::2]
  untouched = (first == 0).all((1, 2, 3))
  cutmix = np.isin(first, (0, 1)).all((1, 2, 3)) & ~untouched
  np.testing.assert_array_equal(targets[::2][untouched], np.tile([1.0, 0.0], (untouched.sum(), 1)))
  invisible = 2**2 / 16**2  # of CutMix's boxes: lower and narrower than two pixels
  assert abs(cutmix.mean() - 0.6 * 0.3 * (1 - invisible)) < 0.03
  assert abs(untouched.mean() - 0.4 - 0.6 * 0.3 * invisible) < 0.04
  images, targets = mix(KEY, original, jnp.ones((2 * n, 1)), group_size=2, prob=0.0)
  np.testing.assert_array_equal(images, original)
  np.testing.assert_array_equal(targets, 1)


def test_groups_are_independent():
  random = np.random.default_rng(0)
  images = jnp.asarray(random.normal(size=(12, 5, 6, 3)), jnp.float32)
  targets = jnp.eye(12)
  together, _ = mix(KEY, images, targets, group_size=4)
  fewer, _ = mix(KEY, images[:8], targets[:8], group_size=4)
  np.testing.assert_array_equal(together[:8], fewer)
  changed, _ = mix(KEY, images.at[5].add(1.0), targets, group_size=4)
  different = np.any(changed != together, axis=(1, 2, 3))
  assert different[4:8].any()
  assert not different[:4].any() and not different[8:].any()


def test_images_keep_their_dtype():
  images = distinct_images(4, 5, 5).astype(jnp.bfloat16)
  mixed, targets = jax.eval_shape(functools.partial(mix, group_size=2), KEY, images, jnp.eye(4))
  assert (mixed.dtype, targets.dtype) == (jnp.bfloat16, jnp.float32)
  assert jax.eval_shape(random_erase, KEY, images).dtype == jnp.bfloat16


def mixture(key, b, h, w, **settings):
  """Returns what `mix` draws for a key: (lambda, None) of Mixup, (None, box) of CutMix."""
  images, _ = mix(key, distinct_images(b, h, w), jnp.eye(b), group_size=0, **settings)
  partners = np.asarray(images)[0, :, :, b - 1]  # the share of the last image in the first
  if not np.isin(partners, (0, 1)).all():
    return 1 - partners[0, 0], None
  rows, columns = np.flatnonzero(partners.any(1)), np.flatnonzero(partners.any(0))
  if not rows.size:
    return None, (0, 0, 0, 0)
  return None, (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1)


def test_images_and_targets_are_timms_for_the_same_lambda_and_box(timm_file, peer, monkeypatch):
  torch, timm = peer('torch'), timm_file('data/mixup.py')
  b, h, w, classes = 6, 15, 20, 7
  rng = np.random.default_rng(0)
  images = rng.normal(size=(b, h, w, 3)).astype(np.float32)
  labels = rng.integers(0, classes, b)
  theirs = timm.Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=classes)
  kinds = collections.Counter()
  for seed in range(30):
    key = jax.random.key(seed)
    share, box = mixture(key, b, h, w)
    drawn = (share or 0.5, share is None)
    monkeypatch.setattr(theirs, '_params_per_batch', functools.partial(tuple, drawn))
    monkeypatch.setattr(timm, 'rand_bbox', lambda *_, box=box, **__: box)
    expected, expected_targets = theirs(
      torch.tensor(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)
    )
    targets = mixing.smoothed_targets(jnp.asarray(labels), classes, 0.1)
    got, got_targets = mix(key, images, targets, group_size=0)
    np.testing.assert_allclose(got, expected.permute(0, 2, 3, 1), rtol=0, atol=2e-6)
    np.testing.assert_allclose(got_targets, expected_targets, rtol=0, atol=1e-6)
    kinds['mixup' if box is None else 'cutmix'] += 1
  assert min(kinds['mixup'], kinds['cutmix']) > 8


def test_impossible_settings_are_refused():
  images, targets = distinct_images(6, 4, 4), jnp.eye(6)
  with pytest.raises(ValueError, match='6 images .* groups of 4'):
    mixing.mix(KEY, images, targets, group_size=4)
  with pytest.raises(ValueError, match='mixup_alpha 0.0 and cutmix_alpha 0.0'):
    mixing.mix(KEY, images, targets, group_size=2, mixup_alpha=0.0, cutmix_alpha=0.0)


# ----- Random erasing --------------------------------------------------------------------------


def erased_boxes(h, w, n=3000, **settings):
  """Erases in images of 100s; returns the results, and where they changed as [n, h, w]."""
  results = np.asarray(random_erase(KEY, jnp.full((n, h, w, 2), 100.0), **settings))
  changed = results != 100
  np.testing.assert_array_equal(changed[..., 0], changed[..., 1])
  return results, changed[..., 0]


@pytest.mark.parametrize(('h', 'w', 'tries'), [(32, 32, 10), (40, 5, 10), (40, 5, 1)])
def test_erased_boxes_are_distributed_as_timms(h, w, tries):
  _, changed = erased_boxes(h, w, prob=1.0, tries=tries)
  rows, columns = changed.any(2), changed.any(1)
  np.testing.assert_array_equal(changed, rows[:, :, None] & columns[:, None])
  for sides in (rows, columns):  # without gaps
    assert np.all(np.abs(np.diff(sides.astype(int), axis=1)).sum(1) <= 2)
  random = np.random.default_rng(0)
  draws = [timm_erased_box(random, h, w, tries) for _ in range(20000)]
  expected = np.array([box for box in draws if box])
  erased = changed.any((1, 2))
  assert abs(erased.mean() - len(expected) / len(draws)) < 0.025
  for sides, of_timm in zip((rows, columns), expected.T, strict=True):
    lengths = sides[erased].sum(1)
    assert abs(lengths.mean() - of_timm.mean()) < 4 * of_timm.std() / math.sqrt(erased.sum())
    assert stats.ks_2samp(lengths, of_timm).pvalue > 0.01
    # All places where the box fits are alike: how far along it lies is uniform.
    start, room = sides[erased].argmax(1), sides.shape[1] - lengths
    np.testing.assert_allclose((start / room).mean(), 0.5, atol=0.03)
    assert np.any(start == 0) and np.any(start == room)


def test_erasing_has_its_probability_and_leaves_standard_normal_noise():
  results, changed = erased_boxes(32, 32, prob=0.25)
  assert abs(changed.any((1, 2)).mean() - 0.25) < 0.03
  noise = results[changed]
  assert noise.shape[1] == 2
  assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
  assert abs(np.corrcoef(noise.T)[0, 1]) < 0.01


def test_an_erased_image_is_timms_for_the_same_box_and_noise(timm_file, peer, monkeypatch):
  torch, timm = peer('torch'), timm_file('data/random_erasing.py')
  b, h, w = 12, 21, 17
  images = np.random.default_rng(0).normal(size=(b, h, w, 3)).astype(np.float32)
  got = np.asarray(random_erase(KEY, images, prob=0.7))
  theirs = timm.RandomErasing(0.7, mode='pixel', device='cpu')
  erased = 0
  for ours, image in zip(got, images, strict=True):
    changed = (ours != image).all(-1)
    erased += changed.any()
    rows, columns = changed.any(1), changed.any(0)
    top, left, height, width = rows.argmax(), columns.argmax(), rows.sum(), columns.sum()
    # What timm's `random` would have given for this box, in the order it asks.
    log_aspect = math.log(height / width) if width else 0.0
    draws = iter([height * width / (h * w), log_aspect, top, left])
    stand_in = types.SimpleNamespace(
      random=functools.partial(float, not changed.any()),
      uniform=lambda *_, draws=draws: next(draws),
      randint=lambda *_, draws=draws: next(draws),
    )
    noise = torch.tensor(ours[changed].reshape(height, width, 3)).permute(2, 0, 1)
    monkeypatch.setattr(timm, 'random', stand_in)
    monkeypatch.setattr(timm, '_get_pixels', lambda *_, n=noise, **__: n)
    expected = theirs(torch.tensor(image).permute(2, 0, 1).contiguous())
    np.testing.assert_array_equal(ours, expected.permute(1, 2, 0))
  assert 5 <= erased < b


def test_an_image_in_which_no_box_fits_stays():
  _, changed = erased_boxes(1, 40, n=50, prob=1.0)
  assert not changed.any()


def test_erasing_depends_on_the_key_and_the_place_in_the_batch():
  images = jnp.full((8, 40, 5, 2), 100.0)
  results = random_erase(KEY, images, prob=1.0, tries=10)
  for i in range(1, 8):
    assert np.any(results[i] != results[0])
  more, _ = erased_boxes(40, 5, prob=1.0, tries=10)
  np.testing.assert_array_equal(results, more[:8])
  other = random_erase(jax.random.key(12), images, prob=1.0, tries=10)
  assert np.any(other != results, axis=(1, 2, 3)).all()


# ----- Devices ---------------------------------------------------------------------------------


def test_devices_that_hold_whole_groups_need_not_communicate():
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  over_batch = jax.NamedSharding(mesh, jax.P('data'))

  def augment(images, labels):
    images = mixing.random_erase(KEY, images)
    return mixing.mix(KEY, images, mixing.smoothed_targets(labels, 10, 0.1), group_size=2)

  random = np.random.default_rng(0)
  images, labels = random.normal(size=(32, 8, 8, 3)).astype(np.float32), np.arange(32) % 10
  alone = jax.jit(augment)(images, labels)
  images, labels = jax.device_put((images, labels), over_batch)
  compiled = jax.jit(augment, out_shardings=over_batch).lower(images, labels).compile()
  for collective in ('all-reduce', 'all-gather', 'all-to-all', 'collective-permute'):
    assert collective not in compiled.as_text()
  for result, expected in zip(compiled(images, labels), alone, strict=True):
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)
