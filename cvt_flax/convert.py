"""python -m cvt_flax.convert SRC DST: weights between PyTorch and Flax, both ways."""

import argparse

from cvt_flax import command_line, terminal

_EPILOG = """\
SRC is a .pth file of the authors' code or of vit-pytorch, a folder of Hugging Face
(config.json with model.safetensors or pytorch_model.bin), hf:NAME, a folder that this
program wrote, the run folder of a training, or a name of weights that come along,
cvt-nano-cifar10. DST must not exist; one that ends with .pth is a file, else a folder.

  python -m cvt_flax.convert CvT-13-224x224-IN-1k.pth cvt-13/
  python -m cvt_flax.convert runs/cvt13_cifar10-seed0 for_transformers/ --to=huggingface
"""
# Fewer than these are read in a moment, and need no progress.
_SHOW_PROGRESS_FROM = 50_000_000


def main(arguments: list[str] | None = None) -> None:
  """Runs the command line; see `cvt_flax.convert_weights` for the same as a function."""
  parser = command_line.Parser(
    prog='python -m cvt_flax.convert',
    description=__doc__,
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('source', metavar='SRC', help='the weights, see below')
  parser.add_argument('destination', metavar='DST', help='the file or folder to write')
  parser.add_argument(
    '--to',
    default='',
    metavar='LAYOUT',
    help='flax, official, huggingface, vit-pytorch, or for compact transformers vit-from-scratch '
    'or compact-transformers; by default official for a DST that ends with .pth, else flax',
  )
  parser.add_argument('--model', default='', help='a name, in place of what the weights say')
  parser.add_argument(
    '--activation', default='', help="quick_gelu or gelu, in place of the model's"
  )
  parser.add_argument(
    '--check', action='store_true', help='compare with PyTorch on random images before writing'
  )
  options = parser.parse_args(arguments)

  from cvt_flax.weights.conversion import convert_weights  # here: wrong arguments are told at once

  report = convert_weights(**vars(options), progress=_progress)
  for note in report['notes']:
    print(f'note: {note}')
  print(
    f'{options.source} ({report["from"]}): {report["parameters"]:,} parameters, '
    f'{report["num_classes"]} classes, images of {report["image_size"]}x{report["image_size"]}, '
    f'{report["activation"]}'
  )
  if 'logits' in report:
    maps = ', '.join(f'{d:.1e}' for d in report['maps'])
    print(
      f'against PyTorch with {report["activation"]}, max|difference| / max|value|: '
      f'logits {report["logits"]:.1e}, stage maps {maps}'
    )
  print(f'{options.destination} ({report["to"]}) written')


def _progress(done, total):
  if total >= _SHOW_PROGRESS_FROM:
    terminal.count(f'read {done / 1e6:,.0f} of {total / 1e6:,.0f} M numbers', done == total)


if __name__ == '__main__':
  command_line.run(main)
