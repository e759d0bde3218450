"""Position embeddings that were learnt for images of one size, for those of another."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from einops import rearrange

from cvt_flax.models.compact import CompactViT
from cvt_flax.models.compact_options import resolve_compact


def resize_positions(
  model: CompactViT, variables: Mapping, image_size: int
) -> tuple[CompactViT, dict[str, Mapping]]:
  """Returns a model and variables for images of another size.

      model, variables = resize_positions(*load_pretrained('cct.pth'), image_size=64)

  Positions that are learnt are a map, which is resized bicubically; a class token keeps its own. A
  CvT needs nothing of the kind: it takes images of any size as it is.

  Args:
    model: the network.
    variables: {'params'}; not changed.
    image_size: height and width of the images.

  Raises:
    ValueError: images of that size leave no token, or patches do not divide them.
  """
  old = resolve_compact(model).map_size(model.image_size, model.image_size)
  model = model.clone(image_size=image_size)
  params, options = dict(variables['params']), resolve_compact(model)
  if 'pos_embed' in params:
    cls, tokens = jnp.split(params['pos_embed'], [int(options.cls_token)], axis=1)
    tokens = rearrange(tokens, '1 (h w) c -> 1 h w c', h=old[0])
    new = (1, *options.map_size(image_size, image_size), tokens.shape[-1])
    tokens = rearrange(jax.image.resize(tokens, new, 'bicubic'), '1 h w c -> 1 (h w) c')
    params['pos_embed'] = jnp.concatenate([cls, tokens], axis=1)
  return model, dict(variables) | {'params': params}
