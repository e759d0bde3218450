"""Average pooling: PyTorch's with ceil_mode=True, by its documented definition and by itself."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cvt_flax.ops.pooling import average_pool, pooled_size

KERNELS = [  # kernel, stride, padding; PyTorch allows paddings up to half of the kernel
  (1, 1, 0),
  (1, 3, 0),
  (2, 2, 0),
  (2, 3, 1),
  (3, 1, 1),
  (3, 2, 1),
  (3, 3, 1),
  (3, 4, 0),
  (5, 2, 2),
]
SIZES = [(6, 6), (7, 8), (5, 9), (3, 10)]
CASES = [
  (size, *kernel)
  for size, kernel in itertools.product(SIZES, KERNELS)
  if min(size) + 2 * kernel[2] >= kernel[0]
]


def images(size):
  return np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)


def by_hand(x, kernel, stride, padding):
  """Windows may end behind the padding but not start there; what is behind does not count."""
  axes = []
  for n in x.shape[1:3]:
    starts = range(-padding, n + padding, stride)
    starts = [i for i in starts if i < n]  # none starts in the padding behind
    while len(starts) > 1 and starts[-2] + kernel >= n + padding:  # the one before has it all
      starts.pop()
    axes.append([(i, min(i + kernel, n + padding)) for i in starts])
  y = np.empty((len(x), len(axes[0]), len(axes[1]), x.shape[-1]))
  for (i, (top, bottom)), (j, (left, right)) in itertools.product(*map(enumerate, axes)):
    window = x[:, max(top, 0) : bottom, max(left, 0) : right].astype(np.float64)
    y[:, i, j] = window.sum((1, 2)) / ((bottom - top) * (right - left))
  return y


@pytest.mark.parametrize(('size', 'kernel', 'stride', 'padding'), CASES)
def test_against_the_definition(size, kernel, stride, padding):
  expected = by_hand(images(size), kernel, stride, padding)
  actual = jax.jit(average_pool, static_argnums=(1, 2, 3))(images(size), kernel, stride, padding)
  assert actual.shape[1:3] == tuple(pooled_size(n, kernel, stride, padding) for n in size)
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_against_pytorch(peer):
  torch = peer('torch')
  for size, kernel, stride, padding in (case for case in CASES if case[0] in SIZES[1:3]):
    x = torch.tensor(images(size).transpose(0, 3, 1, 2), requires_grad=True)
    y = torch.nn.AvgPool2d(kernel, stride, padding, ceil_mode=True)(x)
    torch.sin(y).sum().backward()

    def loss(x, geometry=(kernel, stride, padding)):
      y = average_pool(x, *geometry)
      return jnp.sum(jnp.sin(y)), y

    (_, actual), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(images(size))
    case = f'{size} {kernel} {stride} {padding}'
    for ours, theirs in ((actual, y), (gradient, x.grad)):
      theirs = theirs.detach().numpy().transpose(0, 2, 3, 1)
      np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6, err_msg=case)


def test_pooled_size_against_pytorch(peer):
  torch = peer('torch')
  grid = itertools.product(range(1, 12), (1, 2, 3, 5), (1, 2, 3, 4), (0, 1, 2))
  for n, kernel, stride, padding in grid:
    if 2 * padding <= kernel <= n + 2 * padding:
      pool = torch.nn.AvgPool1d(kernel, stride, padding, ceil_mode=True)
      expected = pool(torch.zeros(1, 1, n)).shape[-1]
      assert pooled_size(n, kernel, stride, padding) == expected, (n, kernel, stride, padding)


def test_dtype_is_kept():
  x = jnp.asarray(images((6, 6)), jnp.bfloat16)
  y = average_pool(x, 3, 2, 1)
  assert y.dtype == jnp.bfloat16
  expected = by_hand(np.asarray(x, np.float32), 3, 2, 1)
  np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-8)
