"""python -m cvt_flax.report RUN...: a run, or several, as a page of HTML."""

from cvt_flax import command_line


def main(arguments: list[str] | None = None) -> None:
  """Runs the command line; see `cvt_flax.report.writer.write_report` for it as a function."""
  parser = command_line.Parser(
    prog='python -m cvt_flax.report',
    description=__doc__,
    epilog='RUN is a run folder, or a folder of runs over several seeds (seed-0, seed-1, ...). '
    'One run has its curves, confusion, mistakes and attention; several are compared.',
  )
  parser.add_argument('runs', nargs='+', metavar='RUN')
  parser.add_argument(
    '--output',
    default='',
    metavar='DIR',
    help="by default RUN/report, for several runs the first one's report/comparison",
  )
  options = parser.parse_args(arguments)

  from cvt_flax.report.writer import write_report  # here: wrong arguments are told at once

  print(f'{write_report(options.runs, options.output)} written')


if __name__ == '__main__':
  command_line.run(main)
