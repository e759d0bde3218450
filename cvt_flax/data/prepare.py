"""Image files, written as a TFDS data set in ArrayRecord form, without TensorFlow.

Millions of small files are slow on a network disk and slower in a bucket; some hundred large ones
that can be read at random are not. Images keep their bytes, their order and so their index: the
data set is trained on, and lends validation images, as the files are and do.

The shards are planned first, each with the names of its images alone. Then threads here, or
workers of Apache Beam elsewhere, each read some images and write one file. No image passes through
the process that plans, and none is sorted or grouped, as TFDS's own Beam writer does with all.
"""

import contextlib
import dataclasses
import functools
import glob
import io
import itertools
import os
import re
import shlex
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from cvt_flax.data import sources
from cvt_flax.data.dataset import SPLIT_NAMES, Dataset, Example
from cvt_flax.data.files import FileSplit, NamePacker
from cvt_flax.data.images import FORMATS, check_read
from cvt_flax.data.tfds_source import labels_file, tfds_root
from cvt_flax.errors import UserError

_VERSION = '1.0.0'
_SHARD = 1_000  # images, about 100 MB of ImageNet
# Of a split. Every process that reads keeps each of them open, and is often allowed 1,024 files.
_MAX_SHARDS = 512
_THREADS = 16  # which wait for the disk, mostly
_INCOMPLETE = 'incomplete.'  # how a file begins that is being written
# It allows no Pillow as new as that of requirements.txt.
_INSTALL_BEAM = (
  'it needs an environment of its own, in a checkout of cvt_flax: python3 -m venv beam-env && '
  'beam-env/bin/pip install -r requirements-beam.txt && beam-env/bin/python -m cvt_flax.prepare'
)


@dataclasses.dataclass(frozen=True)
class _Shard:
  """A file to write, and the images that go into it."""

  path: str
  images: FileSplit


def prepare(
  source: str,
  name: str,
  *,
  data_dir: str = '',
  beam: str | None = None,
  progress: Callable[[int, int], None] | None = None,
) -> tuple[Dataset, str]:
  """Writes image files so that `tfds:NAME` reads them.

  Nothing is decoded: a file that does not begin like an image is found, one that is cut off later
  is not.

  Args:
    source: `folder:DIR` or `csv:FILE`, see `sources.load`.
    name: the new name, of a-z, 0-9 and _; none that TFDS has.
    data_dir: as for `sources.load`.
    beam: the options of an Apache Beam pipeline that writes the shards, as on a command line; ''
      for Beam's defaults. None writes them in this process.
    progress: called with the number of shards that are written and that of all; not by Beam.

  Returns:
    The source, with nothing held out, and the folder of the data set.

  Raises:
    UserError: the source cannot be opened or an image not read, the name is not allowed, the
      folder is there already or cannot be written, or Beam is not installed or fails. What was
      written by then is removed.
  """
  if source.partition(':')[0] not in ('folder', 'csv'):
    raise UserError(f'{source!r} is not made of image files (allowed: folder:DIR, csv:FILE)')
  root = tfds_root(data_dir)
  if '://' in root:
    raise UserError(f'cannot write {root}: ArrayRecord writes to folders only; mount the bucket')
  _check_name(name)
  run = functools.partial(_in_threads, progress) if beam is None else _on_beam(beam)
  dataset = sources.load(source, holdout=0)
  _check_class_names(dataset.class_names)
  if dataset.repeats and (dataset.validation is None or dataset.test is None):
    raise UserError(
      f'{source} has {dataset.repeats} images again, and of {name} it could not be told any more: '
      'what is held out might be trained on, too. List each once, or give splits of your own to '
      'validate and to test on'
    )
  # Absolute, as Beam's workers may stand elsewhere.
  folder = os.path.join(os.path.abspath(root), name, _VERSION)
  try:
    os.makedirs(folder)
  except FileExistsError as error:
    raise UserError(
      f'{folder} is there already, complete or not; remove it or choose another name'
    ) from error
  except OSError as error:
    raise UserError(f'cannot write {folder}: {error.strerror}') from error
  try:
    _write(dataset, name, folder, run)
  except BaseException:
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # versions that others have written
      os.rmdir(os.path.dirname(folder))
    raise
  return dataset, folder


def _check_name(name: str) -> None:
  import tensorflow_datasets as tfds

  if not re.fullmatch('[a-z][a-z0-9_]*', name):
    raise UserError(f'name {name!r} is not allowed: a-z, 0-9 and _, and a letter first')
  if name in tfds.list_builders(with_community_datasets=False):
    raise UserError(f'name {name!r} is that of a data set of TFDS; choose another one')


def _check_class_names(names: Iterable[str]) -> None:
  """TFDS keeps them in a text file, as stripped lines in UTF-8."""
  for name in names:
    if name.encode(errors='ignore').decode().strip().splitlines() != [name]:
      raise UserError(
        f'class name {name!r} cannot be written: TFDS keeps class names as the lines of a text '
        'file, without spaces around them'
      )


def _write(dataset: Dataset, name: str, folder: str, run: Callable) -> None:
  """Writes the shards, and then the metadata that make a data set of them."""
  import tensorflow_datasets as tfds

  features = tfds.features.FeaturesDict(
    {
      'image': tfds.features.Image(),
      'label': tfds.features.ClassLabel(names=dataset.class_names),
    }
  )
  shards = {}
  for split in SPLIT_NAMES:
    if images := getattr(dataset, split):
      parts = list(_parts(images))
      template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=name, split=split, filetype_suffix='array_record'
      )
      paths = map(os.fspath, template.sharded_filepaths(len(parts)))
      shards[split] = list(map(_Shard, paths, parts))
  run(functools.partial(_write_shard, features), list(itertools.chain(*shards.values())))
  for left_over in glob.glob(os.path.join(glob.escape(folder), f'{_INCOMPLETE}*')):
    os.unlink(left_over)  # by a worker that died
  for split in shards:
    np.save(labels_file(folder, split), getattr(dataset, split).labels)
  tfds.folder_dataset.write_metadata(
    data_dir=folder,
    features=features,
    split_infos=[
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=[len(shard.images) for shard in written],
        num_bytes=sum(os.path.getsize(shard.path) for shard in written),
      )
      for split, written in shards.items()
    ],
    disable_shuffling=True,  # has not been shuffled
    check_data=False,  # takes TensorFlow
  )


def _parts(split: FileSplit) -> Iterator[FileSplit]:
  """Yields the images of each shard, in order; a part has the names of its own images alone."""
  count = min(max(len(split) // _SHARD, 1), _MAX_SHARDS)
  ends = [len(split) * i // count for i in range(count + 1)]
  for start, end in itertools.pairwise(ends):
    packer = NamePacker()
    packer.extend(os.path.abspath(split.path(i)) for i in range(start, end))
    yield FileSplit(split.name, '', packer.finish(), split.labels[start:end])


def _write_shard(features, shard: _Shard) -> None:
  """Reads the images of a shard and writes its file."""
  # Renamed when it is whole: a runner may give a shard to two workers.
  folder, file = os.path.split(shard.path)
  path = os.path.join(folder, f'{_INCOMPLETE}{uuid.uuid4().hex}.{file}')
  try:
    writer = ArrayRecordWriter(path, 'group_size:1')  # TFDS's own: images are read one by one
    for i in range(len(shard.images)):
      example = shard.images[i]
      _check_image(example)
      writer.write(features.serialize_example({'image': example.image, 'label': example.label}))
    writer.close()
    os.replace(path, shard.path)
  except (OSError, RuntimeError) as error:  # the latter is ArrayRecord's
    raise UserError(f'cannot write {shard.path}: {error}') from error


def _check_image(example: Example) -> None:
  """Raises UserError for what does not begin like an image that training decodes."""
  check_read(example.image, example.name)
  try:
    Image.open(io.BytesIO(example.image), formats=FORMATS).close()
  except Image.UnidentifiedImageError as error:
    raise UserError(f'{example.name} is not an image (allowed: {", ".join(FORMATS)})') from error
  except Image.DecompressionBombError as error:
    raise UserError(f'{example.name} is refused as a decompression bomb: {error}') from error


def _in_threads(progress: Callable | None, write: Callable, shards: list[_Shard]) -> None:
  with ThreadPoolExecutor(_THREADS) as pool:
    for done, _ in enumerate(pool.map(write, shards), 1):
      if progress:
        progress(done, len(shards))


def _on_beam(options: str) -> Callable:
  """Returns a function that runs `write` on all shards in an Apache Beam pipeline."""
  try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError as error:
    raise UserError(f'Apache Beam is not installed; {_INSTALL_BEAM}') from error
  try:
    pipeline = beam.Pipeline(options=PipelineOptions(shlex.split(options)))
  except ValueError as error:
    raise UserError(f'bad options for Apache Beam, {options!r}: {error}') from error

  def run(write, shards):
    try:
      with pipeline:
        # Apart, so that each may go to another worker.
        _ = pipeline | beam.Create(shards) | beam.Reshuffle() | 'write' >> beam.Map(write)
    except RuntimeError as error:  # what most runners raise, with the traceback of a worker
      lines = [line for line in str(error).splitlines() if line.strip()]
      raise UserError(f'Apache Beam failed: {lines[-1].strip()}') from error

  return run
