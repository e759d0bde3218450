"""The installed wheel, with what it declares to need and nothing else: it loads, predicts, trains.

Run by .ci/run in bare environments, from a folder that is not the checkout.
"""

import importlib
import importlib.resources
import importlib.util
import os
import pathlib
import pkgutil
import subprocess
import sys
import tempfile

import numpy as np
from PIL import Image

import cvt_flax

# As in the tests: compiling costs more than computing here.
os.environ['XLA_FLAGS'] = (
  '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
)


def main():
  assert pathlib.Path(cvt_flax.__file__).is_relative_to(sys.prefix), cvt_flax.__file__
  for framework in ('tensorflow', 'torch'):
    assert importlib.util.find_spec(framework) is None, f'{framework} is installed'
  for module in pkgutil.walk_packages(cvt_flax.__path__, 'cvt_flax.'):
    if not module.name.endswith('__main__'):
      importlib.import_module(module.name)
  assert cvt_flax.get_config('cvt13_cifar10').epochs == 10
  listed = [sys.executable, '-m', 'cvt_flax.training', '--list-configs']
  assert b'cvt13_cifar10.py' in subprocess.check_output(listed)
  assert (importlib.resources.files(cvt_flax) / 'py.typed').is_file()

  assert cvt_flax.create_model('cvt-13', num_classes=10).num_classes == 10
  model, variables = cvt_flax.load_pretrained('cvt-nano-cifar10')
  assert model.num_classes == 10 and set(variables) == {'params', 'batch_stats'}

  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (40, 50, 3), 'uint8')).save(folder / 'picture.png')
    (prediction,) = cvt_flax.predict_images('cvt-nano-cifar10', folder / 'picture.png', top=10)
    assert abs(sum(prediction.probabilities) - 1) < 1e-5, prediction

    config = cvt_flax.get_config('digits')
    arrays = {'x': rng.integers(0, 256, (64, 32, 32, 3), 'uint8'), 'y': np.arange(64) % 4}
    parts = {f'{name}_{part}': arrays[name] for name in arrays for part in ('train', 'test')}
    np.savez(folder / 'arrays.npz', **parts)
    config.source = f'npz:{folder}/arrays.npz'
    config.batch_size = 16
    config.steps, config.epochs = 2, 10
    config.optimizer.warmup_epochs = 0.0
    config.model.depths = (1, 1, 1)
    config.closing_note = ''
    metrics = cvt_flax.train(config, folder / 'run')
    assert metrics['test/images'] == 64, metrics
    assert (folder / 'run' / 'report' / 'index.html').is_file()
  print('cvt_flax', cvt_flax.__version__, 'from its wheel on Python', sys.version.split()[0])


if __name__ == '__main__':  # workers that decode import this file
  main()
