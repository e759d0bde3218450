"""Pixels as the network takes them."""

import jax
import jax.numpy as jnp


def normalize_pixels(
  images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]
) -> jax.Array:
  """Returns uint8 images [b h w 3] as (pixel / 255 - mean) / std, float32."""
  scale = jnp.asarray([1 / (255 * s) for s in std], jnp.float32)
  shift = jnp.asarray([-m / s for m, s in zip(mean, std, strict=True)], jnp.float32)
  return images.astype(jnp.float32) * scale + shift
