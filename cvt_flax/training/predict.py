"""predict_dataset(weights, source, folder): a model's answers to millions of images, in shards."""

import collections
import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cvt_flax import storage
from cvt_flax.data import sources, stream
from cvt_flax.data.dataset import SPLIT_NAMES, Split, Subset, sha256
from cvt_flax.data.files import FileSplit
from cvt_flax.data.folder_source import list_images
from cvt_flax.errors import UserError, told_of_memory
from cvt_flax.models.compact import CompactViT
from cvt_flax.models.cvt import CvT
from cvt_flax.models.fold import fold
from cvt_flax.ops.logits import class_logits, num_classes
from cvt_flax.ops.pixels import normalize_pixels
from cvt_flax.training import hardware, processes, sharding
from cvt_flax.training.signals import Signals
from cvt_flax.weights import compiled, files, pretrained
from cvt_flax.weights.description import run_json
from cvt_flax.weights.preprocessing import Preprocessing

_JOB, _SHARD = 'job.json', 'shard-{:05d}-of-{:05d}.npz'
_AHEAD = 2  # batches that devices are given before the results of an earlier one are asked for


@processes.entered()
def predict_dataset(
  weights: str | pathlib.Path | pretrained.Weights,
  source: str,
  folder: str | pathlib.Path,
  *,
  split: str = '',
  top: int = 5,
  features: bool = False,
  image_size: int = 0,
  dtype: str = '',
  batch_size: int = 64,
  shard_size: int = 16_384,
  workers: int = 0,
  data_dir: str = '',
) -> list[pathlib.Path]:
  """Classifies every image of a source, on all devices of all processes, and writes it in shards.

  A shard is there when it is whole. A call that was stopped goes on with those that are missing, on
  as many devices and processes as there are then. A shard is an .npz file of n = `shard_size`
  images, in the order of the source; the last one of what is left:

    index: int64 [n], the place in the split.
    path: str [n], of the file; where images are files.
    label: int32 [n], in the numbers of `label_names` in job.json; where the source has labels.
    readable: bool [n]. Of an image that cannot be decoded classes are -1 and numbers NaN.
    classes: int32 [n, top], the most probable ones, the first one the most.
    probabilities: float32 [n, top], theirs, of the softmax over all classes.
    features: float32 [n, c], what the classifier reads; if asked for.

  job.json beside them says what they are of, and `class_names` there what classes stand for. What
  is in image files is not looked at when a call goes on, nor whether they have changed.

  Args:
    weights: what `load_pretrained` takes, or what `load_weights` returned.
    source: a folder, for the images in and below it, or what a config takes, 'tfds:NAME' and so on.
    folder: where shards are written, here or in 'gs://BUCKET/FOLDER'.
    split: 'train', 'validation' or 'test'; '' where the source has just one.
    top: how many classes of each image; all where there are fewer.
    features: whether features are written.
    image_size: height and width in place of the weights' own; 0 keeps theirs.
    dtype: 'float32' or 'bfloat16', to compute in; '' is the model's own.
    batch_size: images that are computed at once, on all devices together.
    shard_size: images of a shard.
    workers: processes that decode, on each host; 0 is a choice by its cores.
    data_dir: where TFDS keeps its data sets; '' as in a config.

  Returns:
    The paths of all shards, in order.

  Raises:
    UserError: something is not usable, or the folder holds shards of another call.
    Interrupted: SIGTERM or Ctrl-C came; the shards that were written are kept.
  """
  _check(top, image_size, dtype, batch_size, shard_size, workers)
  mesh = sharding.make_mesh()
  sharding.check_batch('batch_size', batch_size, mesh)
  hardware.announce(mesh)
  source = _absolute(str(source))
  images, label_names = _open(source, split, data_dir)
  if not isinstance(weights, pretrained.Weights):
    weights = pretrained.load(weights)
  model, variables, steps = compiled.classifier(weights, image_size, dtype)
  top = min(top, num_classes(model.num_classes))
  folder = storage.path_of(folder)
  job = {
    'weights': weights.source,
    'variables': sha256(jax.tree.leaves(weights.variables)),
    'model': run_json(dataclasses.replace(weights.description, model=model, preprocessing=steps)),
    'class_names': weights.description.class_names,
    'dtype': jnp.dtype(model.dtype).name,
    'source': source,
    'split': images.name,
    'images': len(images),
    'digest': images.digest(),
    'label_names': label_names,
    'top': top,
    'features': features,
    'shard_size': shard_size,
  }
  _claim(folder, job)

  count = math.ceil(len(images) / shard_size)
  shards = [folder / _SHARD.format(i, count) for i in range(count)]
  there = {path.name for path in folder.iterdir()} if processes.is_first() else ()
  missing = np.flatnonzero(processes.of_first([path.name not in there for path in shards])).tolist()
  if len(missing) < count:
    print(f'{count - len(missing):,} of {count:,} shards are there')
  if not missing:
    return shards
  places = {i: range(i * shard_size, min((i + 1) * shard_size, len(images))) for i in missing}
  rows = np.concatenate([np.array(each, np.int32) for each in places.values()])
  left = Subset(images.name, images, rows)
  reading = stream.Reading(jax.process_index(), jax.process_count(), workers, skip_unreadable=True)
  read = stream.eval_batches(left, steps.image_size, steps.crop_ratio, batch_size, reading)
  model, variables = fold(model, variables)
  compute = _jitted(model, steps, top, features, mesh)
  variables = sharding.place(variables, sharding.replicated(mesh))
  with (
    Signals() as signals,
    told_of_memory('--batch_size', batch_size, mesh.size),
    contextlib.closing(sharding.prefetch(read, mesh)) as batches,
  ):
    results = _results(functools.partial(compute, variables), batches, signals)
    began, done = time.perf_counter(), 0
    for i, arrays in _regrouped(results, {i: len(each) for i, each in places.items()}):
      for row in np.flatnonzero(~arrays['readable']):
        print(f'{images.name_of(places[i][row])} cannot be read')
      if i % jax.process_count() == jax.process_index():
        if label_names is None:
          del arrays['label']
        _write(shards[i], images, places[i], arrays)
      done += len(places[i])
      rate = done / (time.perf_counter() - began)
      print(f'shard {i + 1:,} of {count:,}  {rate:,.0f} images/s', flush=True)
  processes.wait_for_all('all shards are written')
  return shards


def _write(shard: pathlib.Path, images: Split, places: range, arrays: dict) -> None:
  arrays['index'] = np.array(places)
  if isinstance(images, FileSplit):
    arrays['path'] = np.array([images.path(place) for place in places])
  data = io.BytesIO()
  np.savez(data, **arrays)
  storage.write_whole(shard, data.getvalue())


def _absolute(source: str) -> str:
  """Returns a source with the whole path of what is on this machine."""
  kind, colon, where = source.rpartition(':')
  if kind in ('', 'folder', 'csv', 'npz') and os.path.exists(path := os.path.expanduser(where)):
    return f'{kind}{colon}{os.path.abspath(path)}'
  return source


def _check(top, image_size, dtype, batch_size, shard_size, workers):
  given = {'top': top, 'batch_size': batch_size, 'shard_size': shard_size}
  given |= {'image_size': image_size, 'workers': workers}
  for name, value in given.items():
    least = 0 if name in ('image_size', 'workers') else 1
    if value < least:
      raise UserError(f'{name}={value}: at least {least} is needed')
  compiled.check_dtype(dtype)


def _open(source: str, split: str, data_dir: str) -> tuple[Split, tuple[str, ...] | None]:
  """Returns the images, and what their labels stand for; None where they have no labels."""
  if os.path.isdir(source):
    if split or data_dir:
      raise UserError(
        f'{source} is a folder, for which split={split!r} and data_dir={data_dir!r} have no '
        f'effect; folder:{source} has splits'
      )
    return list_images(source), None
  if os.sep in source and ':' not in source:
    raise UserError(f'{source}: there is no such folder')
  dataset = sources.load(source, data_dir=data_dir, holdout=0)
  there = {name: getattr(dataset, name) for name in SPLIT_NAMES if getattr(dataset, name)}
  if split not in there and (split or len(there) > 1):
    has = ', '.join(f'{name} ({len(part):,} images)' for name, part in there.items())
    raise UserError(f'split={split!r}: {source} has {has}')
  return there[split or next(iter(there))], dataset.class_names


def _claim(folder: pathlib.Path, job: dict) -> None:
  """Makes the folder one of this job.

  Every process looks at it, and makes it, before any of them waits for another.

  Raises:
    UserError: it holds something else, or cannot be made.
  """
  path, job = folder / _JOB, json.loads(json.dumps(job))
  if path.exists():
    saved = files.read_json(path)
    # 'variables' and 'digest' say what these two are, wherever they lie.
    other = [name for name in job.keys() - {'weights', 'split'} if saved.get(name) != job[name]]
    if other:
      raise UserError(
        f'{folder} holds shards of another call, with another {", ".join(sorted(other))}: give '
        'another folder'
      )
  elif not storage.is_free(folder):
    raise UserError(f'{folder} is there and holds no {_JOB}: give another folder')
  storage.make_folder(folder)
  processes.wait_for_all('every process has seen the folder')
  if processes.is_first():
    storage.write_whole(path, (json.dumps(job, indent=1) + '\n').encode())


def _jitted(
  model: CvT | CompactViT, steps: Preprocessing, top: int, features: bool, mesh: Mesh
) -> Callable[[dict, dict], dict]:
  """Returns the jitted (variables, batch) -> arrays of a shard, for the images of the batch."""

  @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
  def compute(variables, batch):
    images = normalize_pixels(batch['image'], steps.mean, steps.std)
    readable = batch['mask'] > 0
    shares, classes = jax.lax.top_k(
      jax.nn.softmax(class_logits(model.apply(variables, images))), top
    )
    arrays = {
      'label': batch['label'],
      'readable': readable,
      'classes': jnp.where(readable[:, None], classes, -1),
      'probabilities': jnp.where(readable[:, None], shares, jnp.nan),
    }
    if features:  # the same network, which XLA finds to be computed already
      found = model.clone(num_classes=0).apply(variables, images)
      arrays['features'] = jnp.where(readable[:, None], found, jnp.nan)
    return arrays

  return compute


def _results(
  compute: Callable[[dict], dict], batches: Iterator[dict], signals: Signals
) -> Iterator[dict[str, np.ndarray]]:
  """Yields what is computed of each batch, while the devices are at later ones.

  Raises:
    Interrupted: a signal came.
  """
  ahead = collections.deque()
  for batch in batches:
    ahead.append(compute(batch))
    if signals.received():
      raise signals.interruption('the same command goes on with the shards that are missing')
    if len(ahead) > _AHEAD:
      yield jax.device_get(ahead.popleft())
  yield from map(jax.device_get, ahead)


def _regrouped(
  results: Iterator[dict[str, np.ndarray]], sizes: dict[int, int]
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
  """Yields each key with so many rows of all results; what fills up the last batch is left."""
  held = []
  for i, size in sizes.items():
    while sum(len(arrays['label']) for arrays in held) < size:
      held.append(next(results))
    rows = jax.tree.map(lambda *x: np.concatenate(x), *held)
    held = [{name: x[size:] for name, x in rows.items()}]
    yield i, {name: x[:size] for name, x in rows.items()}
