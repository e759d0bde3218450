"""Position embeddings that were learnt for images of one size, for those of another."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from einops import rearrange

from cvt_flax.models.compact import CompactViT
from cvt_flax.models.compact_options import resolve_compact
from cvt_flax.models.cvt import CvT


def resize_positions(
  model: CvT | CompactViT, variables: Mapping, image_size: int
) -> tuple[CvT | CompactViT, dict[str, Mapping]]:
  """Returns a model and variables for images of another size.

      model, variables = resize_positions(*load_pretrained('cct.pth'), image_size=64)

  The positions that a CompactViT has learnt are a map, which is resized bicubically; a class token
  keeps its own. Nothing changes where none are learnt, nor in a CvT, which resizes its own as it
  runs.

  Args:
    model: the network.
    variables: {'params', 'batch_stats'}; not changed.
    image_size: height and width of the images.

  Raises:
    ValueError: positions are learnt, and patches do not divide such images.
  """
  if not isinstance(model, CompactViT) or model.position != 'learnable':
    return model, dict(variables)
  old = resolve_compact(model).map_size(model.image_size, model.image_size)
  model = model.clone(image_size=image_size)
  options = resolve_compact(model)
  cls, tokens = jnp.split(variables['params']['pos_embed'], [int(options.cls_token)], axis=1)
  tokens = rearrange(tokens, '1 (h w) c -> 1 h w c', h=old[0])
  new = (1, *options.map_size(image_size, image_size), tokens.shape[-1])
  tokens = rearrange(jax.image.resize(tokens, new, 'bicubic'), '1 h w c -> 1 (h w) c')
  table = jnp.concatenate([cls, tokens], axis=1)
  params = {**variables['params'], 'pos_embed': table}
  return model, {**variables, 'params': params}
