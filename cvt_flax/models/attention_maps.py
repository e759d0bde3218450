"""What attention looks at: the weights of the last block of every stage, as maps."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from cvt_flax.models.compact import CompactViT
from cvt_flax.models.cvt import CvT
from cvt_flax.models.geometry import stage_geometry


def attention_maps(
  model: CvT | CompactViT, variables: Mapping, images: Float[Array, 'b h w c']
) -> list[Float[Array, 'b heads h2 w2']]:
  """Returns, for every stage, how its last block divides its attention over the image.

  These are the weights softmax(scale q k^T) of the class token where the stage has one, otherwise
  their mean over all queries. They are computed from the queries and keys that the model sows, for
  those queries alone. A CompactViT has one stage.

  Args:
    model: the network.
    variables: {'params', 'batch_stats'}.
    images: normalised, as the model takes them.

  Returns:
    float32 maps over the keys, a grid over the image: with the default kv_strides h2 x w2 is half
    the stage's map, 28, 14 and 7 for images of 224x224. To draw one over the image, resize it. A
    map sums to 1, less the weight of the class token's own key where there is one. With pool='seq'
    there is one more, of one head: the weights by which the tokens are pooled.
  """
  _, state = model.apply(variables, images, mutable=['intermediates'])
  sown, maps = state['intermediates'], []
  for s, stage in enumerate(stage_geometry(model, *images.shape[1:3])):
    o, size = stage.options, (stage.height, stage.width)
    blocks = sown if isinstance(model, CompactViT) else sown[f'stage{s}']
    last = blocks[f'blocks_{o.depth - 1}']['attn']
    (queries,), (keys,) = last['queries'], last['keys']
    weights = _mean_weights(queries[:, -1:] if o.cls_token else queries, keys, o.scale)
    key_size = size if isinstance(model, CompactViT) else o.key_map_size(*size)
    maps.append(_as_map(weights[..., : math.prod(key_size)], key_size))
  if model.pool == 'seq':
    (weights,) = sown['seq_pool']['weights']
    maps.append(_as_map(weights[:, None], size))
  return maps


def _as_map(weights, size):
  return rearrange(weights, 'b n (h w) -> b n h w', h=size[0])


def _mean_weights(
  queries: Float[Array, 'b t n d'], keys: Float[Array, 'b s n d'], scale: float
) -> Float[Array, 'b n s']:
  """Returns the mean over the queries of softmax(scale q k^T), for each of n heads."""

  def image(inputs):
    q, k = inputs
    scores = jnp.einsum('tnd,snd->nts', q * scale, k, preferred_element_type=jnp.float32)
    return jnp.mean(jax.nn.softmax(scores), axis=1)

  # One by one: the scores of all queries are large.
  return jax.lax.map(image, (queries, keys))
