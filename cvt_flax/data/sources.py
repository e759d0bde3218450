"""Where examples come from: random-access sequences of (image, label, index).

`load` opens a source by name: a TFDS data set, a folder of images, arrays in an .npz file, or
scikit-learn's digits. Nothing is decoded here, and TensorFlow is never used: TFDS data sets are
read in ArrayRecord form, and CIFAR is prepared from its original archive without it.
"""

import abc
import contextlib
import dataclasses
import functools
import io
import os
import pathlib
import re
import shlex
import sys
import tarfile
import typing
import zipfile
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from cvt_flax.errors import UserError, nearest
from cvt_flax.rng import Stream

MAX_HELD_OUT = 5_000  # images: enough to tell models 1 % apart, whatever the size of train
IMAGE_EXTENSIONS = (
    '.jpg', '.jpeg', '.png', '.bmp', '.webp', '.gif', '.tif', '.tiff', '.ppm')
SPLIT_NAMES = {
    'train': ('train', 'training'),
    'validation': ('validation', 'val', 'valid'),
    'test': ('test', 'evaluation'),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
  """One image with its label.

  Attributes:
    image: an encoded image, or its pixels, uint8 [h, w, 3].
    label: the class, from 0.
    index: the position in the source's own split; it stays the same when images are held out.
    name: where the image comes from, for error messages: a path, or 'cifar10 train #17'.
  """

  image: bytes | np.ndarray
  label: int
  index: int
  name: str


class Split(abc.ABC):
  """A random-access sequence of examples, picklable and safe to read from many threads.

  Attributes:
    name: what it is, for messages, as in 'cifar10 train'.
    labels: the labels of all examples in order, int32 [N].
  """

  name: str
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, index: int) -> Example:
    """Returns one example; raises UserError when it cannot be read."""
    if not 0 <= index < len(self):
      raise IndexError(f'{self.name} has {len(self)} examples, none is #{index}')
    return self._read(int(index))

  def __getitems__(self, indices: Sequence[int]) -> list[Example]:
    """Returns many examples, which some sources read faster together than one by one."""
    return [self[i] for i in indices]

  @abc.abstractmethod
  def _read(self, index: int) -> Example:
    """Returns the example at `index`, which exists."""

  def __iter__(self) -> Iterator[Example]:
    for start in range(0, len(self), 256):
      yield from self.__getitems__(range(start, min(start + 256, len(self))))


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """A data set, with validation images that are in neither train nor test.

  Attributes:
    name: its name, for messages.
    class_names: the name of each label.
    train: what to train on, None when the source has no such split.
    validation: what to choose models by; None when the source has none and nothing is held out.
    test: what to report, with labels; None when the source has none.
    held_out: int32, sorted: where in the source's own train split the validation images are.
      Empty when the source brings a validation split of its own, or nothing is held out.
  """

  name: str
  class_names: tuple[str, ...]
  train: Split | None = None
  validation: Split | None = None
  test: Split | None = None
  held_out: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))


def load(
    source: str, *, data_dir: str = '', holdout: float = 0.1, seed: int = 0) -> Dataset:
  """Opens a source of labelled images.

  A source without a validation split lends part of train for it: a stratified choice of
  round(holdout * N) images, at most `MAX_HELD_OUT`.

  Args:
    source: `tfds:NAME[:VERSION]`, `folder:DIR` (DIR/train/CLASS/image, or DIR/CLASS/image, all
      of it train), `npz:FILE` (x_train uint8 [N, H, W], [N, H, W, 1] or [N, H, W, 3], y_train
      integer [N], likewise _val and _test, and class_names), or `digits`.
    data_dir: where TFDS keeps its data sets; '' means $TFDS_DATA_DIR, else
      ~/tensorflow_datasets.
    holdout: the part of train to hold out, from 0 (train on everything) to 0.5.
    seed: which images are held out.

  Raises:
    UserError: the source is unknown, missing, unusable or not prepared, or `holdout` or `seed`
      is out of range; the message is one line and says what to do.
  """
  if not 0 <= holdout <= 0.5:
    raise UserError(f'holdout is {holdout}, but must be from 0 to 0.5')
  if seed < 0:
    raise UserError(f'seed is {seed}, but must not be negative')
  kind, _, where = source.partition(':')
  if kind == 'tfds':
    dataset = _load_tfds(where, data_dir)
  elif kind == 'folder':
    dataset = _load_folder(where)
  elif kind == 'npz':
    dataset = _load_npz(where)
  elif source == 'digits':
    dataset = _load_digits()
  else:
    raise _unknown_source(source)
  if len(dataset.class_names) < 2:
    raise UserError(f'source {source!r} has one class only, {dataset.class_names[0]!r}; '
                    'a classifier needs two or more')
  if dataset.train is None or dataset.validation is not None or holdout == 0:
    return dataset
  return _hold_out(dataset, holdout, seed)


def _unknown_source(source: str) -> UserError:
  kind, colon, _ = source.partition(':')
  if os.path.exists(os.path.expanduser(source)):
    form = 'npz' if source.endswith('.npz') else 'folder'
    hint = f", did you mean '{form}:{source}'?"
  elif colon:
    hint = nearest(kind, ('tfds', 'folder', 'npz', 'digits'))
  else:
    hint = nearest(source, ('digits', 'tfds:cifar10', 'tfds:cifar100', 'tfds:imagenet2012'))
  return UserError(f'unknown source {source!r} '
                   f'(allowed: tfds:NAME[:VERSION], folder:DIR, npz:FILE, digits){hint}')


# --- Holding out --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Subset(Split):
  """Some examples of another split, which keep their index there."""

  name: str
  split: Split
  indices: np.ndarray  # int32 [N]

  @property
  def labels(self) -> np.ndarray:
    return self.split.labels[self.indices]

  def __len__(self) -> int:
    return len(self.indices)

  def _read(self, index: int) -> Example:
    return self.split[self.indices[index]]

  def __getitems__(self, indices: Sequence[int]) -> list[Example]:
    return self.split.__getitems__(self.indices[list(indices)].tolist())


def _hold_out(dataset: Dataset, holdout: float, seed: int) -> Dataset:
  """Returns the data set with validation images taken from train."""
  train = dataset.train
  count = min(round(holdout * len(train)), MAX_HELD_OUT)
  if not count:
    raise UserError(f'holdout={holdout} of the {len(train)} images of {train.name} is none; '
                    'more images are needed, or holdout=0 to train without validation')
  held_out = stratified_choice(train.labels, count, seed)
  rest = np.setdiff1d(np.arange(len(train), dtype=np.int32), held_out)
  return dataclasses.replace(
      dataset,
      train=Subset(train.name, train, rest),
      validation=Subset(f'{train.name} (held out)', train, held_out),
      held_out=held_out)


def stratified_choice(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
  """Chooses examples so that each class keeps its share.

  Each class gives the whole part of count * (its share); what is missing to `count` comes, one
  each, from the classes with the largest fractions, and from those of a single image last.

  Args:
    labels: int [N].
    count: how many to choose, at most N / 2.
    seed: which ones.

  Returns:
    Their indices, int32 [count], sorted.
  """
  classes, sizes = np.unique(labels, return_counts=True)
  quotas, fractions = np.divmod(sizes.astype(np.int64) * count, len(labels))
  fractions[sizes == 1] = 0  # a class would be gone from train
  missing = count - quotas.sum()
  quotas[np.argsort(-fractions, kind='stable')[:missing]] += 1
  rank = np.random.default_rng((seed, Stream.HOLDOUT)).random(len(labels))
  chosen = []
  for cls, quota in zip(classes, quotas, strict=True):
    members = np.flatnonzero(labels == cls)
    chosen.append(members[np.argsort(rank[members])[:quota]])
  return np.sort(np.concatenate(chosen)).astype(np.int32)


# --- Arrays -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySplit(Split):
  """Images in memory, uint8 [N, h, w, 1 or 3]; grey ones are given out with three channels."""

  name: str
  images: np.ndarray
  labels: np.ndarray

  def _read(self, index: int) -> Example:
    image = self.images[index]
    rgb = np.repeat(image, 3 // image.shape[-1], axis=-1)
    return Example(rgb, int(self.labels[index]), index, f'{self.name} #{index}')


def _load_digits() -> Dataset:
  """scikit-learn's 1,797 handwritten digits, at 32x32: 1,257 train, 180 validation, 360 test.

  The split is stratified and the same for every seed, so that results compare.
  """
  from sklearn.datasets import load_digits
  from sklearn.model_selection import train_test_split

  digits = load_digits()
  images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # 0..16 in the original
  images = images.repeat(4, axis=1).repeat(4, axis=2)[..., np.newaxis]
  labels = digits.target.astype(np.int32)
  rest, test = train_test_split(
      np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
  train, validation = train_test_split(
      rest, test_size=180, stratify=labels[rest], random_state=0)
  splits = {'train': train, 'validation': validation, 'test': test}
  return Dataset('digits', tuple('0123456789'), **{
      split: ArraySplit(f'digits {split}', images[np.sort(where)], labels[np.sort(where)])
      for split, where in splits.items()})


_NPZ_KEYS = {'train': ('x_train', 'y_train'), 'validation': ('x_val', 'y_val'),
             'test': ('x_test', 'y_test')}


def _load_npz(file: str) -> Dataset:
  """Reads arrays from an .npz file; see `load` for what it holds."""
  path = os.path.expanduser(file)
  arrays = _read_npz(path)
  allowed = [key for pair in _NPZ_KEYS.values() for key in pair] + ['class_names']
  for key in arrays:
    if key not in allowed:
      raise UserError(f'{path}: unknown key {key!r} (allowed: {", ".join(allowed)})'
                      f'{nearest(key, allowed)}')
  pairs = {}
  for split, (x_key, y_key) in _NPZ_KEYS.items():
    if (x_key in arrays) != (y_key in arrays):
      raise UserError(f'{path}: {x_key} and {y_key} come together, but one is missing')
    if x_key in arrays:
      pairs[split] = _checked_arrays(path, x_key, arrays[x_key], y_key, arrays[y_key])
  if not pairs:
    raise UserError(f'{path} holds no images; wanted are x_train, y_train, x_test and y_test')
  labels = np.concatenate([y for _, y in pairs.values()])
  class_names = _npz_class_names(path, arrays.get('class_names'), labels)
  name = pathlib.Path(path).stem
  splits = {}
  for split, (x, y) in pairs.items():
    wrong = np.flatnonzero((y < 0) | (y >= len(class_names)))
    if wrong.size:
      raise _wrong_label(
          f'{path}: {_NPZ_KEYS[split][1]}[{wrong[0]}]', y[wrong[0]], len(class_names))
    splits[split] = ArraySplit(f'{name} {split}', x, y.astype(np.int32))
  return Dataset(name, class_names, **splits)


def _npz_class_names(path: str, names: np.ndarray | None, labels: np.ndarray) -> tuple[str, ...]:
  """Returns the names given, or else the numbers from 0 to the highest label."""
  if names is None:
    if labels.max() >= len(labels):
      raise UserError(f'{path}: labels go up to {labels.max()}, but there are only {len(labels)} '
                      'images; number the classes from 0, or give class_names')
    return tuple(str(i) for i in range(int(labels.max()) + 1))
  if names.ndim != 1 or names.dtype.kind != 'U':
    raise UserError(f'{path}: class_names is {names.dtype} {list(names.shape)}, but must be '
                    'strings [K]')
  return tuple(names.tolist())


def _read_npz(path: str) -> dict[str, np.ndarray]:
  try:
    with open(path, 'rb') as file, np.load(file, allow_pickle=False) as arrays:
      return dict(arrays)
  except OSError as error:
    raise UserError(f'cannot read {path}: {error.strerror or error}') from error
  except (TypeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    raise UserError(f'{path} is not an .npz file of plain arrays (no objects)') from error


def _checked_arrays(path, x_key, x, y_key, y) -> tuple[np.ndarray, np.ndarray]:
  """Returns images uint8 [N, h, w, 1 or 3] and labels, integers [N]."""
  if x.ndim == 3:
    x = x[..., np.newaxis]
  if x.dtype != np.uint8 or x.ndim != 4 or x.shape[-1] not in (1, 3) or 0 in x.shape:
    raise UserError(f'{path}: {x_key} is {x.dtype} {list(x.shape)}, but must be uint8 '
                    '[N, H, W], [N, H, W, 1] or [N, H, W, 3]')
  if not np.issubdtype(y.dtype, np.integer) or y.shape != x.shape[:1]:
    raise UserError(f'{path}: {y_key} is {y.dtype} {list(y.shape)}, but must be integers '
                    f'[{len(x)}], one for each image of {x_key}')
  return x, y


def _wrong_label(where: str, label: int, classes: int) -> UserError:
  return UserError(f'{where}: label {label} is not one of the {classes} classes, '
                   f'0 to {classes - 1}')


# --- Folders ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSplit(Split):
  """Image files, read when asked for."""

  name: str
  paths: tuple[str, ...]
  labels: np.ndarray

  def _read(self, index: int) -> Example:
    path = self.paths[index]
    try:
      data = pathlib.Path(path).read_bytes()
    except OSError as error:
      raise UserError(f'cannot read {path}: {error.strerror}') from error
    return Example(data, int(self.labels[index]), index, path)


_FOLDER_FORMS = 'DIR/train/CLASS/image or DIR/CLASS/image'


def _load_folder(directory: str) -> Dataset:
  """Lists the images of a folder; see `load` for its forms."""
  root = os.path.expanduser(directory)
  if not os.path.isdir(root):
    raise UserError(f'no folder {root!r}; looked for {_FOLDER_FORMS} below it')
  try:
    return _list_folder(root)
  except OSError as error:
    raise UserError(f'cannot read {error.filename}: {error.strerror}') from error


def _list_folder(root: str) -> Dataset:
  folders = _split_folders(root)
  first, *others = folders.values()
  class_names = _subfolders(first)
  if not class_names:
    raise UserError(f'no class folders in {first}; looked for {_FOLDER_FORMS}')
  for other in others:
    names = _subfolders(other)
    for name in sorted(set(class_names) ^ set(names)):
      has, lacks = (other, first) if name in names else (first, other)
      raise UserError(f'{lacks} has no class {name!r}, but {has} has; all splits have the same '
                      'class folders (they may be empty in validation and test)')
  splits = {split: _list_split(path, class_names, may_lack=path != first)
            for split, path in folders.items()}
  return Dataset(os.path.basename(os.path.abspath(root)), tuple(class_names), **splits)


def _list_split(path: str, class_names: Sequence[str], may_lack: bool) -> FolderSplit:
  """Lists one split; unless `may_lack`, each class has an image."""
  files = [_images_below(os.path.join(path, name)) for name in class_names]
  empty = [name for name, found in zip(class_names, files, strict=True) if not found]
  if len(empty) == len(files) or empty and not may_lack:
    raise UserError(f'no images in {os.path.join(path, empty[0])}; looked for '
                    f'{" ".join(IMAGE_EXTENSIONS)}, there and in the folders below it')
  labels = np.repeat(np.arange(len(files), dtype=np.int32), [len(found) for found in files])
  return FolderSplit(path, tuple(f for found in files for f in found), labels)


def _split_folders(root: str) -> dict[str, str]:
  """Returns {'train': path, ...}, in this order; a flat folder of classes is all train."""
  folders = _subfolders(root)
  kinds = {alias: split for split, aliases in SPLIT_NAMES.items() for alias in aliases}
  named = [folder for folder in folders if folder.lower() in kinds]
  # A class may be called 'test': what tells a split is that there are class folders inside.
  if named != folders and not any(_subfolders(os.path.join(root, name)) for name in named):
    return {'train': root}
  splits = {}
  for folder in folders:
    kind = kinds.get(folder.lower())
    if kind in splits:
      raise UserError(f'{root} has two folders for {kind}: '
                      f'{os.path.basename(splits[kind])} and {folder}')
    if kind:
      splits[kind] = os.path.join(root, folder)
    elif hint := nearest(folder.lower(), kinds):
      raise UserError(f'{root} has an unknown folder {folder!r} beside its splits{hint}')
  return {split: splits[split] for split in SPLIT_NAMES if split in splits} or {'train': root}


def _subfolders(path: str) -> list[str]:
  """Returns the names of the visible folders in `path`, links included, sorted."""
  with os.scandir(path) as entries:
    return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith('.'))


def _images_below(folder: str) -> list[str]:
  """Returns the paths of the visible images in and below `folder`, sorted; follows links."""

  def fail(error):
    raise error

  paths, seen = [], set()
  for where, folders, files in os.walk(folder, followlinks=True, onerror=fail):
    folders[:] = sorted(name for name in folders if not name.startswith('.'))
    if os.path.realpath(where) in seen:  # a link that leads back up
      folders.clear()
      continue
    seen.add(os.path.realpath(where))
    paths += [os.path.join(where, name) for name in files
              if name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith('.')]
  return sorted(paths)


# --- TensorFlow Datasets ------------------------------------------------------------------------

# The command line of TFDS imports all of these, and they want older versions of packages that
# this project needs: hence an environment of their own.
_TFDS_ENVIRONMENT = (
    'python3 -m venv tfds-env && tfds-env/bin/pip install tensorflow-cpu apache-beam '
    'mlcroissant tensorflow-datasets importlib_resources && tfds-env/bin/tfds')


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsSplit(Split):
  """A split of a prepared TFDS data set, its images still encoded.

  `labels` reads the whole split once, which takes seconds for CIFAR, but minutes for ImageNet.
  """

  name: str
  records: typing.Any  # a TFDS data source: random access to dicts
  classes: int

  @functools.cached_property
  def labels(self) -> np.ndarray:
    return np.fromiter((example.label for example in self), np.int32, len(self))

  def __len__(self) -> int:
    return len(self.records)

  def __getitems__(self, indices: Sequence[int]) -> list[Example]:
    records = self._fetch(self.records.__getitems__, indices)
    return [self._example(i, record) for i, record in zip(indices, records, strict=True)]

  def _read(self, index: int) -> Example:
    return self._example(index, self._fetch(self.records.__getitem__, index))

  def has_labels(self) -> bool:
    """False for the test split of a contest, whose labels are all -1."""
    return len(self) > 0 and self._fetch(self.records.__getitem__, 0)['label'] != -1

  def _fetch(self, fetch, where):
    try:
      return fetch(where)
    except RuntimeError as error:  # what ArrayRecord raises for damaged and missing files
      raise UserError(f'cannot read {self.name}: {error}; prepare it again') from error

  def _example(self, index: int, record: dict[str, typing.Any]) -> Example:
    name, label = f'{self.name} #{index}', int(record['label'])
    if not 0 <= label < self.classes:
      raise _wrong_label(name, label, self.classes)
    return Example(record['image'], label, int(index), name)


def _load_tfds(name: str, data_dir: str) -> Dataset:
  """Opens a TFDS data set, and prepares CIFAR when it is not there yet."""
  import tensorflow_datasets as tfds  # takes half a second, and other sources do without

  root = os.path.expanduser(
      data_dir or os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets'))
  builder = _tfds_builder(name, root)
  if not (builder.data_path / 'dataset_info.json').exists():
    if builder.name not in ('cifar10', 'cifar100'):
      raise UserError(f'tfds:{name} is not prepared in {root}; '
                      f'{_how_to_prepare(builder, name, root)}')
    _prepare_cifar(builder, root)
  # From its files, not its code: only so does TFDS see formats that were added later.
  builder = tfds.builder_from_directory(builder.data_dir)
  formats = sorted(f.value for f in builder.info.available_file_formats())
  if 'array_record' not in formats:
    raise UserError(
        f'tfds:{name} is prepared in {root} as {", ".join(formats)} only, which has no random '
        f'access; add ArrayRecord with: {_TFDS_ENVIRONMENT} convert_format '
        f'--dataset_version_dir={shlex.quote(str(builder.data_dir))} '
        '--out_file_format=array_record')
  features = dict(builder.info.features.items())
  if not (isinstance(features.get('image'), tfds.features.Image)
          and isinstance(features.get('label'), tfds.features.ClassLabel)):
    found = ', '.join(sorted(f'{key} ({type(f).__name__})' for key, f in features.items()))
    raise UserError(f'tfds:{name} is not made of image (Image) and label (ClassLabel); it has '
                    f'{found}')
  class_names = tuple(features['label'].names)
  splits = {}
  for split, aliases in SPLIT_NAMES.items():
    name_there = next((alias for alias in aliases if alias in builder.info.splits), None)
    if name_there:
      records = builder.as_data_source(
          split=name_there, decoders={'image': tfds.decode.SkipDecoding()})
      splits[split] = TfdsSplit(f'{builder.name} {name_there}', records, len(class_names))
  if 'test' in splits and not splits['test'].has_labels():
    del splits['test']
  if not splits:
    raise UserError(f'tfds:{name} has none of the splits train, validation and test; it has '
                    f'{", ".join(builder.info.splits)}')
  return Dataset(builder.name, class_names, **splits)


def _tfds_builder(name: str, root: str):
  """Returns TFDS's builder of a data set, whether or not it is prepared."""
  import tensorflow_datasets as tfds

  known = tfds.list_builders(with_community_datasets=False)
  base = re.split('[/:]', name)[0]
  # Community names, as in huggingface:NAME, would be looked up in the network.
  if not re.fullmatch(r'\w+(/[\w.+-]+)?(:[\d.*]+)?', name):
    raise UserError(f"source 'tfds:{name}' is not of the form tfds:NAME[/CONFIG][:VERSION]"
                    f'{nearest(base.lower(), known)}')
  try:
    return tfds.builder(name, data_dir=root)
  except (ValueError, AssertionError) as error:
    if base in known:
      reason = str(error).splitlines()[0].rpartition('}": ')[2]  # after the call it quotes
      raise UserError(f'TFDS cannot open {name!r}: {reason}') from error
    raise UserError(f'unknown TFDS data set {base!r} (all: https://www.tensorflow.org/datasets/'
                    f'catalog/overview){nearest(base.lower(), known)}') from error


def _how_to_prepare(builder, name: str, root: str) -> str:
  """Returns the commands that prepare a data set which TFDS cannot prepare without TensorFlow."""
  place = shlex.quote(root)
  build = (f'{_TFDS_ENVIRONMENT} build {name} --file_format=array_record '
           f'--data_dir={place}')
  if builder.name == 'imagenet2012':
    return ('put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar (from '
            f'https://image-net.org/download-images) in {place}/downloads/manual, then: {build}')
  if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
    return ('put the files that https://www.tensorflow.org/datasets/catalog/'
            f'{builder.name} asks for in {place}/downloads/manual, then: {build}')
  return f'prepare it with: {build}'


def _prepare_cifar(builder, root: str) -> None:
  """Downloads CIFAR with TFDS, which checks its checksum, and writes it as ArrayRecord.

  TFDS needs TensorFlow to unpack the archive and to encode arrays, but not to download and not
  to store images that are encoded already. So the archive is read here.
  """
  import requests
  import tensorflow_datasets as tfds

  url = builder._cifar_info.url
  archive = os.path.basename(url)
  downloads = pathlib.Path(root) / 'downloads'
  print(f'Preparing {builder.name} in {builder.data_dir}: {builder.url_infos[url].size} from '
        f'{url} (once)', flush=True)
  builder._split_generators = functools.partial(_cifar_splits, builder)
  if not sys.stderr.isatty():
    tfds.disable_progress_bar()
  try:
    if not _is_downloaded(archive, downloads, builder.name):
      requests.head(url, timeout=30)  # without a network TFDS would retry for three minutes
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces an unknown size
      builder.download_and_prepare(file_format='array_record')
  except (requests.ConnectionError, requests.Timeout) as error:
    raise UserError(
        f'cannot download {builder.name}: no network, or {url} does not answer; bring '
        f'{archive} to {downloads / "manual"}, or give the data_dir where TFDS has prepared '
        f'{builder.name} as ArrayRecord') from error
  except tfds.download.download_manager.NonMatchingChecksumError as error:
    raise UserError(f'{archive} in {downloads} has the wrong checksum; remove it') from error
  except (tfds.download.DownloadError, OSError) as error:
    raise UserError(f'cannot prepare {builder.name} in {root}: {error}') from error


def _is_downloaded(archive: str, downloads: pathlib.Path, name: str) -> bool:
  """Whether TFDS finds the archive where it keeps, or where one puts, what is downloaded."""
  stem = archive.removesuffix('.tar.gz')
  return any(path for folder in (downloads, downloads / 'manual', downloads / name)
             for path in folder.glob(f'*{stem}*.gz'))


def _cifar_splits(builder, downloads) -> dict[str, Iterator[tuple[int, dict]]]:
  """What TFDS's builder generates, with PNG bytes for arrays: the same keys, so the same order.

  Args:
    builder: TFDS's builder of cifar10 or cifar100; its class names are set.
    downloads: TFDS's download manager.

  Returns:
    For each split an iterator of (key, example).
  """
  info = builder._cifar_info
  with tarfile.open(downloads.download(info.url)) as archive:
    files = {member.name: archive.extractfile(member).read()
             for member in archive if member.isfile()}
  for key, file in zip(info.label_keys, info.label_files, strict=True):
    builder.info.features[key].names = files[info.prefix + file].decode().split()
  return {
      split: _cifar_examples(split, [files[info.prefix + n] for n in names], info.label_keys)
      for split, names in (('train', info.train_files), ('test', info.test_files))}


def _cifar_examples(split: str, files: Sequence[bytes], label_keys: Sequence[str]):
  """Yields (key, example) from files of records: the labels, then 3x32x32 bytes of pixels."""
  records = np.frombuffer(b''.join(files), np.uint8).reshape(-1, len(label_keys) + 3 * 32 * 32)
  for index, record in enumerate(records):
    labels, pixels = np.split(record, [len(label_keys)])
    png = io.BytesIO()
    Image.fromarray(pixels.reshape(3, 32, 32).transpose(1, 2, 0)).save(png, 'PNG')
    png.seek(0)
    yield index, {
        'id': f'{split}_{index:05d}', 'image': png,
        **{key: int(label) for key, label in zip(label_keys, labels, strict=True)}}
