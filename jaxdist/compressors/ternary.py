"""Three levels at random: minus, zero and plus the largest of the block."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from jaxdist.compressors.base import Compressor
from jaxdist.compressors.checks import call, check_block_size
from jaxdist.compressors.quantize import stochastic_contraction
from jaxdist.kernels import numbers
from jaxdist.kernels.numbers import largest_magnitude, relative
from jaxdist.kernels.pack import api as packing


@dataclasses.dataclass(frozen=True)
class Trits:
  """Numbers 0, 1 and 2, twenty in a word.

  Attributes:
    words: ``(blocks, words)``, a row for each block.
    count: how many numbers each row holds.
  """

  words: Any  # As in Packed: trees are rebuilt with other leaves.
  count: int


jax.tree_util.register_dataclass(
  Trits, data_fields=['words'], meta_fields=['count']
)


class Ternary(NamedTuple):
  """Trits and what they count.

  Attributes:
    trits: 0 for zero, 1 for plus, 2 for minus.
    scale: the largest magnitude of each block.
  """

  trits: Trits
  scale: Float32[Array, 'blocks 1']


def ternary(*, block_size: int = 1024) -> Compressor:
  r"""Rounds each number at random to zero or the block's largest (TernGrad).

  .. math::

    D(E(x))_i = s \, \mathrm{sign}(x_i) \, b_i, \qquad s = \max|x|, \quad
    P(b_i = 1) = |x_i| / s

  **On the wire:** ``32 * ceil(block_size / 20) / block_size + 32 / block_size``
  bits a number: 1.6 and a little.

  Contraction :math:`1 - (\sqrt B - 1) / 2`, with :math:`B` the block size: it
  is stochastic quantization with one level, see :func:`quantize`. Unbiased, to
  within :math:`2^{-17} s`.

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
    >>> code = jd.ternary()
    >>> x = jnp.array([[2., -2., 0., 2.]])
    >>> code.decode(code.encode(x, jax.random.key(0)))
    Array([[ 2., -2.,  0.,  2.]], dtype=float32)

  References:
    Wen et al, `TernGrad: Ternary Gradients to Reduce Communication in
    Distributed Deep Learning <https://arxiv.org/abs/1705.07878>`_, 2017
  """
  block_size = check_block_size(block_size)

  def encode(x, key):
    scale = largest_magnitude(x)
    bits = numbers.random_bits(numbers.seed(key), *x.shape)
    kept = numbers.to_dither(bits) + 0.5 < relative(jnp.abs(x), scale)
    trits = jnp.where(kept, jnp.where(x < 0, 2, 1), 0).astype(jnp.uint32)
    return Ternary(Trits(packing.pack_trits(trits), x.shape[1]), scale)

  def decode(payload):
    trits, scale = payload
    trits = packing.unpack_trits(trits.words, trits.count).astype(jnp.int32)
    return jnp.where(trits == 2, -1, trits).astype(jnp.float32) * scale

  return Compressor(
    name=call('ternary', block_size=block_size),
    encode=encode,
    decode=decode,
    block_size=block_size,
    contraction=stochastic_contraction(1, block_size),
    unbiased=True,
  )
