"""Pictures: where a model looks, what it makes of them, and what a run trains on."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import ml_collections
import numpy as np
from matplotlib.figure import Figure

from cvt_flax.data import images
from cvt_flax.errors import UserError
from cvt_flax.predict import Prediction
from cvt_flax.report import figures, pictures
from cvt_flax.report.figures import LIGHT
from cvt_flax.training.look import training_images
from cvt_flax.weights import pretrained
from cvt_flax.weights.pretrained import Weights

TEXT = 9  # points
_DPI = 110
_LEAST_SHARE = 0.05  # of a target that is written below its image


def on_white(width: float, height: float, **options) -> Figure:
  """Returns an empty figure of width x height inches, as all are that a notebook shows."""
  return Figure(figsize=(width, height), dpi=_DPI, facecolor='white', **options)


def draw_attention(
  weights: str | pathlib.Path | Weights, paths: Sequence[str | pathlib.Path]
) -> Figure:
  """Returns pictures, and over each where the last block of every stage looks.

  It is the mean over the heads of `cvt_flax.attention_maps`: of the class token where the stage has
  one, otherwise the mean over all queries. Colour is how far it is above the uniform share 1 / keys
  (`report.pictures.tiles`); the largest, as a multiple of that, stands below. A stage that has a
  single key is left out: that gets all attention there is.

  Args:
    weights: what `load_pretrained` takes, or what `load_weights` returned.
    paths: of pictures.

  Raises:
    UserError: weights or a picture cannot be read, or no picture is given.
  """
  paths = [paths] if isinstance(paths, str | pathlib.Path) else list(paths)
  paths = [pathlib.Path(path).expanduser() for path in paths]
  if not paths:
    raise UserError('no picture is given')
  if not isinstance(weights, Weights):
    weights = pretrained.load(weights)
  steps = weights.description.preprocessing
  pixels = np.stack([images.read(path, steps.image_size, steps.crop_ratio) for path in paths])
  found = [a for a in pictures.attended(weights, pixels) if not a.single]
  shown, captions = [], []
  for i, image in enumerate(pixels):
    maps = [attention.maps[i] for attention in found]
    shown += pictures.tiles(image, maps, side=224)
    captions.append(f'as the network\ngets it, {steps.image_size}×{steps.image_size}')
    captions += [
      f'{a.stage}: {a.size}\n{a.of}\n{pictures.largest(m)}'
      for a, m in zip(found, maps, strict=True)
    ]
  figure = figures.gallery(LIGHT, shown, captions, columns=1 + len(found), side=2.0)
  figure.set(dpi=_DPI, facecolor='white')
  return figure


def draw_predictions(predictions: Sequence[Prediction]) -> Figure:
  """Returns pictures, each beside bars of its most probable classes, as `predict_images` has them.

  Raises:
    UserError: a picture cannot be read, or there is none.
  """
  predictions = list(predictions)
  if not predictions:
    raise UserError('no prediction is given')
  for found in predictions:
    if found.error:
      raise UserError(found.error)
  figure = on_white(7, 1.75 * len(predictions) + 0.4, layout='constrained')
  grid = figure.subplots(len(predictions), 2, squeeze=False, width_ratios=(1, 1.6))
  # One scale, to compare them; what is less than a tenth is to look small.
  end = 1.15 * max(0.1, *(max(found.probabilities) for found in predictions))
  for (left, right), found in zip(grid, predictions, strict=True):
    left.imshow(
      np.asarray(images.decode(images.read_bytes(pathlib.Path(found.image)), found.image))
    )
    left.set_axis_off()
    figures.draw_bars(right, LIGHT, found.names, found.probabilities)
    figures.clear_axes(right, LIGHT)
    right.set_xlim(0, end)
    right.tick_params(labelbottom=right is grid[-1, 1])
  grid[-1, 1].set_xlabel('probability', fontsize=TEXT, color=LIGHT.text)
  return figure


def draw_training_images(
  config: ml_collections.ConfigDict | str, step: int = 0, count: int = 24
) -> Figure:
  """Returns images as the network gets them in a step: cropped, augmented, erased and mixed.

  Below each are the two largest shares of its target, from 5 % on.

  Args:
    config: as `cvt_flax.get_config` returns it, or a name that it takes.
    step: of the run, from 0.
    count: how many, at most.

  Raises:
    UserError: the config or the data are not usable, or the run has no such step.
  """
  if count < 1:
    raise UserError(f'count={count}: at least 1 is needed')
  found = training_images(config, step)
  captions = []
  for target in found.targets[:count]:
    best = [i for i in np.argsort(-target, kind='stable')[:2] if target[i] >= _LEAST_SHARE]
    captions.append('\n'.join(f'{found.class_names[i]} {target[i]:.0%}' for i in best))
  figure = figures.gallery(LIGHT, list(found.pixels[:count]), captions, columns=6)
  figure.set(dpi=_DPI, facecolor='white')
  return figure
