"""Rounding to a uniform grid of 8, 4 or 2 bits, scaled for each block."""

import math
from typing import Any, NamedTuple

from jaxtyping import Array, Float32

from jaxdist.compressors.base import Compressor, Packed
from jaxdist.compressors.checks import (
  call,
  check_block_size,
  check_flag,
  check_one_of,
)
from jaxdist.kernels.quantize import api as quantization


class Scaled(NamedTuple):
  """Small integers and the unit they count in.

  Attributes:
    codes: the integers.
    scale: the unit of each block.
  """

  codes: Packed
  scale: Float32[Array, 'blocks 1']


def codec(
  format: str, bits: int, *, stochastic: bool = False
) -> dict[str, Any]:
  """The functions of a :class:`Compressor` that writes ``Scaled`` payloads.

  Args:
    format: see :func:`jaxdist.kernels.quantize.api.quantize`.
    bits: of the format.
    stochastic: whether to round at random.

  Returns:
    Arguments of :class:`Compressor`.
  """

  def own(key):
    return key if stochastic else None

  def encode(x, key):
    words, scale = quantization.quantize(x, format, key=own(key))
    return Scaled(Packed(words, bits, x.shape[1]), scale)

  def decode(payload):
    codes, scale = payload
    return quantization.dequantize(codes.words, scale, format, codes.count)

  def fused_feedback(x, residual, key):
    words, scale, residual = quantization.quantize_with_feedback(
      x, residual, format, key=own(key)
    )
    return Scaled(Packed(words, bits, x.shape[1]), scale), residual

  def fused_mean(payloads):
    codes, scale = payloads
    return quantization.dequantize_mean(codes.words, scale, format, codes.count)

  return {
    'encode': encode,
    'decode': decode,
    'fused_feedback': fused_feedback,
    'fused_mean': fused_mean,
  }


def stochastic_contraction(levels: int, block_size: int) -> float:
  """Of unbiased rounding to ``max|x| / levels * (-levels..levels)``.

  A number ``t`` between 0 and the step ``s`` has variance ``t (s - t)``. Beside
  one largest number of size 1, ``n = block_size - 1`` of them make ``n t (s -
  t) / (1 + n t^2)`` relative to the block, which is largest where it equals
  ``(sqrt(1 + n s^2) - 1) / 2``.
  """
  return 1 - (math.sqrt(1 + (block_size - 1) / levels**2) - 1) / 2


def _contraction(bits: int, stochastic: bool, block_size: int) -> float:
  others = block_size - 1  # All numbers but the largest, which is exact.
  if bits == 2:
    return 1 - others / 9 if stochastic else 1 / (9 * block_size)
  q_max = 2 ** (bits - 1) - 1
  if stochastic:
    return stochastic_contraction(q_max, block_size)
  return 1 / (1 + others / (4 * q_max**2))


def quantize(
  *, bits: int = 8, stochastic: bool = False, block_size: int = 1024
) -> Compressor:
  r"""Rounds each block to a uniform grid of its own.

  With 8 and 4 bits, :math:`q` is 127 and 7:

  .. math::

    D(E(x)) = s \, \mathrm{round}(x / s), \qquad s = \max|x| / q

  With 2 bits there are four levels and no zero among them:

  .. math::

    D(E(x)) = a \, c, \qquad c \in \{\pm 1, \pm 3\}^B

  where :math:`|c| = 3` from 0.9957 times the root mean square of the block on
  (the best such quantizer of a Gaussian) and :math:`a = \langle x, c \rangle /
  \langle c, c \rangle` is the least-squares fit.

  ``stochastic=True`` rounds up or down at random, so that the expectation is
  right; with 2 bits then :math:`a = \max|x| / 3`.

  **On the wire:** ``bits + 32 / block_size`` bits a number.

  Contraction, with :math:`B` the block size: the largest number is on the grid
  and each other errs by at most half a step or its own size, so :math:`\delta =
  1 / (1 + (B - 1) / 4 q^2)` to nearest. With 2 bits, :math:`\delta = 1 / 9B`,
  as :math:`\langle x, c \rangle \ge \|x\|` and :math:`\langle c, c \rangle \le
  9 B`; on a Gaussian it is 0.88. Stochastic, :math:`\delta = 1 - (\sqrt{1 + (B
  - 1) / q^2} - 1) / 2`; with 2 bits, :math:`\delta = 1 - (B - 1) / 9`. These
  are worst cases over all blocks.

  Args:
    bits: width of a number: 8, 4 or 2.
    stochastic: whether to round at random, without bias.
    block_size: numbers in a block, a multiple of 128.

  Returns:
    A :class:`Compressor`.

  Raises:
    ValueError: if ``bits`` is not 8, 4 or 2, or ``block_size`` is not a
      positive multiple of 128.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxdist as jd
    >>> code = jd.quantize(bits=4)
    >>> x = jnp.array([[7., -2.2, 0., 3.4]])
    >>> code.decode(code.encode(x, jax.random.key(0)))
    Array([[ 7., -2.,  0.,  3.]], dtype=float32)

  References:
    Alistarh et al, `QSGD: Communication-Efficient SGD via Gradient Quantization
    and Encoding <https://arxiv.org/abs/1610.02132>`_, 2017; Max, `Quantizing
    for Minimum Distortion <https://doi.org/10.1109/TIT.1960.1057548>`_, 1960
  """
  check_one_of('bits', bits, (8, 4, 2))
  check_flag('stochastic', stochastic)
  block_size = check_block_size(block_size)

  options = {'stochastic': True} if stochastic else {}
  return Compressor(
    name=call('quantize', bits=bits, **options, block_size=block_size),
    **codec(f'int{bits}', bits, stochastic=stochastic),
    block_size=block_size,
    contraction=_contraction(bits, stochastic, block_size),
    unbiased=stochastic,
  )
