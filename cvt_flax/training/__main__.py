"""python -m cvt_flax.training: train.py, where the package is there without its checkout."""

from cvt_flax import command_line


def main() -> None:
  """Runs the command line; `python -m cvt_flax.training --help` explains."""
  from cvt_flax.training.command import main  # here: Ctrl-C is answered while it is imported

  main()


if __name__ == '__main__':
  command_line.run(main)
