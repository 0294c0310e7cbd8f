"""Keeps random numbers of each block, the same places on all workers."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxdist.compressors.base import Compressor
from jaxdist.compressors.checks import (
  call,
  check_block_size,
  check_density,
  check_flag,
)
from jaxdist.compressors.top_k import Sparse, num_kept


def unseeded(name: str):
  """An ``encode`` or ``decode`` that says what is missing."""

  def refuse(*args):
    del args
    raise ValueError(
      f'{name} draws from a key that all workers share; '
      'use it through .at(shared_key).'
    )

  return refuse


def random_k(
  density: float, *, block_size: int = 1024, unbiased: bool = False
) -> Compressor:
  r"""Keeps random numbers of each block.

  .. math::

    D(E(x))_i = \begin{cases} c \, x_i & i \in S \\ 0 & \text{otherwise}
    \end{cases} \qquad |S| = k = \max(1, \mathrm{round}(\text{density} \cdot
    B))

  The places :math:`S` are drawn from a key that all workers share, once for all
  blocks, so they cost nothing to send and payloads may be summed.
  :math:`c = 1`, or with ``unbiased=True`` :math:`c = B / k`.

  **On the wire:** ``32 * density`` bits a number.

  Contraction :math:`k / B` in expectation, as each number is kept with that
  probability. Unbiased, :math:`2 - B / k`: the variance is :math:`(B / k - 1)
  \|x\|^2`. Linear. A block with a NaN or an infinity anywhere decodes to NaN.

  Args:
    density: the part of the numbers that is kept, in (0, 1].
    block_size: numbers in a block, a multiple of 128.
    unbiased: whether to scale up what is kept, so that the expectation is
      right. Error feedback wants ``False``.

  Returns:
    A :class:`Compressor`, to be used through ``.at(shared_key)``.

  Raises:
    ValueError: if ``density`` or ``block_size`` is not as above.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxdist as jd
    >>> code = jd.random_k(0.5).at(jax.random.key(0))
    >>> x = jnp.array([[1., 2., 3., 4.]])
    >>> int((code.decode(code.encode(x, jax.random.key(1))) == x).sum())
    2

  References:
    Stich et al, `Sparsified SGD with Memory
    <https://arxiv.org/abs/1809.07599>`_, 2018
  """
  density = check_density(density)
  block_size = check_block_size(block_size)
  check_flag('unbiased', unbiased)
  options = {'unbiased': True} if unbiased else {}
  name = call('random_k', density, **options, block_size=block_size)
  k = num_kept(density, block_size)

  def seeded(shared_key):
    def places(size):
      k = num_kept(density, size)
      return jnp.sort(jax.random.choice(shared_key, size, (k,), replace=False))

    def encode(x, key):
      del key
      size = x.shape[1]
      values = x[:, places(size)]
      if unbiased:
        # Finite numbers near the end of the range stay finite.
        largest = float(jnp.finfo(jnp.float32).max)
        values = values * (size / num_kept(density, size))
        values = jnp.clip(values, -largest, largest)
      finite = jnp.isfinite(x).all(axis=1, keepdims=True)
      return Sparse(jnp.where(finite, values, jnp.nan), None, size)

    def decode(payload):
      kept = places(payload.size)
      # A gather from the few, with a mask, is faster than a scatter.
      source = jnp.zeros(payload.size, jnp.int32)
      source = source.at[kept].set(jnp.arange(len(kept)))
      mask = jnp.zeros(payload.size, bool).at[kept].set(True)
      return jnp.where(mask, payload.values[:, source], 0.0)

    return dataclasses.replace(code, encode=encode, decode=decode, seeded=None)

  code = Compressor(
    name=name,
    encode=unseeded(name),
    decode=unseeded(name),
    block_size=block_size,
    contraction=2 - block_size / k if unbiased else k / block_size,
    unbiased=unbiased or k == block_size,
    linear=True,
    seeded=seeded,
  )
  return code
