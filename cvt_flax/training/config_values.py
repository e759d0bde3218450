"""How a key is declared, and whether a value is of its type and within its bounds."""

import dataclasses
import math
import typing

from cvt_flax.errors import UserError, nearest

_ARTICLES = {str: 'a string', int: 'an integer', float: 'a number', bool: 'true or false'}


def key(default, doc: str, *, allowed=None, low=None, high=None, used=None):
  """Declares a config key.

  Args:
    default: its default; its type is the key's.
    doc: what it means.
    allowed: the values it may have.
    low, high: bounds, both inclusive, of the number or of each number of a tuple.
    used: (predicate of the whole config, the condition in words): when the key has an effect.
      Moving it off its default while the condition does not hold is an error.
  """
  metadata = dict(doc=doc, allowed=allowed, low=low, high=high, used=used)
  return dataclasses.field(default=default, metadata=metadata)


def typed(name: str, value, kind: type):
  """Returns the value in its declared type; an int may stand for a float, a list for a tuple.

  Raises:
    UserError: it is of another type.
  """
  if typing.get_origin(kind) is tuple:
    element = typing.get_args(kind)[0]
    if not isinstance(value, tuple | list):
      raise UserError(f'{name}={value!r}: a tuple of {element.__name__} is needed')
    return tuple(typed(name, v, element) for v in value)
  if kind is float and type(value) is int:
    return float(value)
  if type(value) is not kind:
    raise UserError(f'{name}={value!r}: {_ARTICLES[kind]} is needed')
  return value


def check_value(name: str, field: dataclasses.Field, value) -> None:
  """Raises a UserError when a value is none of those allowed, not finite or out of bounds."""
  allowed, low, high = (field.metadata[k] for k in ('allowed', 'low', 'high'))
  if allowed and value not in allowed:
    words = [repr(a) for a in allowed if a != '']
    raise UserError(
      f'{name}={value!r}: one of {", ".join(words)} is needed{nearest(value, allowed)}'
    )
  for number in value if isinstance(value, tuple) else (value,):
    if isinstance(number, float) and not math.isfinite(number):
      raise UserError(f'{name}={value!r}: a finite number is needed')
    if low is not None and number < low:
      raise UserError(f'{name}={value!r}: at least {low} is needed')
    if high is not None and number > high:
      raise UserError(f'{name}={value!r}: at most {high} is allowed')
