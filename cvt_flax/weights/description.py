"""What has to be known of weights to use them: architecture, class names, preprocessing."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import unicodedata
from collections.abc import Mapping

from cvt_flax.errors import UserError
from cvt_flax.models.compact import CompactViT
from cvt_flax.models.cvt import CvT
from cvt_flax.ops.logits import num_classes
from cvt_flax.weights import architecture, preprocessing
from cvt_flax.weights.preprocessing import Preprocessing

# What makes a config.json ours.
LIBRARY = 'cvt_flax'


@dataclasses.dataclass(frozen=True)
class Description:
  """What has to be known of weights to use them.

  Attributes:
    model: the network.
    class_names: what the logits stand for, in their order; () where that is not known. A single
      logit stands for the second of two classes.
    preprocessing: what images go through before it.
  """

  model: CvT | CompactViT
  class_names: tuple[str, ...]
  preprocessing: Preprocessing

  def __post_init__(self):
    for name in self.class_names:
      if not isinstance(name, str) or any(map(_is_unprintable, name)):
        raise UserError(f'class name {name!r}: printable text is needed')
    names, classes = len(self.class_names), self.model.num_classes
    if names and names != num_classes(classes):
      raise UserError(f'{names} class names do not fit the {classes} classes of the model')


def _is_unprintable(letter):
  """Whether it is a control, ends a line or turns text around; joiners of letters are none."""
  is_turn = '\u202a' <= letter <= '\u202e' or '\u2066' <= letter <= '\u2069'
  return is_turn or unicodedata.category(letter) in ('Cc', 'Cs', 'Zl', 'Zp')


def config_json(description: Description) -> dict:
  """Returns config.json of our own layout."""
  return {
    'library_name': LIBRARY,
    'architecture': architecture.attributes(description.model),
    'id2label': id2label(description.class_names),
  }


def run_json(description: Description) -> dict:
  """Returns model.json of a run folder: config.json with the preprocessing in it."""
  return config_json(description) | {
    'preprocessor': preprocessing.to_json(description.preprocessing)
  }


def from_json(
  config: Mapping, preprocessor: Mapping, where: str, preprocessor_where: str
) -> Description:
  """Returns what config.json and preprocessor_config.json of our own layout say.

  Args:
    config, preprocessor: the objects in them.
    where, preprocessor_where: they were read, for messages.

  Raises:
    UserError: one of them is damaged.
  """
  return described(
    architecture.from_attributes(config.get('architecture'), where),
    config,
    where,
    preprocessing.from_json(preprocessor, preprocessor_where),
  )


def described(
  model: CvT | CompactViT, config: Mapping, where: str, steps: Preprocessing
) -> Description:
  """Returns the description of a model with the class names of its config.json.

  Raises:
    UserError: they are damaged, or more or fewer than the model's classes.
  """
  names = class_names(config, where)
  try:
    return Description(model, names, steps)
  except UserError as e:
    raise UserError(f'{where}: {e}') from e


def id2label(class_names: tuple[str, ...]) -> dict[str, str]:
  return {str(i): name for i, name in enumerate(class_names)}


def class_names(config: Mapping, where: str) -> tuple[str, ...]:
  """Returns the names in 'id2label' by their number.

  transformers fills in LABEL_0, LABEL_1, ... where nobody gave names: these are none.

  Raises:
    UserError: it is damaged, or numbers are missing.
  """
  labels = config.get('id2label') or {}
  if not isinstance(labels, Mapping) or not all(isinstance(v, str) for v in labels.values()):
    raise UserError(f'{where}: id2label: an object of names is needed')
  names = [labels.get(str(i)) for i in range(len(labels))]
  if None in names:
    raise UserError(f'{where}: id2label: the numbers from 0 to {len(labels) - 1} are needed')
  if all(name == f'LABEL_{i}' for i, name in enumerate(names)):
    return ()
  return tuple(names)


@functools.cache
def imagenet_classes() -> dict[str, str]:
  """Returns {synset: name} of the 1,000 classes of ILSVRC 2012, in their order.

  The names are the synsets' lemmas in WordNet 3.0.
  """
  text = importlib.resources.files(__package__).joinpath('imagenet_classes.tsv').read_text('utf-8')
  return dict(line.split('\t') for line in text.splitlines())


def same_classes(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
  """Returns whether names are of the same classes: () may be any, synsets are ImageNet's names."""

  def spelled(names):
    return tuple(imagenet_classes().get(name, name) for name in names)

  return not a or not b or spelled(a) == spelled(b)
