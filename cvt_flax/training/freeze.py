"""optimizer.freeze: parameters that a run leaves as they are, byte for byte.

The trained parameters are cut out of the tree before anything is done with them, so no gradient,
optimizer state, weight decay or norm knows of the others. A module of which no parameter is trained
computes as in evaluation: its batch norms normalise by their running statistics and leave these
alone, its dropouts and drop paths are off. The root always computes as in training, so what acts in
it acts: the dropout of a CompactViT's tokens.
"""

import contextlib
import dataclasses
import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any

import flax.linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from cvt_flax.errors import UserError

BACKBONE = 'backbone'
_HEAD = 'head'

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Frozen:
  """What is not trained.

  Attributes:
    parameters: paths of parameters, ('stage0', 'patch_embed', 'norm', 'scale') for example.
    modules: paths of the modules that have parameters, none of which is trained.
  """

  parameters: frozenset[Path] = frozenset()
  modules: frozenset[Path] = frozenset()

  def trained(self, params: dict) -> dict:
    """Returns a tree of parameters without the frozen ones."""
    flat = flatten_dict(params)
    return unflatten_dict({path: x for path, x in flat.items() if path not in self.parameters})

  def joined(self, trained: dict, params: dict) -> dict:
    """Returns `params` with the trained parameters in place of its own."""
    return unflatten_dict(flatten_dict(params) | flatten_dict(trained))

  def statistics(self, batch_stats: dict) -> dict[Path, Any]:
    """Returns {path: array} of the running statistics of frozen batch norms."""
    return {p: x for p, x in flatten_dict(batch_stats).items() if p[:-1] in self.modules}

  def kept(self, new: dict, old: dict) -> dict:
    """Returns `new`, {'params', 'batch_stats'}, with what is frozen as it is in `old`.

    To be left alone is not enough: the average of a number and itself may be rounded.
    """
    params = {p: x for p, x in flatten_dict(old['params']).items() if p in self.parameters}
    return {
      'params': self.joined(unflatten_dict(params), new['params']),
      'batch_stats': unflatten_dict(
        flatten_dict(new['batch_stats']) | self.statistics(old['batch_stats'])
      ),
    }

  @contextlib.contextmanager
  def in_evaluation(self) -> Iterator[None]:
    """Calls frozen modules with train=False, whoever applies a model while the block lasts."""

    def call(method, args, kwargs, context):
      if context.module.path in self.modules:
        bound = inspect.signature(context.orig_method).bind(*args, **kwargs)
        if 'train' in bound.arguments:
          bound.arguments['train'] = False
          args, kwargs = bound.args, bound.kwargs
      return method(*args, **kwargs)

    with nn.intercept_methods(call):
      yield


def find_frozen(freeze: str, paths: Iterable[Path]) -> Frozen:
  """Returns what a config freezes.

  Args:
    freeze: optimizer.freeze: '' or 'none' for nothing, 'backbone' for all but the head, or a
      regular expression for the whole of a parameter's name, such as 'stage[01]/.*'.
    paths: of all parameters.

  Raises:
    UserError: it is of no parameter, or of all of them.
  """
  if freeze in ('', 'none'):
    return Frozen()
  paths = sorted(paths)
  if freeze == BACKBONE:
    parameters = {path for path in paths if path[0] != _HEAD}
  else:
    parameters = {path for path in paths if re.fullmatch(freeze, '/'.join(path))}
  if len(parameters) in (0, len(paths)):
    some = ', '.join('/'.join(path) for path in (paths[0], paths[-1]))
    what = 'all' if parameters else 'none'
    raise UserError(
      f'optimizer.freeze={freeze!r} is the name of {what} of the {len(paths)} parameters, from '
      f'{some}; some of them are needed, by {BACKBONE!r} or an expression such as {"stage0/.*"!r}'
    )

  def modules_of(paths):
    return {path[:depth] for path in paths for depth in range(len(path))}

  trained = modules_of(set(paths) - parameters)
  return Frozen(frozenset(parameters), frozenset(modules_of(parameters) - trained))
