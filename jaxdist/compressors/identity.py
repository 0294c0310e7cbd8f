"""No compression: the numbers themselves."""

from jaxdist.compressors.base import Compressor
from jaxdist.compressors.checks import call, check_block_size


def identity(*, block_size: int = 1024) -> Compressor:
  r"""Sends the numbers as they are.

  .. math::

    D(E(x)) = x

  The limit of every other code, and the baseline to compare with.

  **On the wire:** 32 bits a number.

  Contraction 1: nothing is lost. Linear and unbiased.

  Args:
    block_size: numbers in a block, a multiple of 128.

  Returns:
    A :class:`Compressor`.

  Raises:
    ValueError: if ``block_size`` is not a positive multiple of 128.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxdist as jd
    >>> code = jd.identity()
    >>> code.decode(code.encode(jnp.array([[1.5, -2.]]), jax.random.key(0)))
    Array([[ 1.5, -2. ]], dtype=float32)
  """
  block_size = check_block_size(block_size)
  return Compressor(
    name=call('identity', block_size=block_size),
    encode=lambda x, key: x,
    decode=lambda payload: payload,
    block_size=block_size,
    contraction=1.0,
    unbiased=True,
    linear=True,
  )
