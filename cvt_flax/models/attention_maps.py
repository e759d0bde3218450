"""What attention looks at: the weights of the last block of every stage, as maps."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from cvt_flax.models.cvt import CvT
from cvt_flax.models.geometry import stage_geometry


def attention_maps(
  model: CvT, variables: Mapping, images: Float[Array, 'b h w c']
) -> list[Float[Array, 'b heads h2 w2']]:
  """Returns, for every stage, how its last block divides its attention over the image.

  These are the weights softmax(scale q k^T) of the class token where the stage has one, otherwise
  their mean over all queries. They are computed from the queries and keys that the model sows, for
  those queries alone.

  Args:
    model: the network.
    variables: {'params', 'batch_stats'}.
    images: normalised, as the model takes them.

  Returns:
    float32 maps over the keys, a grid over the image: with the default kv_strides h2 x w2 is half
    the stage's map, 28, 14 and 7 for images of 224x224. To draw one over the image, resize it. A
    map sums to 1, less the weight of the class token's own key where there is one.
  """
  _, state = model.apply(variables, images, mutable=['intermediates'])
  maps = []
  for s, stage in enumerate(stage_geometry(model, *images.shape[1:3])):
    o = stage.options
    sown = state['intermediates'][f'stage{s}'][f'blocks_{o.depth - 1}']['attn']
    (queries,), (keys,) = sown['queries'], sown['keys']
    weights = _mean_weights(queries[:, :1] if o.cls_token else queries, keys, o.scale)
    height, width = o.key_map_size(stage.height, stage.width)
    weights = weights[..., int(o.cls_token) :]
    maps.append(rearrange(weights, 'b n (h w) -> b n h w', h=height, w=width))
  return maps


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
