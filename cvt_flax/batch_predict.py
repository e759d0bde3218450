"""python -m cvt_flax.batch_predict --weights=W SOURCE FOLDER: what is in millions of images."""

import argparse

from cvt_flax import command_line

_EPILOG = """\
W is a .pth file, a folder of Hugging Face, hf:NAME, a folder that cvt_flax.convert wrote, a run
folder, or weights that come along: cvt-nano-cifar10. SOURCE is a folder, for the images in and
below it, or what training takes: tfds:NAME, folder:DIR, csv:FILE, npz:FILE. FOLDER gets an .npz
file for every 16,384 images. The same command goes on with what is missing there, on as many
devices and processes as there are then.

  python -m cvt_flax.batch_predict --weights=runs/finetune_pets-seed0 photos predictions
  python -m cvt_flax.batch_predict --weights=CvT-13-384x384-IN-22k.pth tfds:imagenet2012 \\
    gs://BUCKET/features --split=train --features --batch_size=2048 --distributed=auto
"""


def main(arguments: list[str] | None = None) -> None:
  """Runs the command line; see `cvt_flax.predict_dataset` for the same as a function."""
  parser = command_line.Parser(
    prog='python -m cvt_flax.batch_predict',
    description=__doc__,
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add('--weights', required=True, metavar='W')
  add('source', metavar='SOURCE')
  add('folder', metavar='FOLDER', help='where shards are written, here or gs://BUCKET/FOLDER')
  add('--split', default='', help='train, validation or test, where SOURCE has several')
  add('--top', type=int, default=5, help='classes of each image, 5')
  add('--features', action='store_true', help='write what the classifier reads, too')
  add('--image_size', type=int, default=0, help="in place of the weights' own")
  add('--dtype', default='', help="bfloat16 or float32, in place of the model's own")
  add('--batch_size', type=int, default=64, help='images computed at once, on all devices, 64')
  add('--shard_size', type=int, default=16_384, help='images of a shard, 16384')
  add('--workers', type=int, default=0, help='processes that decode, by default a choice')
  add('--data_dir', default='', metavar='DIR', help='where TFDS keeps its data sets')
  add('--distributed', default='', help='one of several processes: auto, or HOST:PORT,I,N')
  options = vars(parser.parse_args(arguments))

  from cvt_flax.training import processes  # here: wrong arguments are told at once
  from cvt_flax.training.predict import predict_dataset
  from cvt_flax.weights import pretrained

  if distributed := options.pop('distributed'):
    processes.join(distributed)
  weights = pretrained.load(options.pop('weights'))
  if processes.is_first():
    for note in weights.notes:
      print(f'note: {note}')
  shards = predict_dataset(weights, **options)
  if processes.is_first():
    print(f'{options["folder"]}: {len(shards):,} shard{"s" * (len(shards) > 1)} in all')


if __name__ == '__main__':
  command_line.run(main)
