"""Images of a run: its worst mistakes, and attention over some."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import jax
import numpy as np

from cvt_flax.errors import UserError
from cvt_flax.report import figures, markup, pictures, statistics
from cvt_flax.report.plots import Plots
from cvt_flax.report.predictions import Predictions
from cvt_flax.report.records import Run
from cvt_flax.weights import pretrained

_MISTAKES, _ATTENDED = 12, 6
_TILE = 1.15  # inches: four, of an image and three stages, are as wide as other figures


def sections(run: Run, p: Predictions | None, plots: Plots) -> Iterator[str]:
  """Yields the parts of a run's page that need the images of its source."""
  try:
    source = pictures.Source(run)
  except UserError as e:
    yield markup.section('Images', markup.paragraph(f'Images cannot be shown: {e}.'))
    return
  for title, part in (('Worst mistakes', _mistakes), ('Attention', _attention)):
    try:
      found = part(run, p, source, plots)
    except (UserError, jax.errors.JaxRuntimeError) as e:  # the latter where memory is too little
      found = [markup.paragraph(f'This cannot be shown: {e}.')]
    if found:
      yield markup.section(title, *found)


def _mistakes(run, p, source, plots):
  if p is None:
    return []
  shown, drawn, captions = [], [], []
  for i in statistics.worst_mistakes(p, _MISTAKES):
    example = source.example(int(p.index[i]), int(p.label[i]))
    pixels = source.pixels(example)
    data, kind = pictures.thumbnail(pixels)
    caption = (
      f'predicted {run.class_names[p.prediction[i]]}: {p.probability[i]:.1%}\n'
      f'true {run.class_names[p.label[i]]}: {p.label_probability[i]:.1%}'
    )
    called = f'{caption}\n{pathlib.PurePath(example.name).name}'
    shown.append(markup.picture(data, kind, called, exact=kind == 'image/png'))
    drawn.append(pixels)
    captions.append(caption)
  # The page has them one by one.
  plots.write('mistakes', 'Worst mistakes', figures.gallery, drawn, captions)
  if not shown:
    return [markup.paragraph('There are none: every image is right.')]
  words = 'Those that the network was surest of. They may show wrong labels as well.'
  return [markup.paragraph(words, faint=True), markup.thumbnails(shown)]


def _attention(run, p, source, plots):
  weights = pretrained.load(run.folder)
  examples = source.spread(p, _ATTENDED)
  pixels = np.stack([source.pixels(e) for e in examples])
  found = pictures.attended(weights, pixels)
  predicted = {}
  if p is not None:
    predicted = dict(zip(p.index.tolist(), p.prediction.tolist(), strict=True))
  drawn = [attention for attention in found if not attention.single]
  shown = []
  for i, example in enumerate(examples):
    maps = [attention.maps[i] for attention in drawn]
    tiles, captions = pictures.tiles(pixels[i], maps), ['image']
    captions += [
      f'{a.stage}\n{a.size}\n{pictures.largest(m)}' for a, m in zip(drawn, maps, strict=True)
    ]
    title = f'true {run.class_names[example.label]}'
    guess = predicted.get(example.index)
    if guess is not None and guess != example.label:
      title += f', predicted {run.class_names[guess]}'
    options = dict(columns=len(tiles), side=_TILE)
    shown.append(plots(f'attention-{i}', title, figures.gallery, tiles, captions, **options))
  described = [f'{a.stage}: {a.of}{", a single key, not shown" if a.single else ""}' for a in found]
  words = (
    'The image, then where the last block of each stage looks, the mean over its heads. '
    f'{pictures.LEGEND} {"; ".join(described).capitalize()}.'
  )
  return [markup.paragraph(words, faint=True), markup.grid(shown)]
