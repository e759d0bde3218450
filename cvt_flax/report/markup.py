"""The pieces that a page is made of: text in, HTML out, everything escaped."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

_LONG = 30  # letters of a cell that may be broken anywhere
_STYLE = """
:root { color-scheme: light dark; --text: #24292f; --faint: #59636e; --line: #d0d7de;
  --back: #ffffff; --panel: #f6f8fa; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --faint: #9198a1; --line: #3d444d;
  --back: #0d1117; --panel: #151b23; --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 70rem; color: var(--text);
  background: var(--back); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: .75rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 .25rem; }
p { margin: .4rem 0; max-width: 46rem; }
.faint, figcaption, summary { color: var(--faint); font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .75rem;
  margin: 1.25rem 0; }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem;
  padding: .6rem .8rem; }
.card b { display: block; font-size: 1.35rem; line-height: 1.3; }
.card.main b { color: var(--accent); }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 1.25rem; align-items: start; }
.thumbs { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr));
  gap: .9rem; }
figure { margin: 0; min-width: 0; }
img { display: block; max-width: 100%; height: auto; }
.thumbs img { width: 100%; border-radius: .3rem; }
.exact { image-rendering: pixelated; }
figcaption { line-height: 1.35; margin-top: .25rem; white-space: pre-line;
  overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: normal; }
th { color: var(--faint); font-weight: 600; }
.number { text-align: right; white-space: nowrap; }
td.long { overflow-wrap: anywhere; min-width: 9rem; }
details { margin: .5rem 0; } summary { cursor: pointer; }
"""


def page(title: str, sections: Iterable[str]) -> str:
  """Returns a whole page, which needs nothing else."""
  return (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n'
    + '\n'.join(sections)
    + '\n</body>\n</html>\n'
  )


def text(value: object) -> str:
  """Returns it escaped; bytes of a file name that are not UTF-8 as in \\udce4."""
  return html.escape(str(value).encode(errors='backslashreplace').decode())


def paragraph(value: str, faint: bool = False) -> str:
  return f'<p{" class=faint" if faint else ""}>{text(value)}</p>'


def heading(title: str, *lines: str) -> str:
  return f'<h1>{text(title)}</h1>' + ''.join(paragraph(line, faint=True) for line in lines)


def section(title: str, *parts: str) -> str:
  return f'<section>\n<h2>{text(title)}</h2>\n' + '\n'.join(parts) + '\n</section>'


def cards(values: Sequence[tuple[str, str, str]]) -> str:
  """Returns numbers in boxes, of (number, what it is, more about it); the first is the main one."""
  found = [
    f'<div class="card{" main" if not i else ""}"><b>{text(value)}</b>{text(name)}'
    f'<div class=faint>{text(more)}</div></div>'
    for i, (value, name, more) in enumerate(values)
  ]
  return f'<div class=cards>{"".join(found)}</div>'


class Number(str):
  """A number as it is written, which `table` puts to the right."""


def number(value: float | None, form: str = ',') -> Number:
  """Returns a number in a format of Python's; None is a dash."""
  return Number('–' if value is None else format(value, form))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """Returns a table that scrolls where it is too wide; heads are aligned as the cells below."""
  body = [list(row) for row in rows]
  heads = [_cell(h, 'th', bool(body) and body[0][i]) for i, h in enumerate(head)]
  lines = [heads, *([_cell(value, 'td', value) for value in row] for row in body)]
  inside = ''.join(f'<tr>{"".join(line)}</tr>\n' for line in lines)
  return f'<div class=scroll><table>\n{inside}</table></div>'


def _cell(value, tag, like):
  kind = ' class=number' if isinstance(like, Number) else ''
  if not kind and len(value) > _LONG:
    kind = ' class=long'
  return f'<{tag}{kind}>{text(value)}</{tag}>'


def plot(title: str, light: bytes, dark: bytes) -> str:
  """Returns a figure, its title in it, of which the browser shows the one that its theme needs."""
  return (
    '<figure><picture>'
    f'<source media="(prefers-color-scheme: dark)" srcset="{_data(dark, "image/png")}">'
    f'<img src="{_data(light, "image/png")}" alt="{text(title)}"></picture></figure>'
  )


def picture(data: bytes, kind: str, caption: str, exact: bool = False) -> str:
  """Returns an image with its caption; `exact` shows the pixels of a small one as squares."""
  return (
    f'<figure><img{" class=exact" if exact else ""} src="{_data(data, kind)}" '
    f'alt="{text(caption)}"><figcaption>{text(caption)}</figcaption></figure>'
  )


def grid(parts: Iterable[str]) -> str:
  return f'<div class=grid>{"".join(parts)}</div>'


def thumbnails(parts: Iterable[str]) -> str:
  return f'<div class=thumbs>{"".join(parts)}</div>'


def details(summary: str, inside: str) -> str:
  return f'<details><summary>{text(summary)}</summary>\n{inside}\n</details>'


def _data(data, kind):
  return f'data:{kind};base64,{base64.b64encode(data).decode()}'
