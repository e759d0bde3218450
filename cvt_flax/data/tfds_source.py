"""TFDS data sets, read in ArrayRecord form without TensorFlow.

CIFAR is prepared from its original archive, without TensorFlow too.
"""

import dataclasses
import functools
import glob
import io
import os
import re
import shlex
import typing
from collections.abc import Sequence

import numpy as np

from cvt_flax.data.cifar import prepare_cifar
from cvt_flax.data.dataset import SPLIT_NAMES, Dataset, Example, Split, sha256, wrong_label
from cvt_flax.data.machine import allow_open_files
from cvt_flax.errors import UserError, is_momentary, nearest

# The command line of TFDS imports all of these, and they want older versions of packages that
# this project needs: hence an environment of their own.
_TFDS_ENVIRONMENT = (
  'python3 -m venv tfds-env && tfds-env/bin/pip install tensorflow-cpu apache-beam '
  'mlcroissant tensorflow-datasets importlib_resources && tfds-env/bin/tfds'
)


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsSplit(Split):
  """A split of a prepared TFDS data set, its images still encoded.

  `labels` reads the whole split once, which takes seconds for CIFAR, but minutes for ImageNet;
  what `cvt_flax.prepare` wrote has them in a file beside the images, `labels_file`.

  Attributes:
    name: as for every split.
    records: a TFDS data source: random access to dicts.
    classes: how many there are.
    label_key: the feature that is the label.
    labels_key: the feature that lists every right class; '' where there is none.
  """

  name: str
  records: typing.Any
  classes: int
  label_key: str = 'label'
  labels_key: str = ''

  @functools.cached_property
  def labels(self) -> np.ndarray:
    path = labels_file(self.records.dataset_info.data_dir, self.records.split)
    if path.exists():
      return np.load(io.BytesIO(path.read_bytes()))
    return np.fromiter((example.label for example in self), np.int32, len(self))

  @property
  def multi_label(self) -> bool:
    return bool(self.labels_key)

  def digest(self) -> str:
    info, split = self.records.dataset_info, self.records.split
    # Not the bytes of the files: they depend on the library that compressed the images.
    return sha256([info.full_name, split, str(info.splits[split].shard_lengths)])

  def __len__(self) -> int:
    return len(self.records)

  def __getitems__(self, indices: Sequence[int]) -> list[Example]:
    records = self._fetch(self.records.__getitems__, indices)
    return [self._example(i, record) for i, record in zip(indices, records, strict=True)]

  def _read(self, index: int) -> Example:
    return self._example(index, self._fetch(self.records.__getitem__, index))

  def has_labels(self) -> bool:
    """False for the test split of a contest, whose labels are all -1."""
    return len(self) > 0 and self._fetch(self.records.__getitem__, 0)[self.label_key] != -1

  def _fetch(self, fetch, where):
    try:
      return fetch(where)
    except RuntimeError as error:  # what ArrayRecord raises for damaged and missing files
      if is_momentary(error):
        raise
      raise UserError(f'cannot read {self.name}: {error}; prepare it again') from error

  def _example(self, index: int, record: dict[str, typing.Any]) -> Example:
    name, label, labels = f'{self.name} #{index}', int(record[self.label_key]), None
    if self.multi_label:
      labels = tuple(int(cls) for cls in record[self.labels_key])
    for cls in (label, *(labels or ())):
      if not 0 <= cls < self.classes:
        raise wrong_label(name, cls, self.classes)
    return Example(record['image'], label, int(index), name, labels)


def tfds_root(data_dir: str) -> str:
  """Returns where TFDS keeps its data sets; `data_dir` as for `sources.load`."""
  return os.path.expanduser(data_dir or os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets'))


def labels_file(folder: str, split: str) -> typing.Any:
  """Returns the path of the .npy file, int32 [N], that may hold a split's labels.

  It is a path of TFDS, which may lead into a bucket.
  """
  import tensorflow_datasets as tfds

  return tfds.core.Path(folder) / f'{split}_labels.npy'


def load_tfds(name: str, data_dir: str, prepare: bool = True) -> Dataset:
  """Opens a TFDS data set; with `prepare`, prepares CIFAR when it is not there yet."""
  import tensorflow_datasets as tfds  # takes half a second, and other sources do without

  root = tfds_root(data_dir)
  builder = _tfds_builder(name, root)
  if not (builder.data_path / 'dataset_info.json').exists():
    if builder.name not in ('cifar10', 'cifar100') or not prepare:
      raise UserError(
        f'tfds:{name} is not prepared in {root}; {_how_to_prepare(builder, name, root)}'
      )
    prepare_cifar(builder, root)
  allow_open_files()
  # From its files, not its code: only so does TFDS see formats that were added later.
  builder = tfds.builder_from_directory(builder.data_dir)
  formats = sorted(f.value for f in builder.info.available_file_formats())
  if 'array_record' not in formats:
    raise UserError(
      f'tfds:{name} is prepared in {root} as {", ".join(formats)} only, which has no random '
      f'access; add ArrayRecord with: {_TFDS_ENVIRONMENT} convert_format '
      f'--dataset_version_dir={shlex.quote(str(builder.data_dir))} '
      '--out_file_format=array_record'
    )
  features = dict(builder.info.features.items())
  keys = _label_keys(features)
  if keys is None or not isinstance(features.get('image'), tfds.features.Image):
    found = ', '.join(sorted(f'{key} ({type(f).__name__})' for key, f in features.items()))
    raise UserError(
      f'tfds:{name} is not made of image (Image) and label (ClassLabel); it has {found}'
    )
  class_names = tuple(features[keys[0]].names)
  # Masks too: those of oxford_iiit_pet would be decoded for nothing.
  pictures = [key for key, f in features.items() if isinstance(f, tfds.features.Image)]
  encoded = dict.fromkeys(pictures, tfds.decode.SkipDecoding())
  splits = {}
  for split, aliases in SPLIT_NAMES.items():
    name_there = next((alias for alias in aliases if alias in builder.info.splits), None)
    if name_there:
      records = builder.as_data_source(split=name_there, decoders=encoded)
      splits[split] = TfdsSplit(f'{builder.name} {name_there}', records, len(class_names), *keys)
  if 'test' in splits and not splits['test'].has_labels():
    del splits['test']
  if not splits:
    raise UserError(
      f'tfds:{name} has none of the splits train, validation and test; it has '
      f'{", ".join(builder.info.splits)}'
    )
  return Dataset(builder.name, class_names, **splits)


def unprepared_classes(name: str, data_dir: str) -> int:
  """Returns the number of classes of a TFDS data set that is not prepared; 0 where it is."""
  builder = _tfds_builder(name, tfds_root(data_dir))
  if (builder.data_path / 'dataset_info.json').exists():
    return 0
  keys = _label_keys(dict(builder.info.features.items()))
  return builder.info.features[keys[0]].num_classes if keys else 0


def _label_keys(features: dict) -> tuple[str, str] | None:
  """Returns `label_key` and `labels_key` of a `TfdsSplit`; None for what is not classification."""
  import tensorflow_datasets as tfds

  def is_class(feature):
    return isinstance(feature, tfds.features.ClassLabel)

  if is_class(features.get('label')):
    return 'label', ''
  real = features.get('real_label')  # imagenet2012_real
  if is_class(features.get('original_label')) and is_class(getattr(real, 'feature', None)):
    return 'original_label', 'real_label'
  return None


def _tfds_builder(name: str, root: str):
  """Returns TFDS's builder of a data set, whether or not it is prepared."""
  import tensorflow_datasets as tfds

  known = tfds.list_builders(with_community_datasets=False)
  base = re.split('[/:]', name)[0]
  # Community names, as in huggingface:NAME, would be looked up in the network.
  if not re.fullmatch(r'\w+(/[\w.+-]+)?(:[\d.*]+)?', name):
    raise UserError(
      f"source 'tfds:{name}' is not of the form tfds:NAME[/CONFIG][:VERSION]"
      f'{nearest(base.lower(), known)}'
    )
  try:
    return tfds.builder(name, data_dir=root)
  except (ValueError, AssertionError) as error:
    if base in known:
      reason = str(error).splitlines()[0].rpartition('}": ')[2]  # after the call it quotes
      raise UserError(f'TFDS cannot open {name!r}: {reason}') from error
    ours = [os.path.basename(path) for path in glob.glob(os.path.join(glob.escape(root), '*'))]
    if base in ours:
      raise UserError(_not_there(name, os.path.join(root, base))) from error
    raise UserError(
      f'unknown TFDS data set {base!r} (all: https://www.tensorflow.org/datasets/'
      f'catalog/overview){nearest(base.lower(), known + ours)}'
    ) from error
  except ImportError as error:  # of a root in a bucket, where TFDS needs another package to look
    raise UserError(f'cannot look for tfds:{name} in {root}: {error}') from error


def _not_there(name: str, folder: str) -> str:
  """Returns what is wrong with a name that TFDS does not know, where there is a folder for it."""
  found = glob.glob(os.path.join(glob.escape(folder), '**', 'dataset_info.json'), recursive=True)
  versions = sorted(os.path.relpath(os.path.dirname(path), folder) for path in found)
  if not versions:
    return f'{folder} holds no complete data set; remove it and prepare it again'
  return f'there is no tfds:{name} in {folder}, which has {", ".join(versions)}'


def _how_to_prepare(builder, name: str, root: str) -> str:
  """Returns the commands that prepare a data set which TFDS cannot prepare without TensorFlow."""
  place = shlex.quote(root)
  base, colon, version = name.partition(':')
  if builder.builder_config and '/' not in base:  # without it, all of them would be built
    name = f'{base}/{builder.builder_config.name}{colon}{version}'
  build = f'{_TFDS_ENVIRONMENT} build {name} --file_format=array_record --data_dir={place}'
  if builder.name == 'imagenet2012':
    return (
      'put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar (from '
      f'https://image-net.org/download-images) in {place}/downloads/manual, then: {build}'
    )
  if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
    return (
      'put the files that https://www.tensorflow.org/datasets/catalog/'
      f'{builder.name} asks for in {place}/downloads/manual, then: {build}'
    )
  return f'prepare it with: {build}'
