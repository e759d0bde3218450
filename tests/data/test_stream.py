"""The streaming engine: the same batches whoever reads them, from wherever they are read on."""

import collections
import dataclasses
import multiprocessing
import pickle
import threading
import time

import numpy as np
import pytest

from cvt_flax.data import augment, images, stream
from cvt_flax.data.array_source import ArraySplit
from cvt_flax.data.folder_source import load_folder
from cvt_flax.errors import UserError, is_momentary

IMAGES, BATCH, SEED = 45, 8, 3
WORKERS = stream._workers  # as it is, before tests/conftest.py replaces it
TRANSFORM = augment.Transform(
  6, crop_scale=(0.08, 1.0), flip=True, rand_augment=augment.RandAugment()
)
ORDER = stream.Order(IMAGES, BATCH, SEED)  # 5 steps an epoch, 5 images left out


@pytest.fixture(scope='module')
def split():
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (IMAGES, 9, 7, 3), np.uint8)
  return ArraySplit('noise', pixels, np.arange(IMAGES, dtype=np.int32) % 4)


def train(split, order=ORDER, *, start=0, stop=12, transform=TRANSFORM, **reading):
  reading = stream.Reading(**reading)
  return list(stream.train_batches(split, transform, order, reading, start=start, stop=stop))


@pytest.fixture(scope='module')
def batches(split):
  """The batches of more than two epochs, as one host reads them with threads."""
  return train(split)


def assert_same(got, expected):
  assert len(got) == len(expected)
  for a, b in zip(got, expected, strict=True):
    assert a.keys() == b.keys()
    for name in b:
      assert a[name].dtype == b[name].dtype, name
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def joined(parts):
  """Returns global batches from what each host has read."""
  steps = zip(*parts, strict=True)
  return [{k: np.concatenate([p[k] for p in step]) for k in step[0]} for step in steps]


def test_a_batch_is_what_it_says(batches, split):
  assert len(batches) == 12
  for batch in batches:
    assert {k: (v.dtype.name, v.shape) for k, v in batch.items()} == {
      'image': ('uint8', (BATCH, 6, 6, 3)),
      'label': ('int32', (BATCH,)),
      'mask': ('float32', (BATCH,)),
      'index': ('int32', (BATCH,)),
    }
    np.testing.assert_array_equal(batch['label'], split.labels[batch['index']])
    assert (batch['mask'] == 1).all()


def test_an_image_is_transformed_by_its_epoch_and_index(batches, split):
  """Computed here without the engine, so that it cannot be another rule on both sides."""
  for step in (0, 4, 5, 11):
    for place, index in enumerate(batches[step]['index'].tolist()):
      image = images.decode(split[index].image, '')
      rng = np.random.default_rng((SEED, 2, step // 5, index, 0))
      np.testing.assert_array_equal(batches[step]['image'][place], TRANSFORM(image, rng))


@pytest.mark.parametrize('hosts', [2, 4])
def test_hosts_read_their_part_of_the_same_batches(batches, split, hosts):
  assert_same(joined([train(split, host=h, hosts=hosts) for h in range(hosts)]), batches)


def test_by_default_training_takes_a_process_a_core_and_evaluation_threads(split, monkeypatch):
  taken = []

  def batches(rows, local, start, workers):
    taken.append(workers)
    return iter(())

  monkeypatch.setattr(stream, '_batches', batches)
  monkeypatch.setattr(stream, '_workers', WORKERS)
  for in_memory in (False, True):
    monkeypatch.setattr(ArraySplit, 'in_memory', in_memory)
    for cores in (1, 2, 4, 8):
      monkeypatch.setattr(stream.machine, 'cores', lambda cores=cores: cores)
      train(split)
      stream.eval_batches(split, 6, 1.0, BATCH, stream.Reading())
  assert taken == [0, 0, 2, 0, 4, 0, 8, 8] + [0] * 8


def test_no_more_processes_than_there_is_to_do(split, monkeypatch):
  taken = []

  def from_processes(pieces, workers):
    taken.append(workers)
    yield from ()

  monkeypatch.setattr(stream, '_from_processes', from_processes)
  evaluation(split, workers=7)  # 45 images and 3 to fill up, in pieces of 32
  train(split, start=11, workers=7)  # 8 images
  assert taken == [2, 1]


def test_a_process_that_ends_is_told_from_what_it_read():
  words = 'Worker process was terminated unexpectedly with exit code {} ...'
  for code, another_try_may_succeed in ((-9, True), (1, False)):
    with pytest.raises(UserError, match=f'ended with exit code {code}: the memory, or') as told:
      with stream._told_of_an_end(4, ':'):
        raise RuntimeError(words.format(code))
    assert is_momentary(told.value.__cause__) is another_try_may_succeed
  with pytest.raises(RuntimeError, match='UNAVAILABLE'), stream._told_of_an_end(4, ':'):
    raise RuntimeError('UNAVAILABLE: the store does not answer')


@pytest.mark.parametrize('workers', [1, 3])
def test_processes_make_the_same_batches_as_threads(batches, split, workers):
  assert_same(train(split, workers=workers), batches)
  assert_same(train(split, workers=workers, start=7, host=1, hosts=2), train(
    split, start=7, host=1, hosts=2
  ))  # fmt: skip


@pytest.mark.parametrize('start', [1, 4, 5, 6, 11, 12])
def test_reading_goes_on_at_any_step(batches, split, start):
  assert_same(train(split, start=start), batches[start:])


def test_to_go_on_reads_nothing_of_what_was(split, monkeypatch):
  read, original = [], ArraySplit._read

  def watched(self, index):
    read.append(index)
    return original(self, index)

  monkeypatch.setattr(ArraySplit, '_read', watched)
  batches = train(split, start=1000, stop=1001)
  assert sorted(read) == sorted(batches[0]['index'])


def test_no_image_comes_twice_in_an_epoch_and_others_are_left_out_each_time(split):
  order = ORDER.steps_per_epoch * BATCH
  epochs = [[ORDER(row)[1] for row in range(e * order, (e + 1) * order)] for e in range(200)]
  assert all(len(set(epoch)) == 40 for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 200
  left_out = collections.Counter(i for epoch in epochs for i in set(range(IMAGES)) - set(epoch))
  counts = [left_out[i] for i in range(IMAGES)]  # 22.2 on average, with a deviation of 4.4
  assert 4 < min(counts) and max(counts) < 45


def test_every_place_of_an_epoch_gets_any_image(split):
  """A permutation that is drawn badly would keep neighbours together."""
  order = stream.Order(10_000, 100, seed=1)
  places = np.array([order(row)[1] for row in range(10_000)])
  assert sorted(places) == list(range(10_000))
  assert abs(np.corrcoef(places, np.arange(10_000))[0, 1]) < 0.05
  steps = np.abs(np.diff(places))
  assert abs(steps.mean() - 10_000 / 3) < 100  # of two uniform draws
  assert (steps == 1).sum() < 15  # 2 on average


def test_the_seed_decides(split):
  other = stream.Order(IMAGES, BATCH, SEED + 1)
  a, b = ([ORDER(row)[1] for row in range(40)], [other(row)[1] for row in range(40)])
  assert a != b
  [batch], [again] = (train(split, order, stop=1) for order in (other, other))
  assert_same([batch], [again])


def test_an_image_looks_the_same_in_batches_of_any_size(batches, split):
  seen = {}
  for batch in train(split, stream.Order(IMAGES, 20, SEED), stop=2):
    seen |= dict(zip(batch['index'].tolist(), batch['image'], strict=True))
  compared = 0
  for batch in batches[:5]:
    for index, image in zip(batch['index'].tolist(), batch['image'], strict=True):
      if index in seen:
        np.testing.assert_array_equal(image, seen[index])
        compared += 1
  assert compared >= 35


# Repeated augmentation.


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_repeats_are_those_of_the_authors_sampler(groups):
  """DeiT's RASampler: every index three times, strided over the GPUs; each is a group here."""
  order = stream.Order(IMAGES, BATCH, SEED, repeats=3, groups=groups)
  permutation = [ORDER._permutation[i] for i in range(IMAGES)]
  repeated = [index for index in permutation for _ in range(3)]
  gpus = [repeated[rank::groups] for rank in range(groups)]
  per_gpu = BATCH // groups
  for step in range(ORDER.steps_per_epoch):
    expected = [i for gpu in gpus for i in gpu[step * per_gpu : (step + 1) * per_gpu]]
    rows = range(step * BATCH, (step + 1) * BATCH)
    assert [order(row)[1] for row in rows] == expected
    if groups > 3:  # then no GPU has an image twice in a batch
      assert all(len(set(expected[g::per_gpu])) for g in range(groups))


def test_repeats_of_an_image_are_augmented_each_in_its_own_way(split):
  order = stream.Order(IMAGES, 24, SEED, repeats=3)
  [batch] = train(split, order, stop=1)
  assert set(collections.Counter(batch['index'].tolist()).values()) == {3}
  for index in set(batch['index'].tolist()):
    looks = {image.tobytes() for image in batch['image'][batch['index'] == index]}
    assert len(looks) == 3


# Evaluation.


def evaluation(split, batch_size=8, **reading):
  return list(stream.eval_batches(split, 6, 0.0, batch_size, stream.Reading(**reading)))


def test_an_evaluation_has_every_image_once_in_order(split):
  batches = evaluation(split)
  index = np.concatenate([b['index'] for b in batches])
  mask = np.concatenate([b['mask'] for b in batches])
  assert len(batches) == 6
  np.testing.assert_array_equal(index, [*range(IMAGES), -1, -1, -1])
  np.testing.assert_array_equal(mask, [1] * IMAGES + [0] * 3)
  pixels = np.concatenate([b['image'] for b in batches])
  for i in (0, 17, 44):
    np.testing.assert_array_equal(pixels[i], images.prepare(split.images[i], '', 6, 0.0))
  assert not pixels[IMAGES:].any()


@pytest.mark.parametrize('reading', [{'hosts': 4}, {'hosts': 2, 'workers': 2}])
def test_hosts_share_an_evaluation(split, reading):
  parts = [evaluation(split, host=h, **reading) for h in range(reading['hosts'])]
  assert_same(joined(parts), evaluation(split))


@dataclasses.dataclass(frozen=True, eq=False)
class SeveralLabels(ArraySplit):
  """A split whose images have as many labels as their index says, up to three."""

  multi_label = True

  def _read(self, index):
    example = super()._read(index)
    return dataclasses.replace(example, labels=tuple(range(index % 4)))


@pytest.mark.parametrize('workers', [0, 2])
def test_several_labels_are_one_row_of_classes(split, workers):
  several = SeveralLabels('several', split.images[:10], split.labels[:10])
  reading = stream.Reading(workers=workers)
  batches = list(stream.eval_batches(several, 6, 0.0, 8, reading, num_classes=5))
  labels = np.concatenate([b['labels'] for b in batches])
  assert labels.dtype == bool and labels.shape == (16, 5)
  for i in range(10):
    assert np.flatnonzero(labels[i]).tolist() == list(range(i % 4))
  assert not labels[10:].any()


# What can go wrong.


@pytest.fixture
def damaged(tmp_path):
  """A folder of ten pictures, two of which are not."""
  for i in range(10):
    folder = tmp_path / 'train' / 'ab'[i % 2]
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.full((8, 8, 3), 20 * i + 5, np.uint8)
    images.Image.fromarray(pixels).save(folder / f'{i}.png')
  (tmp_path / 'train/a/4.png').write_bytes(b'not a picture')
  (tmp_path / 'train/b/7.png').write_bytes((tmp_path / 'train/b/7.png').read_bytes()[:50])
  return load_folder(str(tmp_path)).train


@pytest.mark.parametrize('workers', [0, 2])
def test_an_unreadable_image_is_named(damaged, workers):
  order = stream.Order(10, 10, 0)
  with pytest.raises(UserError, match=r'(4|7)\.png') as error:
    train(damaged, order, stop=1, workers=workers)
  assert '\n' not in str(error.value)


def test_an_unreadable_image_is_left_out_on_demand(damaged):
  plain = augment.Transform(6)
  [batch] = train(damaged, stream.Order(10, 10, 0), stop=1, transform=plain, skip_unreadable=True)
  bad = {i for i in range(10) if damaged[i].name.endswith(('4.png', '7.png'))}
  assert set(batch['index'][batch['mask'] == 0].tolist()) == bad
  assert not batch['image'][batch['mask'] == 0].any()
  assert batch['image'][batch['mask'] == 1].any((1, 2, 3)).all()
  [batch] = evaluation(damaged, 10, skip_unreadable=True)
  assert set(np.flatnonzero(batch['mask'] == 0)) == bad and (batch['index'] >= 0).all()


@pytest.mark.parametrize('workers', [0, 2])
def test_to_close_ends_threads_and_processes(split, workers):
  def readers():
    names = [t.name for t in threading.enumerate()]
    return [n for n in names if 'grain' in n], multiprocessing.active_children()

  reading = stream.Reading(workers=workers)
  batches = stream.train_batches(split, TRANSFORM, ORDER, reading, start=0, stop=10**6)
  next(batches)
  assert any(readers())
  batches.close()
  deadline = time.monotonic() + 20
  while any(readers()) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert readers() == ([], [])


def test_what_workers_are_sent_can_be_pickled(split, damaged):
  for each in (split, damaged, TRANSFORM, ORDER):
    assert type(pickle.loads(pickle.dumps(each))) is type(each)
