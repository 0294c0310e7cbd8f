"""Keeps the largest numbers of each block, and says where they were."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, UInt32

from jaxdist.compressors.base import Compressor, Packed
from jaxdist.compressors.checks import (
  call,
  check_block_size,
  check_density,
  check_one_of,
)
from jaxdist.kernels.top_k import api as selection

BF16_ERROR = 1 / 257  # Largest relative error: half a step of 2**-7 above 1.


@dataclasses.dataclass(frozen=True)
class Sparse:
  """Some numbers of each block.

  Attributes:
    values: the numbers, ``(blocks, k)``, in whatever form they travel.
    indices: their places in the block; ``None`` if those are known to all.
    size: length of a block.
  """

  values: Any
  indices: Packed | None
  size: int


jax.tree_util.register_dataclass(
  Sparse, data_fields=['values', 'indices'], meta_fields=['size']
)


def to_bfloat16(x: Float32[Array, 'blocks k']) -> Packed:
  """Rounds to bfloat16, packed; large finite numbers stay finite."""
  largest = float(jnp.finfo(jnp.bfloat16).max)
  x = jnp.where(jnp.isfinite(x), jnp.clip(x, -largest, largest), x)
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
  return Packed.pack(bits.astype(jnp.uint32), 16)


def from_bfloat16(values: Packed) -> Float32[Array, 'blocks k']:
  """The inverse of :func:`to_bfloat16`."""
  bits = values.unpack() << 16  # A bfloat16 is the upper half of a float32.
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def index_bits(size: int) -> int:
  """Bits that tell ``size`` places apart."""
  return max(1, (size - 1).bit_length())


def num_kept(density: float, size: int) -> int:
  """How many of ``size`` numbers a density keeps: at least one."""
  return max(1, round(density * size))


def _encode(x, k: int, values: str) -> Sparse:
  kept, indices = selection.top_k(x, k)
  size = x.shape[1]
  return Sparse(
    values=to_bfloat16(kept) if values == 'bfloat16' else kept,
    indices=Packed.pack(indices, index_bits(size)),
    size=size,
  )


def _decode(payload: Sparse) -> Float32[Array, 'blocks size']:
  values = payload.values
  if isinstance(values, Packed):
    values = from_bfloat16(values)
  indices: UInt32[Array, 'blocks k'] = payload.indices.unpack()
  return selection.scatter(values, indices, payload.size)


def _fused_feedback(x, residual, k: int):
  kept, indices, residual = selection.top_k_with_feedback(x, residual, k)
  size = x.shape[1]
  packed = Packed.pack(indices, index_bits(size))
  return Sparse(values=kept, indices=packed, size=size), residual


def _fused_mean(payloads: Sparse) -> Float32[Array, 'blocks size']:
  values = payloads.values
  if isinstance(values, Packed):
    values = jax.vmap(from_bfloat16)(values)
  indices = jax.vmap(Packed.unpack)(payloads.indices)
  return selection.scatter_mean(values, indices, payloads.size)


def _contraction(kept: float, values: str) -> float:
  return kept * (1 - BF16_ERROR**2) if values == 'bfloat16' else kept


def top_k(
  density: float, *, block_size: int = 1024, values: str = 'float32'
) -> Compressor:
  r"""Keeps the numbers of each block that are largest in magnitude.

  .. math::

    D(E(x))_i = \begin{cases} x_i & i \in \text{the } k \text{ largest } |x_i|
    \\ 0 & \text{otherwise} \end{cases} \qquad k = \max(1, \mathrm{round}(
    \text{density} \cdot B))

  Exact within a block; of equal magnitudes the lower index is kept. Density 1
  with float32 values is the identity.

  **On the wire:** ``density * (32 + log2(block_size))`` bits a number, with
  bfloat16 values ``density * (16 + log2(block_size))``.

  Contraction :math:`k / B`: the kept squares are not below the average. With
  bfloat16 values it is :math:`k / B \, (1 - 257^{-2})`, as each of them errs
  by at most 1/257 of itself.

  Args:
    density: the part of the numbers that is kept, in (0, 1].
    block_size: numbers in a block, a multiple of 128.
    values: ``'float32'`` or ``'bfloat16'``, how the kept numbers travel.

  Returns:
    A :class:`Compressor`.

  Raises:
    ValueError: if ``density``, ``block_size`` or ``values`` is not as above.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxdist as jd
    >>> code = jd.top_k(0.5)
    >>> x = jnp.array([[1., -3., 0., 2.]])
    >>> code.decode(code.encode(x, jax.random.key(0)))
    Array([[ 0., -3.,  0.,  2.]], dtype=float32)

  References:
    Aji and Heafield, `Sparse Communication for Distributed Gradient Descent
    <https://arxiv.org/abs/1704.05021>`_, 2017; Stich et al, `Sparsified SGD
    with Memory <https://arxiv.org/abs/1809.07599>`_, 2018
  """
  density = check_density(density)
  block_size = check_block_size(block_size)
  check_one_of('values', values, ('float32', 'bfloat16'))

  def fused_feedback(x, residual, key):
    del key
    return _fused_feedback(x, residual, num_kept(density, x.shape[1]))

  options = {'values': values} if values != 'float32' else {}
  return Compressor(
    name=call('top_k', density, **options, block_size=block_size),
    encode=lambda x, key: _encode(x, num_kept(density, x.shape[1]), values),
    decode=_decode,
    fused_feedback=fused_feedback if values == 'float32' else None,
    fused_mean=_fused_mean,
    block_size=block_size,
    contraction=_contraction(
      num_kept(density, block_size) / block_size, values
    ),
  )


def global_top_k(density: float, *, values: str = 'float32') -> Compressor:
  r"""Keeps the numbers of the whole tree that are largest in magnitude.

  As :func:`top_k`, with one block that holds everything, and :math:`k =
  \max(1, \lceil \text{density} \cdot n \rceil)` of :math:`n` numbers. For
  papers that mean the exact global choice; :func:`top_k` is several times
  faster, its indices are shorter, and its payload can be split.

  **On the wire:** ``density * (32 + ceil(log2(n)))`` bits a number, with
  bfloat16 values ``density * (16 + ceil(log2(n)))``.

  Contraction: the density, by the argument of :func:`top_k`.

  Args:
    density: the part of the numbers that is kept, in (0, 1].
    values: ``'float32'`` or ``'bfloat16'``, how the kept numbers travel.

  Returns:
    A :class:`Compressor` with ``block_size=None``.

  Raises:
    ValueError: if ``density`` or ``values`` is not as above.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxdist as jd
    >>> code = jd.global_top_k(0.5)
    >>> x = jnp.array([[1., -3., 0., 2.]])
    >>> code.decode(code.encode(x, jax.random.key(0)))
    Array([[ 0., -3.,  0.,  2.]], dtype=float32)

  References:
    Lin et al, `Deep Gradient Compression <https://arxiv.org/abs/1712.01887>`_,
    2018
  """
  density = check_density(density)
  check_one_of('values', values, ('float32', 'bfloat16'))

  def encode(x, key):
    del key
    # The inner rounding takes off what a product of floats may have put on:
    # 0.07 * 100 is a little more than 7.
    k = max(1, math.ceil(round(density * x.shape[1], 6)))
    return _encode(x, k, values)

  options = {'values': values} if values != 'float32' else {}
  return Compressor(
    name=call('global_top_k', density, **options),
    encode=encode,
    decode=_decode,
    block_size=None,
    contraction=_contraction(density, values),
  )
