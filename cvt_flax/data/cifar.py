"""CIFAR written as a TFDS data set in ArrayRecord form, without TensorFlow."""

import contextlib
import functools
import io
import os
import pathlib
import sys
import tarfile
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from cvt_flax.errors import UserError


def prepare_cifar(builder, root: str) -> None:
  """Downloads CIFAR with TFDS, which checks its checksum, and writes it as ArrayRecord.

  TFDS needs TensorFlow to unpack the archive and to encode arrays, but not to download and not
  to store images that are encoded already. So the archive is read here.
  """
  import requests
  import tensorflow_datasets as tfds

  url = builder._cifar_info.url
  archive = os.path.basename(url)
  downloads = pathlib.Path(root) / 'downloads'
  print(
    f'Preparing {builder.name} in {builder.data_dir}: {builder.url_infos[url].size} from '
    f'{url} (once)',
    flush=True,
  )
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
      f'{builder.name} as ArrayRecord'
    ) from error
  except tfds.download.download_manager.NonMatchingChecksumError as error:
    raise UserError(f'{archive} in {downloads} has the wrong checksum; remove it') from error
  except (tfds.download.DownloadError, OSError) as error:
    if pathlib.Path(builder.data_dir, 'dataset_info.json').exists():
      return  # another process was first
    raise UserError(f'cannot prepare {builder.name} in {root}: {error}') from error


def _is_downloaded(archive: str, downloads: pathlib.Path, name: str) -> bool:
  """Whether TFDS finds the archive where it keeps, or where one puts, what is downloaded."""
  stem = archive.removesuffix('.tar.gz')
  return any(
    path
    for folder in (downloads, downloads / 'manual', downloads / name)
    for path in folder.glob(f'*{stem}*.gz')
  )


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
    files = {
      member.name: archive.extractfile(member).read() for member in archive if member.isfile()
    }
  for key, file in zip(info.label_keys, info.label_files, strict=True):
    builder.info.features[key].names = files[info.prefix + file].decode().split()
  return {
    split: _cifar_examples(split, [files[info.prefix + n] for n in names], info.label_keys)
    for split, names in (('train', info.train_files), ('test', info.test_files))
  }


def _cifar_examples(split: str, files: Sequence[bytes], label_keys: Sequence[str]):
  """Yields (key, example) from files of records: the labels, then 3x32x32 bytes of pixels."""
  records = np.frombuffer(b''.join(files), np.uint8).reshape(-1, len(label_keys) + 3 * 32 * 32)
  for index, record in enumerate(records):
    labels, pixels = np.split(record, [len(label_keys)])
    png = io.BytesIO()
    Image.fromarray(pixels.reshape(3, 32, 32).transpose(1, 2, 0)).save(png, 'PNG')
    png.seek(0)
    yield (
      index,
      {
        'id': f'{split}_{index:05d}',
        'image': png,
        **{key: int(label) for key, label in zip(label_keys, labels, strict=True)},
      },
    )
