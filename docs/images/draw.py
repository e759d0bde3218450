"""Draws the pictures of README that need no run: python docs/images/draw.py, in a checkout.

The cat is scikit-image's `chelsea`, by Stefan van der Walt, CC0; the weights are those that come
along.
"""

# ruff: noqa: E402  (the checkout goes first)

import pathlib
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from PIL import Image
from skimage import data

from cvt_flax import create_model, notebook, predict_images

WEIGHTS = 'cvt-nano-cifar10'


def main():
  with tempfile.TemporaryDirectory() as folder:
    cat = pathlib.Path(folder, 'cat.png')
    Image.fromarray(data.chelsea()).save(cat)
    figures = {
      'model': notebook.draw_model(create_model('cvt-13'), image_size=224),
      'prediction': notebook.draw_predictions(predict_images(WEIGHTS, [cat])),
      'attention': notebook.draw_attention(WEIGHTS, [cat]),
    }
    for name, figure in figures.items():
      figure.savefig(HERE / f'{name}.png')


if __name__ == '__main__':
  main()
