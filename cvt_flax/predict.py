"""python -m cvt_flax.predict --weights=W IMAGE...: what is in the pictures."""

from __future__ import annotations

import csv
import dataclasses
import functools
import glob
import json
import pathlib
import sys
import typing
from collections.abc import Iterable, Iterator

from cvt_flax import command_line, storage
from cvt_flax.errors import UserError, is_momentary, told_of_memory

if typing.TYPE_CHECKING:
  from cvt_flax.weights.pretrained import Weights

_BAR = 20  # characters


@dataclasses.dataclass(frozen=True)
class Prediction:
  """The most probable classes of an image, the first one the most.

  Attributes:
    image: its path.
    classes: their numbers.
    names: theirs; 'class 3' where the weights have none.
    probabilities: theirs, of the softmax over all classes.
    error: why there are none: the image cannot be read; '' where it was.
  """

  image: str
  classes: tuple[int, ...]
  names: tuple[str, ...]
  probabilities: tuple[float, ...]
  error: str = ''


def predict_images(
  weights: str | pathlib.Path | Weights,
  images: Iterable[str | pathlib.Path],
  top: int = 5,
  image_size: int = 0,
  batch_size: int = 8,
  skip_unreadable: bool = False,
) -> Iterator[Prediction]:
  """Classifies image files, a batch at a time.

  Images are decoded upright, resized and cropped as the weights' preprocessing says, and
  normalised. Every batch has the same shape, so the network is compiled once.

  Args:
    weights: what `load_pretrained` takes, or what `load_weights` returned.
    images: paths of files, folders (their images, sorted, not their folders' nor hidden ones) and
      patterns such as 'photos/*.jpg'; or one of these.
    top: how many classes of each image; all where there are fewer.
    image_size: height and width in place of the weights' own; 0 keeps theirs.
    batch_size: images that are computed at once.
    skip_unreadable: whether an image that cannot be read has a Prediction without classes, whose
      `error` says why, in place of ending the iterator.

  Returns:
    An iterator over a Prediction for each image, of which an image is read when it is its turn.

  Raises:
    UserError: the weights cannot be read, there is no image, or the model has no classifier or is
      not for colour images; of the iterator: an image cannot be read.
  """
  import numpy as np  # here, so that a command line with wrong arguments says so at once

  from cvt_flax.data import images as pictures
  from cvt_flax.weights import compiled, pretrained

  paths = _check(images, top, image_size, batch_size)
  if not isinstance(weights, pretrained.Weights):
    weights = pretrained.load(weights)
  _, _, steps = compiled.classifier(weights, image_size)
  names = weights.description.class_names
  batch_size = min(batch_size, len(paths))
  memory = functools.partial(told_of_memory, '--batch_size', batch_size, 1)
  with memory():
    predict = compiled.compile_predict(weights, [batch_size], image_size)

  def predictions():
    for start in range(0, len(paths), batch_size):
      pixels, errors = [], {}
      part = paths[start : start + batch_size]
      for path in part:
        try:
          pixels.append(pictures.read(path, steps.image_size, steps.crop_ratio))
        except UserError as e:
          if not skip_unreadable or is_momentary(e.__cause__):  # another try may read it
            raise
          errors[path] = str(e)
      with memory():
        probabilities = iter(predict(np.stack(pixels)) if pixels else ())
      for path in part:
        if path in errors:
          yield Prediction(str(path), (), (), (), errors[path])
          continue
        shares = next(probabilities)
        classes = np.argsort(-shares, kind='stable')[:top]
        yield Prediction(
          str(path),
          tuple(classes.tolist()),
          tuple(names[i] if names else f'class {i}' for i in classes),
          tuple(shares[classes].tolist()),
        )

  return predictions()


def _check(images, top, image_size, batch_size):
  """Returns the paths of all images; raises a UserError for what is wrong without the weights."""
  for name, value, least in (
    ('top', top, 1),
    ('batch_size', batch_size, 1),
    ('image_size', image_size, 0),
  ):
    if value < least:
      raise UserError(f'{name}={value}: at least {least} is needed')
  images = [images] if isinstance(images, str | pathlib.Path) else images
  try:
    paths = [path for image in images for path in _expand(image)]
  except OSError as e:
    raise UserError(f'{e.filename}: {e.strerror}') from e
  if not paths:
    raise UserError('no image is given')
  return paths


def _expand(image):
  """Returns the files that a file, a folder or a pattern stands for.

  Of a folder its images are taken; one that is named may be called as it likes.
  """
  from cvt_flax.data.folder_source import IMAGE_EXTENSIONS

  path = pathlib.Path(image).expanduser()
  if path.is_dir():
    inside = (p for p in path.iterdir() if p.suffix.lower() in IMAGE_EXTENSIONS and p.is_file())
    found = sorted(p for p in inside if not p.name.startswith('.'))
  elif path.exists():
    found = [path] if path.is_file() else []
  else:
    matches = sorted(glob.glob(str(path), recursive=True))
    found = [p for p in map(pathlib.Path, matches) if p.is_file()]
  if not found:
    if path.is_dir():
      raise UserError(f"{image}: holds no image; '{path}/**/*.jpg' takes those in its folders")
    raise UserError(f'{image}: there is no such file')
  return found


def main(arguments: list[str] | None = None) -> None:
  """Runs the command line; see `predict_images` for the same as a function."""
  parser = command_line.Parser(
    prog='python -m cvt_flax.predict',
    description=__doc__,
    epilog='W is a .pth file, a folder of Hugging Face, hf:NAME, a folder that cvt_flax.convert '
    'wrote, a run folder, or weights that come along: cvt-nano-cifar10.',
  )
  parser.add_argument('--weights', required=True, metavar='W')
  parser.add_argument('images', nargs='+', metavar='IMAGE', help='a file, a folder or a pattern')
  parser.add_argument('--top', type=int, default=5, help='classes of each image, 5')
  parser.add_argument('--image_size', type=int, default=0, help="in place of the weights' own")
  parser.add_argument('--batch_size', type=int, default=8, help='images computed at once, 8')
  output = parser.add_mutually_exclusive_group()
  output.add_argument('--json', action='store_true', help='print a JSON object for each image')
  output.add_argument('--csv', metavar='FILE', help='write a line for each class of each image')
  options = parser.parse_args(arguments)

  from cvt_flax.weights import pretrained

  if options.csv == '':
    raise UserError('--csv=: the name of a file is needed')
  if options.csv:
    options.csv = storage.local_path(options.csv)
    storage.check_new(options.csv)
  _check(options.images, options.top, options.image_size, options.batch_size)
  weights = pretrained.load(options.weights)
  for note in weights.notes:  # not on the standard output, which may be read by a program
    print(f'note: {note}', file=sys.stderr)
  predictions = predict_images(
    weights,
    options.images,
    options.top,
    options.image_size,
    options.batch_size,
    skip_unreadable=True,
  )
  unreadable = []
  readable = _readable(predictions, unreadable)
  if options.csv:
    _write_csv(options.csv, readable)
    print(f'{options.csv} written')
  else:
    show = _show_json if options.json else _show_table
    for prediction in readable:
      show(prediction)
  if unreadable:
    raise UserError(f'{len(unreadable):,} of the images could not be read, and are left out')


def _readable(predictions, unreadable):
  """Yields predictions; those of images that could not be read are said, and go to a list."""
  for prediction in predictions:
    if prediction.error:
      print(prediction.error, file=sys.stderr)
      unreadable.append(prediction)
    else:
      yield prediction


def _show_json(prediction):
  fields = dataclasses.asdict(prediction)
  del fields['error']  # there is none
  print(json.dumps(fields, ensure_ascii=False), flush=True)


def _show_table(prediction):
  print(prediction.image)
  for name, share in zip(prediction.names, prediction.probabilities, strict=True):
    bar = '#' * round(share * _BAR)
    print(f'  {share:6.1%}  {bar:{_BAR}}  {name}')


def _write_csv(path, predictions):
  # Names that are not UTF-8 keep their bytes, as a csv: source reads them.
  form = dict(newline='', encoding='utf-8', errors='surrogateescape')
  with storage.new_path(path) as new, new.open('w', **form) as file:
    writer = csv.writer(file)
    writer.writerow(['image', 'rank', 'class', 'name', 'probability'])
    for p in predictions:
      rows = zip(p.classes, p.names, p.probabilities, strict=True)
      writer.writerows([p.image, rank, *row] for rank, row in enumerate(rows, start=1))


if __name__ == '__main__':
  command_line.run(main)
