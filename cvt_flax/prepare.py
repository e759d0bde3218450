"""python -m cvt_flax.prepare SOURCE NAME: image files as a TFDS data set in ArrayRecord form."""

import argparse

from cvt_flax import command_line, terminal

_EPILOG = """\
SOURCE is folder:DIR or csv:FILE, as for training. NAME is new, and is read as tfds:NAME
with the same --data_dir.

  python -m cvt_flax.prepare folder:imagenet21k imagenet21k --data_dir=/data
  python -m cvt_flax.prepare csv:photos.csv photos \\
    --beam='--direct_num_workers=8 --direct_running_mode=multi_processing'
"""


def main(arguments: list[str] | None = None) -> None:
  """Runs the command line; see `cvt_flax.data.prepare.prepare` for the same as a function."""
  parser = command_line.Parser(
    prog='python -m cvt_flax.prepare',
    description=__doc__,
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('source', metavar='SOURCE')
  parser.add_argument('name', metavar='NAME')
  parser.add_argument(
    '--data_dir',
    default='',
    metavar='DIR',
    help='where TFDS keeps its data sets; by default $TFDS_DATA_DIR, else ~/tensorflow_datasets',
  )
  parser.add_argument(
    '--beam',
    metavar='OPTIONS',
    help='write with Apache Beam, and the options of its pipeline; --beam= for its defaults',
  )
  options = parser.parse_args(arguments)

  from cvt_flax.data.prepare import prepare  # here: wrong arguments are told at once

  dataset, folder = prepare(**vars(options), progress=_progress)
  counts = ', '.join(
    f'{len(split):,} {kind}'
    for kind in ('train', 'validation', 'test')
    if (split := getattr(dataset, kind))
  )
  print(f'{folder} written: {counts}; {len(dataset.class_names):,} classes')
  print(f'read it as tfds:{options.name}')


def _progress(done, total):
  terminal.count(f'{done:,} of {total:,} files written', done == total)


if __name__ == '__main__':
  command_line.run(main)
