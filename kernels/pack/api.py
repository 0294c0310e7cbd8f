"""Packs rows of small unsigned integers into 32-bit words."""

import jax.numpy as jnp
from jaxtyping import Array, UInt32

from jaxdist.kernels.checks import check_between, check_rows
from jaxdist.kernels.dispatch import Form, Op
from jaxdist.kernels.pack import reference

_pack = Op('pack', {'xla': Form(reference.pack)})
_unpack = Op('unpack', {'xla': Form(reference.unpack)})
_pack_trits = Op('pack_trits', {'xla': Form(reference.pack_trits)})
_unpack_trits = Op('unpack_trits', {'xla': Form(reference.unpack_trits)})


def num_words(count: int, bits: int) -> int:
  """Words that ``count`` numbers of ``bits`` bits take: no gaps."""
  return -(-count * bits // 32)


def pack(
  codes: UInt32[Array, 'rows count'],
  bits: int,
  *,
  implementation: str | None = None,
) -> UInt32[Array, 'rows words']:
  """Packs rows of numbers into ``ceil(count * bits / 32)`` words each.

  Args:
    codes: numbers below ``2**bits``; a larger one spoils its neighbours.
    bits: width of a number, 1 to 32.
    implementation: see :class:`jaxdist.kernels.dispatch.Op`.

  Returns:
    The words.

  Examples:
    >>> pack(jnp.array([[1, 2, 3]], jnp.uint32), 8)
    Array([[197121]], dtype=uint32)
  """
  check_rows('codes', codes, jnp.uint32)
  check_between('bits', bits, 1, 32)
  return _pack(codes, bits=bits, implementation=implementation)


def unpack(
  words: UInt32[Array, 'rows words'],
  bits: int,
  count: int,
  *,
  implementation: str | None = None,
) -> UInt32[Array, 'rows count']:
  """The inverse of :func:`pack`.

  Args:
    words: rows of packed words.
    bits: width of a number, 1 to 32.
    count: how many numbers each row holds.
    implementation: see :class:`jaxdist.kernels.dispatch.Op`.

  Returns:
    The numbers.

  Examples:
    >>> unpack(jnp.array([[197121]], jnp.uint32), 8, 3)
    Array([[1, 2, 3]], dtype=uint32)
  """
  check_rows('words', words, jnp.uint32)
  check_between('bits', bits, 1, 32)
  if words.shape[1] != num_words(count, bits):
    raise ValueError(
      f'words must have {num_words(count, bits)} columns for {count} numbers '
      f'of {bits} bits, got {words.shape[1]}.'
    )
  return _unpack(words, bits=bits, count=count, implementation=implementation)


def pack_trits(
  trits: UInt32[Array, 'rows count'], *, implementation: str | None = None
) -> UInt32[Array, 'rows words']:
  """Packs rows of numbers below 3 into ``ceil(count / 20)`` words each.

  Args:
    trits: numbers 0, 1 and 2.
    implementation: see :class:`jaxdist.kernels.dispatch.Op`.

  Returns:
    The words: 1.6 bits a number.

  Examples:
    >>> pack_trits(jnp.array([[2] + 19 * [0]], jnp.uint32))
    Array([[2]], dtype=uint32)
  """
  check_rows('trits', trits, jnp.uint32)
  return _pack_trits(trits, implementation=implementation)


def unpack_trits(
  words: UInt32[Array, 'rows words'],
  count: int,
  *,
  implementation: str | None = None,
) -> UInt32[Array, 'rows count']:
  """The inverse of :func:`pack_trits`.

  Args:
    words: rows of packed words.
    count: how many numbers each row holds.
    implementation: see :class:`jaxdist.kernels.dispatch.Op`.

  Returns:
    The numbers.
  """
  check_rows('words', words, jnp.uint32)
  if words.shape[1] != -(-count // reference.TRITS):
    raise ValueError(
      f'words must have {-(-count // reference.TRITS)} columns for {count} '
      f'trits, got {words.shape[1]}.'
    )
  return _unpack_trits(words, count=count, implementation=implementation)
