"""Shears and translations, as Pillow's bicubic `transform` does them to the byte, but faster.

Pillow puts a cubic through four pixels of each of four rows, and a fifth one through the results.
Where only rows move, the fifth gives back the second result as it is, so that a single cubic is
enough; where only columns move, likewise. The formula and the order of the float64 operations are
Pillow's (src/libImaging/Geometry.c: affine_transform, BICUBIC). For equal bytes Pillow has to be
compiled without fused multiply-add, as its wheels for x86-64 are.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

_BLOCK = 1 << 15  # values at a time, which stay in the processor's cache


def transform(
  image: Image.Image, matrix: tuple[float, ...], fill: tuple[int, int, int]
) -> Image.Image:
  """Does `image.transform(image.size, AFFINE, matrix, BICUBIC, fillcolor=fill)`.

  Args:
    image: an RGB image of any size.
    matrix: a translation, (1, 0, x, 0, 1, 0) or (1, 0, 0, 0, 1, y), or a shear, (1, x, 0, 0, 1, 0)
      or (1, 0, 0, y, 1, 0).
    fill: the colour of what is uncovered.

  Returns:
    An RGB image of the same size.
  """
  _, shear_x, translate_x, shear_y, _, translate_y = matrix
  if shear_x or translate_x:
    result = _move_rows(image, shear_x, translate_x, fill)
  else:
    turned = image.transpose(Image.Transpose.TRANSPOSE)
    turned = _move_rows(turned, shear_y, translate_y, fill)
    result = turned.transpose(Image.Transpose.TRANSPOSE)
  result.info = image.info.copy()  # as Pillow does
  return result


def _move_rows(image, shear, translation, fill):
  width, height = image.size
  row = np.arange(height)
  move = shear * (row + 0.5) + translation  # the pixel at x shows what is at x + move
  whole = np.floor(move)
  least, most = int(whole.min()), int(whole.max())
  # The cubics are evaluated where the pixels are in the image: between the column before and the
  # one after, from `first` to `last` - 1. Then each row moves by whole pixels.
  first, last = max(least, -1), min(width + most, width)
  if first >= last:
    return Image.new('RGB', image.size, fill)
  source = np.asarray(image)
  padded = np.concatenate([source[:, :1]] * 2 + [source] + [source[:, -1:]] * 2, axis=1)
  padded = padded[:, first + 1 : last + 4].reshape(height, -1)
  # Results get so much of `fill` on both sides that every moved row is a part of them.
  left = 3 * min(first - least, width)
  right = left + 3 * (last - first)
  wide = np.empty((height, right + 3 * min(width + most - last, width)), np.uint8)
  wide[:, :left] = np.tile(np.uint8(fill), left // 3)
  wide[:, right:] = np.tile(np.uint8(fill), (wide.shape[1] - right) // 3)

  # Rows are taken in one piece, which is faster. The last three pixels of a row then have their
  # right neighbours in the next one, and no result.
  span = padded.shape[1]
  column = np.repeat(np.arange(first, last + 3), 3) + 0.5
  rows = -(-height // -(-height * span // _BLOCK))
  taps = np.zeros(rows * span + 9, np.int16)
  value = np.empty((rows, span))
  d = np.empty((rows if shear else 1, span))
  for top in range(0, height, rows):
    block = slice(min(top, height - rows), min(top + rows, height))
    taps[:-9].reshape(rows, span)[:] = padded[block]
    steps = taps[3:] - taps[:-3]
    v21, v32, v43 = steps[:-6], steps[3:-3], steps[6:]  # v2 - v1 and so on
    p4 = v21 + v43
    p1, p2, minus_p3, p4 = (p.reshape(rows, span) for p in (taps[3:-6], v21 + v32, p4 + v21, p4))
    # d is the same all along a row but for rounding, which truncation can make visible.
    np.subtract(column, whole[block][: len(d), None], out=d)
    d += move[block][: len(d), None]
    d -= column
    np.multiply(p4, d, out=value)
    value -= minus_p3
    value *= d
    value += p2
    value *= d
    value += p1
    wide[block, left:right] = np.clip(value.astype(np.int16), 0, 255)[:, :-9]

  # The image ends half a pixel beyond the centres of its first and its last column.
  if first == -1:
    wide[(-0.5 - whole) + move < 0, left : left + 3] = fill
  if last == width:
    wide[(width - 0.5 - whole) + move >= width, right - 3 : right] = fill
  start = np.clip(left // 3 - first + whole.astype(np.intp), 0, wide.shape[1] // 3 - width)
  windows = np.lib.stride_tricks.sliding_window_view(wide.reshape(-1), 3 * width)
  moved = windows[3 * start + row * wide.shape[1]]
  return Image.fromarray(moved.reshape(source.shape))
