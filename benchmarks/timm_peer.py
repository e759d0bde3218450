"""timm's input pipeline in PyTorch's DataLoader, of its own files: what ours is compared with.

PyTorch is imported inside functions: what is imported here, the tests load without it.
"""

import ast
import functools
import importlib.util
import itertools
import pathlib
import sys
import types

import numpy as np
from PIL import Image


def batches(paths, train, size, workers, batch_size):
  """Yields batches of timm in PyTorch's DataLoader, uint8 [b, h, w, 3], without end.

  The sampler goes on from epoch to epoch, as timm's MultiEpochsDataLoader does; else the workers
  would wait for each other at the end of each.
  """
  import torch

  folder = Folder(paths, train_transform(size) if train else eval_transform(size))
  loader = torch.utils.data.DataLoader(
    folder,
    batch_size=batch_size,
    sampler=torch.utils.data.RandomSampler(folder, num_samples=10**9)
    if train
    else itertools.cycle(range(len(folder))),
    num_workers=workers,
    collate_fn=fast_collate(),
    drop_last=True,
    multiprocessing_context='fork',  # its own choice, but for this process being a spawned one
  )
  for images, _ in loader:
    yield images.permute(0, 2, 3, 1).numpy()


class Folder:
  """Images and labels for a DataLoader, read as torchvision's ImageFolder and timm's dataset do."""

  def __init__(self, paths, transform):
    self.paths, self.transform = paths, transform

  def __len__(self):
    return len(self.paths)

  def __getitem__(self, index):
    with open(self.paths[index], 'rb') as file:
      image = Image.open(file).convert('RGB')
    return self.transform(image), index


def train_transform(size):
  """Returns what timm's transforms_factory.py puts together for the official training.

  Where its magnitude is at the limit, for one image in 650, it posterizes to 0 bits: to black, as
  Pillow once did, but Pillow 13 refuses. This is mended, so that the peer gets through.
  """
  import torch

  crops, policies = load('data/transforms.py'), load('data/auto_augment.py')
  refusing = policies.NAME_TO_OP['PosterizeIncreasing']
  policies.NAME_TO_OP['PosterizeIncreasing'] = lambda image, bits, **options: (
    refusing(image, bits, **options) if bits else Image.new(image.mode, image.size)
  )
  crop = crops.RandomResizedCropAndInterpolation(size, interpolation='bicubic')
  options = {
    'translate_const': int(size * 0.45),
    'img_mean': (124, 116, 104),
    'interpolation': crops.str_to_pil_interp('bicubic'),
  }
  policy = policies.rand_augment_transform('rand-m9-mstd0.5-inc1', options)
  to_tensor = crops.MaybePILToTensor()

  def transform(image):
    image = crop(image)
    if torch.rand(1) < 0.5:  # torchvision's RandomHorizontalFlip
      image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return to_tensor(policy(image))

  return transform


def eval_transform(size):
  """Returns Resize and CenterCrop, as torchvision does them in Pillow, to timm's tensor."""
  to_tensor = load('data/transforms.py').MaybePILToTensor()
  shorter = int(size / 0.875)

  def transform(image):
    width, height = image.size
    if width <= height:
      width, height = shorter, int(shorter * height / width)
    else:
      width, height = int(shorter * width / height), shorter
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return to_tensor(image.crop((left, top, left + size, top + size)))

  return transform


def fast_collate():
  """Returns timm's fast_collate, cut out of its file: all of that needs torchvision."""
  import torch

  tree = ast.parse(_find('data/loader.py').read_text())
  tree.body = [node for node in tree.body if getattr(node, 'name', '') == 'fast_collate']
  names = {'np': np, 'torch': torch, 'default_collate': torch.utils.data.default_collate}
  exec(compile(tree, 'fast_collate', 'exec'), names)
  return names['fast_collate']


@functools.cache
def load(path):
  """Loads one file of timm, 'data/transforms.py' for one, as a module of its own.

  timm as a whole needs torchvision, which fails to import beside a PyTorch built otherwise; these
  files need a few of its names, for which stand-ins are there while they are loaded.
  """
  name = f'timm.{path.removesuffix(".py").replace("/", ".")}'
  spec = importlib.util.spec_from_file_location(name, _find(path))
  module = importlib.util.module_from_spec(spec)
  stand_ins = _torchvision_stand_ins()
  # Not by mock.patch.dict: that would also forget what is imported meanwhile, PyTorch for one.
  before = {name: sys.modules[name] for name in stand_ins if name in sys.modules}
  sys.modules.update(stand_ins)
  try:
    spec.loader.exec_module(module)
  finally:
    for name in stand_ins:
      del sys.modules[name]
    sys.modules.update(before)
  return module


def _torchvision_stand_ins():
  """Returns {name: module}: what timm asks of torchvision, which do the same on Pillow images."""
  torchvision = types.ModuleType('torchvision')
  transforms = types.ModuleType('torchvision.transforms')
  functional = types.ModuleType('torchvision.transforms.functional')
  torchvision.transforms, transforms.functional = transforms, functional
  transforms.ToTensor = object  # a base class there
  functional.get_image_size = lambda image: image.size

  def resized_crop(image, top, left, height, width, size, interpolation):
    cropped = image.crop((left, top, left + width, top + height))
    return cropped.resize(size[::-1], interpolation)

  def pil_to_tensor(image):
    import torch

    return torch.as_tensor(np.array(image)).permute(2, 0, 1)

  functional.resized_crop, functional.pil_to_tensor = resized_crop, pil_to_tensor
  return {module.__name__: module for module in (torchvision, transforms, functional)}


def _find(path):
  (folder,) = importlib.util.find_spec('timm').submodule_search_locations
  return pathlib.Path(folder, path)
