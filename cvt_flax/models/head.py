"""Another classifier, or none, on a network that has been trained."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp

from cvt_flax.models.compact import CompactViT
from cvt_flax.models.cvt import CvT


def replace_head(
  model: CvT | CompactViT, variables: Mapping, num_classes: int
) -> tuple[CvT | CompactViT, dict[str, Mapping]]:
  """Returns a model and variables for other classes: all is kept but the head, which starts anew.

      model, variables = replace_head(*load_pretrained('cvt-13/'), num_classes=37)

  Its kernel and bias are zero, as section 3.2 of https://arxiv.org/abs/2010.11929 has it for
  fine-tuning: the first logits are 0 for every class, and the first gradients go to the head alone.

  Args:
    model: the network, with a head or without.
    variables: {'params', 'batch_stats'}; not changed.
    num_classes: length of the logits; 0 for no head, so that the model returns its pooled features.

  Raises:
    ValueError: `num_classes` is negative.
  """
  model = model.clone(num_classes=num_classes)
  params = {name: value for name, value in variables['params'].items() if name != 'head'}
  if num_classes:
    features = model.width if isinstance(model, CompactViT) else model.embed_dims[-1]
    kernel = jnp.zeros((features, num_classes), jnp.float32)
    params['head'] = {'kernel': kernel, 'bias': jnp.zeros(num_classes, jnp.float32)}
  return model, dict(variables) | {'params': params}
