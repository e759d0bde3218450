"""Augmentation for training against timm itself: the same draws, the same bytes."""

import collections
import functools
import importlib.resources
import io
import math
import pickle
import sys
import types

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats
from sklearn import datasets

from cvt_flax.data import augment, images
from cvt_flax.errors import UserError

OFFICIAL = augment.Transform(
  size=224,
  crop_scale=(0.08, 1.0),
  flip=True,
  rand_augment=augment.RandAugment.parse('rand-m9-mstd0.5-inc1'),
)
# The colour photographs that come in the wheels of scikit-image and scikit-learn; others of theirs
# would have to be downloaded.
SKIMAGE_FILES = (
  'astronaut.png',
  'chelsea.png',
  'coffee.png',
  'hubble_deep_field.jpg',
  'ihc.png',
  'motorcycle_left.png',
  'retina.jpg',
  'rocket.jpg',
)
SKLEARN_FILES = ('china.jpg', 'flower.jpg')


@functools.cache
def photographs() -> tuple[Image.Image, ...]:
  """Ten colour photographs, within 500 x 500 pixels as ImageNet's are."""
  folder = importlib.resources.files('skimage') / 'data'
  opened = [Image.open(io.BytesIO((folder / name).read_bytes())) for name in SKIMAGE_FILES]
  opened += [Image.fromarray(datasets.load_sample_image(name)) for name in SKLEARN_FILES]
  assert all(image.mode == 'RGB' for image in opened)
  return tuple(ImageOps.contain(image, (500, 500)) for image in opened)


@functools.cache
def small_pictures() -> tuple[Image.Image, ...]:
  """The photographs within 160 x 160 pixels, a grey one, and two that hardly have any."""
  small = [ImageOps.contain(image, (160, 160)) for image in photographs()]
  grey = small[0].convert('L').convert('RGB')
  return *small, grey, small[1].crop((70, 50, 71, 51)), photographs()[0].crop((250, 0, 251, 500))


class Draws:
  """Stands for the modules random and numpy.random in timm's files; draws from `rng`.

  Each function is written as its documentation has it.
  """

  rng: np.random.Generator

  def random(self):
    return self.rng.random()

  def uniform(self, a, b):
    return a + (b - a) * self.rng.random()

  def gauss(self, mu, sigma):
    return mu + sigma * self.rng.standard_normal()

  def randint(self, a, b):
    return int(self.rng.integers(a, b + 1))

  def choice(self, a, size, replace, p):
    assert replace and p is None
    return [a[position] for position in self.rng.integers(len(a), size=size)]


@pytest.fixture
def timm(timm_file, monkeypatch):
  """timm's two files, drawing from `timm.draws.rng`."""
  crops, policies = timm_file('data/transforms.py'), timm_file('data/auto_augment.py')
  draws = Draws()
  monkeypatch.setattr(crops, 'random', draws)
  monkeypatch.setattr(policies, 'random', draws)
  monkeypatch.setattr(policies, 'np', types.SimpleNamespace(random=draws))
  return types.SimpleNamespace(crops=crops, policies=policies, draws=draws)


def timm_transform(timm, size, interpolation, rand_augment):
  """What timm's data/transforms_factory.py puts together, as a function of an image."""
  crop = timm.crops.RandomResizedCropAndInterpolation(size, interpolation=interpolation)
  options = {
    'translate_const': int(size * 0.45),
    'img_mean': tuple(min(255, round(255 * mean)) for mean in (0.485, 0.456, 0.406)),
    'interpolation': timm.crops.str_to_pil_interp(interpolation),
  }
  policy = rand_augment and timm.policies.rand_augment_transform(rand_augment, options)

  def transform(image):
    image = crop(image)
    if timm.draws.random() < 0.5:  # torchvision's RandomHorizontalFlip
      image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return policy(image) if policy else image

  return transform


def assert_same_transform(timm, ours, theirs, seeds):
  for number, image in enumerate(photographs()):
    for seed in range(seeds):
      timm.draws.rng = np.random.default_rng([number, seed])
      expected = np.asarray(theirs(image))
      result = ours(image, np.random.default_rng([number, seed]))
      np.testing.assert_array_equal(result, expected, f'picture {number}, seed {seed}')


@pytest.mark.parametrize('operation', augment.OPERATIONS)
def test_every_operation_equals_timm(operation, timm):
  name = timm.policies._RAND_INCREASING_TRANSFORMS[augment.OPERATIONS.index(operation)]
  options = {'img_mean': (124, 116, 104), 'interpolation': Image.Resampling.BICUBIC}
  changed = 0
  for magnitude in (0, 3.3, 7.25, 9, 10):
    theirs = timm.policies.AugmentOp(name, prob=1, magnitude=magnitude, hparams=options)
    for sign in (1, -1) if operation in augment.SIGNED else (1,):
      timm.draws.random = lambda sign=sign: 0.25 if sign > 0 else 0.75  # what decides the sign
      for image in small_pictures():
        result = augment.apply(image, operation, sign * magnitude)
        changed += result.tobytes() != image.tobytes()
        if operation == 'posterize' and magnitude == 10:  # to 0 bits, which Pillow refuses
          with pytest.raises(ValueError, match='bits'):
            theirs(image)
          expected = Image.new('RGB', image.size)
        else:
          expected = theirs(image)
        assert result == expected, (image.size, sign * magnitude)
  assert changed > 3 * len(photographs())  # or the comparison would pass on nothing done


def test_official_transform_equals_timm(timm, monkeypatch):
  # Black, where Pillow refuses to keep 0 bits.
  monkeypatch.setitem(
    timm.policies.NAME_TO_OP,
    'PosterizeIncreasing',
    lambda image, bits, **options: (
      timm.policies.posterize(image, bits) if bits else Image.new('RGB', image.size)
    ),
  )
  theirs = timm_transform(timm, 224, 'bicubic', 'rand-m9-mstd0.5-inc1')
  assert_same_transform(timm, OFFICIAL, theirs, seeds=80)


def test_transform_of_cvt_21_at_224_equals_timm(timm):
  ours = augment.Transform(224, crop_scale=(0.08, 1.0), interpolation='bilinear', flip=True)
  assert_same_transform(timm, ours, timm_transform(timm, 224, 'bilinear', None), seeds=20)


@pytest.mark.parametrize('size', [(500, 375), (375, 500), (62, 500), (500, 62), (2, 500), (500, 2)])
def test_random_box_equals_timm(size, timm):
  scale, aspect = (0.08, 1.0), (3 / 4, 4 / 3)
  image = Image.new('L', size)
  for seed in range(300):
    timm.draws.rng = np.random.default_rng(seed)
    top, left, h, w = timm.crops.RandomResizedCropAndInterpolation.get_params(image, scale, aspect)
    box = augment.random_box(*size, scale, aspect, np.random.default_rng(seed))
    assert box == (left, top, left + w, top + h)


def test_timm_left_torchvision_as_it_was(timm):
  assert sys.modules['torchvision'] is None


def assert_share(count, of, probability):
  """A binomial count is within 4.5 standard deviations: 1 in 150,000 is not."""
  deviation = math.sqrt(of * probability * (1 - probability))
  assert abs(count - of * probability) < 4.5 * deviation, (count, of, probability)


def test_probabilities_and_magnitudes_of_rand_augment():
  rng = np.random.default_rng(0)
  drawn = [augment.RandAugment().draw(rng) for _ in range(100_000)]
  for fired, probability in enumerate((1 / 4, 1 / 2, 1 / 4)):
    assert_share(sum(len(each) == fired for each in drawn), len(drawn), probability)

  flat = [pair for each in drawn for pair in each]
  count = collections.Counter(operation for operation, _ in flat)
  negative = collections.Counter(operation for operation, magnitude in flat if magnitude < 0)
  assert set(count) == set(augment.OPERATIONS)
  assert set(negative) == augment.SIGNED
  for operation in augment.OPERATIONS:
    assert_share(count[operation], 2 * len(drawn), 1 / 2 / 15)
  for operation in augment.SIGNED:
    assert_share(negative[operation], count[operation], 1 / 2)

  # The second operation does not depend on the first, and may be the same.
  pairs = collections.Counter((each[0][0], each[1][0]) for each in drawn if len(each) == 2)
  expected = pairs.total() / 15**2
  chi_squared = sum((n - expected) ** 2 / expected for n in pairs.values())
  assert len(pairs) == 15**2
  assert abs(chi_squared - 224) < 4.5 * math.sqrt(2 * 224)

  # Normal, cut off at 10, two deviations above the mean; 0 is 18 below it.
  magnitudes = np.abs([magnitude for _, magnitude in flat])
  below = stats.truncnorm(-18, 2, loc=9, scale=0.5)
  assert magnitudes.max() == 10
  at_most = stats.norm.sf(2)
  assert_share(np.sum(magnitudes == 10), len(magnitudes), at_most)
  assert stats.kstest(magnitudes[magnitudes < 10], below.cdf).pvalue > 1e-4
  mean = below.mean() * (1 - at_most) + 10 * at_most
  variance = below.moment(2) * (1 - at_most) + 100 * at_most - mean**2
  error = math.sqrt(variance / len(magnitudes))  # of the mean; the deviation's is smaller
  assert abs(magnitudes.mean() - mean) < 4.5 * error
  assert abs(magnitudes.std() - math.sqrt(variance)) < 4.5 * error


def test_the_number_of_operations_is_what_was_asked_for():
  policy = augment.RandAugment(operations=5, probability=1)
  assert len(policy.draw(np.random.default_rng(0))) == 5


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('rand-m9-mstd0.5-inc1', augment.RandAugment()),
    ('rand-m9-mstd0.5-inc1-n2-p0.5', augment.RandAugment(9, 0.5, 2, 0.5)),
    ('rand-inc1-p1-n3-mstd0-m0', augment.RandAugment(0, 0, 3, 1)),
  ],
)
def test_parse(text, expected):
  assert augment.RandAugment.parse(text) == expected


@pytest.mark.parametrize(
  ('text', 'reason'),
  [
    ('', "does not start with 'rand'"),
    ('original', "does not start with 'rand'"),
    ('rand', 'lacks m, mstd, inc'),
    ('rand-m9-mstd0.5', 'lacks inc'),
    ('rand-m9-inc1', 'lacks mstd'),
    ('rand-m9-mstd0.5-inc0', "'inc0'"),
    ('rand-m11-mstd0.5-inc1', "'m11'"),
    ('rand-m9.5-mstd0.5-inc1', "'m9.5'"),
    ('rand-m9-m9-mstd0.5-inc1', "'m9'"),
    ('rand-m9-mstd0.5-inc1-n0', "'n0'"),
    ('rand-m9-mstd0.5-inc1-p1.5', "'p1.5'"),
    ('rand-m9-mstdinf-inc1', "'mstdinf'"),
    ('rand-m9-mstd0.5-inc1-w0', "'w0'"),
    ('rand-m9-mstd0.5-inc1-', "''"),
    ('rand-m9-mstd0.5-inc1\n', r"'inc1\\n'"),
    ('rand-m' + '9' * 5000 + '-mstd0.5-inc1', "'m999"),
  ],
)
def test_parse_errors_are_one_line(text, reason):
  with pytest.raises(UserError, match=reason) as raised:
    augment.RandAugment.parse(text)
  message = str(raised.value)
  assert '\n' not in message
  assert 'rand-m9-mstd0.5-inc1' in message


def test_unknown_operations_are_refused():
  with pytest.raises(ValueError, match="'blur': not one of autocontrast"):
    augment.apply(photographs()[0], 'blur', 9)


def jittered_by_hand(image, limits, rng):
  order = rng.permutation(len(limits))
  factors = [rng.uniform(max(0, 1 - limit), 1 + limit) for limit in limits]
  for position in order:
    if position == 3:
      hsv = np.array(image.convert('HSV'))
      hsv[..., 0] += np.uint8(int((factors[3] - 1) * 255) % 256)  # wraps around
      image = Image.fromarray(hsv, 'HSV').convert('RGB')
    else:
      names = 'Brightness', 'Contrast', 'Color'
      image = getattr(ImageEnhance, names[position])(image).enhance(factors[position])
  return image


@pytest.mark.parametrize('limits', [(0.4, 0.4, 0.4), (0.8, 0.2, 1.5, 0.5)])
def test_color_jitter_is_made_of_enhancements(limits):
  ours = augment.Transform(96, color_jitter=limits)
  for seed, image in enumerate(2 * photographs()):
    fitted = Image.fromarray(images.resize_and_crop(image, 96, 1.0))
    expected = jittered_by_hand(fitted, limits, np.random.default_rng(seed))
    result = ours(image, np.random.default_rng(seed))
    np.testing.assert_array_equal(result, np.asarray(expected))
    assert np.any(result != np.asarray(fitted))


@pytest.mark.parametrize(('limit', 'least', 'greatest'), [(0.5, 50, 150), (1.5, 0, 250)])
def test_color_jitter_is_uniform_between_its_limits(limit, least, greatest):
  pixel = Image.new('RGB', (1, 1), (100, 100, 100))
  rng = np.random.default_rng(0)
  draws = 5000
  greys = [augment.color_jitter(pixel, (limit, 0, 0), rng).getpixel((0, 0)) for _ in range(draws)]
  assert all(red == green == blue for red, green, blue in greys)
  levels = np.array(greys)[:, 0]
  assert levels.min() in (least, least + 1)
  assert levels.max() in (greatest - 1, greatest)
  middle = (least + greatest) / 2
  assert_share(np.sum(levels < middle), draws, 1 / 2)


def test_a_limit_of_zero_changes_nothing():
  image = photographs()[0]
  result = augment.color_jitter(image, (0, 0, 0, 0), np.random.default_rng(0))
  assert result == image


def test_margin_squashes_and_crops_anywhere():
  size, margin = 32, 3
  transform = augment.Transform(size, crop_margin=margin, interpolation='bilinear')
  image = photographs()[1]
  squashed = np.asarray(image.resize((size + margin,) * 2, Image.Resampling.BILINEAR))
  places = {
    squashed[top : top + size, left : left + size].tobytes(): (top, left)
    for top in range(margin + 1)
    for left in range(margin + 1)
  }
  rng = np.random.default_rng(0)
  draws = 1600
  count = collections.Counter(places[transform(image, rng).tobytes()] for _ in range(draws))
  assert len(count) == (margin + 1) ** 2
  for n in count.values():
    assert_share(n, draws, 1 / 16)


@pytest.mark.parametrize('crop_ratio', [0, 0.875, 1.0])
def test_without_random_crop_it_is_the_geometry_of_evaluation(crop_ratio):
  for image in photographs():
    result = augment.Transform(64, crop_ratio=crop_ratio)(image, np.random.default_rng(0))
    expected = images.prepare(np.asarray(image), 'picture', 64, crop_ratio)
    np.testing.assert_array_equal(result, expected)


def test_one_image_in_two_is_mirrored():
  transform = augment.Transform(24, flip=True)
  image = photographs()[0]
  plain = np.asarray(augment.Transform(24)(image, np.random.default_rng(0)))
  rng = np.random.default_rng(0)
  results = [transform(image, rng) for _ in range(400)]
  mirrored = sum(np.array_equal(result, plain[:, ::-1]) for result in results)
  assert mirrored + sum(np.array_equal(result, plain) for result in results) == len(results)
  assert_share(mirrored, len(results), 1 / 2)


def test_geometric_operations_have_the_filter_and_colour_of_the_transform():
  image = photographs()[0]
  policy = augment.RandAugment(magnitude=10, magnitude_std=0, operations=6, probability=1)
  corners = set()
  for seed in range(20):
    drawn = policy.draw(np.random.default_rng(seed))
    ours = augment.Transform(
      64, rand_augment=policy, interpolation='bilinear', fill=(1, 200, 30), crop_ratio=0
    )
    expected = Image.fromarray(images.squash(image, 64))
    for operation, magnitude in drawn:
      expected = augment.apply(
        expected, operation, magnitude, Image.Resampling.BILINEAR, (1, 200, 30)
      )
    result = ours(image, np.random.default_rng(seed))
    np.testing.assert_array_equal(result, np.asarray(expected))
    corners.add(tuple(result[0, 0].tolist()))
  assert (1, 200, 30) in corners


@pytest.mark.parametrize('size', [(1, 1), (2, 1), (1, 500), (500, 1)])
@pytest.mark.parametrize(
  'transform',
  [
    OFFICIAL,
    augment.Transform(32, crop_margin=4, flip=True, color_jitter=(0.4, 0.4, 0.4, 0.1)),
    augment.Transform(8, rand_augment=augment.RandAugment(probability=1)),
  ],
  ids=['official', 'margin', 'evaluation'],
)
def test_tiny_images(transform, size):
  image = photographs()[0].resize(size)
  for seed in range(10):
    result = transform(image, np.random.default_rng(seed))
    assert result.shape == (transform.size, transform.size, 3)
    assert result.dtype == np.uint8


def test_a_crop_of_one_pixel_is_never_empty():
  """timm's is, for one try in five; that makes a black image."""
  transform = augment.Transform(4, crop_scale=(0.08, 1.0))
  for seed in range(50):
    assert transform(Image.new('RGB', (1, 1), 'white'), np.random.default_rng(seed)).min() == 255


def test_grey_stays_grey_unless_it_is_uncovered():
  image = photographs()[0].convert('L').convert('RGB')
  ours = augment.Transform(
    48, crop_scale=(0.08, 1), rand_augment=augment.RandAugment(probability=1), fill=(7, 7, 7)
  )
  for seed in range(30):
    red, green, blue = np.moveaxis(ours(image, np.random.default_rng(seed)), -1, 0)
    np.testing.assert_array_equal(red, green)
    np.testing.assert_array_equal(red, blue)


def test_a_pickled_transform_makes_the_same_bytes():
  image = photographs()[0]
  copy = pickle.loads(pickle.dumps(OFFICIAL))
  assert copy == OFFICIAL
  before = image.tobytes()
  results = {OFFICIAL(image, np.random.default_rng(seed)).tobytes() for seed in range(5)}
  again = {copy(image, np.random.default_rng(seed)).tobytes() for seed in range(5)}
  assert results == again
  assert len(results) == 5
  assert image.tobytes() == before
