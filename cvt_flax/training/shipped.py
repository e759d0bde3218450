"""The experiments that come along, by name."""

import importlib.util
import inspect
import pathlib

import ml_collections

from cvt_flax.errors import UserError, nearest

_PACKAGE = pathlib.Path(__file__).resolve().parent.parent


def get_config(name: str) -> ml_collections.ConfigDict:
  """Returns the config of a file in configs/, to change and to hand to `train`.

      config = get_config('cvt13_cifar10')
      config.epochs = 20
      train(config)

  Args:
    name: of the file without its ending, and of its variant where it has any: 'cvt13_cifar10',
      'cvt13_cifar10:small_images'.

  Raises:
    UserError: there is no such file or variant.
  """
  stem, _, variant = name.partition(':')
  files = {path.stem: path for path in shipped_configs()}
  if stem not in files:
    known = sorted(files)
    close = nearest(stem, known)
    raise UserError(f'config {stem!r}: one of {", ".join(known)} is needed{close}')
  # By its path: in a checkout, configs/ is no package.
  spec = importlib.util.spec_from_file_location(f'cvt_flax.configs.{stem}', files[stem])
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if variant and not inspect.signature(module.get_config).parameters:
    raise UserError(f'config {name!r}: {stem} has no variants')
  return module.get_config(*[variant] if variant else [])


def shipped_configs() -> list[pathlib.Path]:
  """Returns the files of configs/: inside the installed package, beside it in a checkout.

  Where they lie below the working directory their paths are from there.
  """
  inside = _PACKAGE / 'configs'
  folder = inside if inside.is_dir() else _PACKAGE.parent / 'configs'
  here = pathlib.Path.cwd()
  folder = folder.relative_to(here) if folder.is_relative_to(here) else folder
  return sorted(path for path in folder.glob('*.py') if path.stem != '__init__')
