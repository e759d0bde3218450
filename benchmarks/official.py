"""The real weights: logits against PyTorch, and top-1 on ImageNet's validation set.

    python benchmarks/official.py CvT-13-224x224-IN-1k.pth hf:microsoft/cvt-21
    python benchmarks/official.py CvT-13-224x224-IN-1k.pth --imagenet=VAL
    python benchmarks/official.py CvT-13-224x224-IN-1k.pth --authors=../CvT

Weights are files that are there, or names that huggingface_hub fetches because they are given.
VAL holds the validation images in a folder for each synset, n01440764 to n15075141.
"""

# ruff: noqa: E402  (the environment is set before transformers is imported)

import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Nothing here needs torchvision, and one built for another PyTorch takes transformers down.
sys.modules['torchvision'] = None

import jax
import jax.numpy as jnp

from benchmarks import authors, common
from cvt_flax import convert_weights, create_model, predict_images, save_pretrained
from cvt_flax.errors import UserError
from cvt_flax.weights import parity, pretrained
from cvt_flax.weights.description import imagenet_classes
from cvt_flax.weights.layouts import LAYOUTS, OFFICIAL


def main():
  parser = common.parser(__doc__)
  parser.add_argument('weights', nargs='*', metavar='W')
  parser.add_argument('--activation', default='quick_gelu', help="the authors', quick_gelu")
  parser.add_argument('--authors', help='a checkout of github.com/microsoft/CvT, to compare with')
  parser.add_argument('--imagenet', metavar='VAL', help='the validation images, in 1,000 folders')
  parser.add_argument('--batch_size', type=int, default=32)
  arguments = parser.parse_args()
  if bool(arguments.weights) == arguments.quick:
    parser.error('weights W are needed, or --quick, which takes random ones')
  jax.config.update('jax_default_matmul_precision', 'highest')
  with tempfile.TemporaryDirectory() as folder:
    if arguments.quick:
      arguments.weights = [random_weights(pathlib.Path(folder))]
    for source in arguments.weights:
      try:
        weights = pretrained.load(source, activation=arguments.activation)
      except UserError as e:
        sys.exit(f'official.py: {e}')
      for note in weights.notes:
        print(f'{source}: {note}')
      compare(arguments, source, weights)
      if arguments.imagenet:
        evaluate(arguments, source, weights)


def random_weights(folder):
  """Writes random weights of CvT-13 as the authors' files are; returns their path."""
  model = create_model('cvt-13')
  variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  save_pretrained(folder / 'random', model, variables)
  convert_weights(folder / 'random', folder / 'CvT-13-64x64-random.pth', to='official')
  return str(folder / 'CvT-13-64x64-random.pth')


def compare(arguments, source, weights):
  """Prints how far the logits of two random images are apart."""
  size = weights.description.preprocessing.image_size
  images = parity.random_images((size, size))
  if arguments.authors:
    module = authors.build(arguments.authors, weights.model, weights.variables)
    expected, _ = authors.run(module, images)
    ours = jax.device_get(jax.jit(weights.model.apply)(weights.variables, images))
    apart = parity.difference(ours, expected)
  else:
    layout = LAYOUTS.get(weights.kind, OFFICIAL)
    apart = parity.compare(weights.model, weights.variables, layout, images).logits
  print(f'{source}: logits differ from PyTorch by {apart:.1e} of the largest')


def evaluate(arguments, source, weights):
  """Prints top-1 and top-5 over all images of the folders."""
  synsets = list(imagenet_classes())
  folders = [pathlib.Path(arguments.imagenet) / synset for synset in synsets]
  missing = [folder for folder in folders if not folder.is_dir()]
  if missing:
    sys.exit(f'{missing[0]} is not a folder: all 1,000 are needed, {len(missing)} are missing')
  hits, hits5, images = 0, 0, 0
  found = predict_images(weights, folders, top=5, batch_size=arguments.batch_size)
  for prediction in found:
    label = synsets.index(pathlib.Path(prediction.image).parent.name)
    hits += prediction.classes[0] == label
    hits5 += label in prediction.classes
    images += 1
    if images % 1000 == 0:
      print(f'{images:,} images: top-1 {hits / images:.4f}', file=sys.stderr)
  print(f'{source}: top-1 {hits / images:.4%}, top-5 {hits5 / images:.4%} of {images:,} images')


if __name__ == '__main__':
  main()
