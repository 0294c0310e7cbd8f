"""One bit a number: its sign, times the block's mean magnitude."""

from jaxdist.compressors.base import Compressor
from jaxdist.compressors.checks import call, check_block_size
from jaxdist.compressors.quantize import codec


def sign(*, block_size: int = 1024) -> Compressor:
  r"""Keeps the sign of each number and the mean magnitude of its block.

  .. math::

    D(E(x)) = \frac{\|x\|_1}{B} \, \mathrm{sign}(x)

  where the sign of zero is positive.

  **On the wire:** ``1 + 32 / block_size`` bits a number.

  Contraction :math:`1 / B`, with :math:`B` the block size: the code is the
  projection of :math:`x` on its signs, which leaves :math:`\|x\|^2 - \|x\|_1^2
  / B`, and :math:`\|x\|_1 \ge \|x\|`. On a Gaussian it is :math:`2 / \pi`.

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
    >>> code = jd.sign()
    >>> x = jnp.array([[1., -3., 2., 2.]])
    >>> code.decode(code.encode(x, jax.random.key(0)))
    Array([[ 2., -2.,  2.,  2.]], dtype=float32)

  References:
    Karimireddy et al, `Error Feedback Fixes SignSGD
    <https://arxiv.org/abs/1901.09847>`_, 2019
  """
  block_size = check_block_size(block_size)

  return Compressor(
    name=call('sign', block_size=block_size),
    **codec('sign', 1),
    block_size=block_size,
    contraction=1 / block_size,
  )
