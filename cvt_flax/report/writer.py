"""write_report(folders): the page of a run, or of several."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from cvt_flax import storage
from cvt_flax.report import comparison, markup, records, single
from cvt_flax.weights import run_folder


def write_report(
  folders: Sequence[str | pathlib.Path], output: str | pathlib.Path = ''
) -> pathlib.Path:
  """Writes a page about runs, index.html, with its figures as PNG files beside it.

  The page holds its figures itself and needs no network.

  Args:
    folders: of runs, or of runs over several seeds (FOLDER/seed-0, FOLDER/seed-1, ...); those of
      one config are put together.
    output: a folder for it, made where it is not there; '' is RUN/report, and for several runs
      report/comparison of the first.

  Returns:
    The path of the page.

  Raises:
    UserError: a folder holds no run, or is damaged.
  """
  groups = records.read_groups(folders)
  output = storage.path_of(output or records.default_output(folders))
  output.mkdir(parents=True, exist_ok=True)
  alone = groups[0].runs[0] if len(groups) == 1 and len(groups[0].runs) == 1 else None
  parts = single.sections(alone, output) if alone else comparison.sections(groups, output)
  title = ', '.join(group.name for group in groups)
  page = output / pathlib.Path(run_folder.REPORT).name
  storage.write_whole(page, markup.page(title, parts).encode())
  return page
