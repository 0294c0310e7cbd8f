"""Top-k of long rows: a threshold found by counting, then what reaches it.

A sort of millions of numbers takes far longer than reading them. Two bits of
the threshold are found in a pass over memory, from counts of three candidates.
What is taken becomes a bit a number, and each of the ``k`` places is that of
one bit.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from jaxdist.kernels.numbers import column_sum
from jaxdist.kernels.top_k.reference import ranks

SHORTEST = 2**17  # Row for which this is faster than sorting.
WORD = 32  # Bits.
SIDE = 128  # Of the squares in which counts are added first.


def cannot_select(x: Any, *, k: int) -> str | None:
  """What :func:`top_k` would need instead."""
  del k
  if x.shape[1] < SHORTEST:
    return f'rows of at least {SHORTEST} numbers, not {x.shape[1]}'
  return None


def _counts(
  rank: UInt32[Array, 'b m lanes'], trials: list[UInt32[Array, '']]
) -> list[Int32[Array, '']]:
  """How many are as large as each of three."""
  # A byte each, of up to 128 numbers, so that one pass counts all three.
  packed = sum(
    (rank >= trial).astype(jnp.int32) << (8 * i)
    for i, trial in enumerate(trials)
  )
  packed = column_sum(packed)
  return [jnp.sum(packed >> (8 * i) & 0xFF) for i in range(len(trials))]


def _least(rank: UInt32[Array, 'b m lanes'], k: int) -> UInt32[Array, '']:
  """The ``k``-th largest."""

  def two_bits(i, found):
    shift = jnp.uint32(30 - 2 * i)
    trials = [found | (jnp.uint32(digit) << shift) for digit in (1, 2, 3)]
    digit = sum((n >= k).astype(jnp.uint32) for n in _counts(rank, trials))
    return found | (digit << shift)

  return jax.lax.fori_loop(0, 16, two_bits, jnp.zeros_like(rank[0, 0, 0]))


def _nth_bit(
  word: UInt32[Array, 'k'], n: Int32[Array, 'k']
) -> Int32[Array, 'k']:
  """The place of the set bit that ``n`` others lie below."""
  place = jnp.zeros_like(n)
  for width in (16, 8, 4, 2, 1):
    low = word & jnp.uint32(2**width - 1)
    below = jax.lax.population_count(low).astype(jnp.int32)
    above = below <= n
    place += jnp.where(above, width, 0)
    n = jnp.where(above, n - below, n)
    word = jnp.where(above, word >> width, low)
  return place


def _ends(words: UInt32[Array, 'n']) -> Int32[Array, 'n']:
  """How many bits are set up to each word, with it."""
  return jnp.cumsum(jax.lax.population_count(words).astype(jnp.int32))


def _words(mask: Bool[Array, 'n']) -> UInt32[Array, 'm']:
  bits = mask.reshape(-1, WORD).astype(jnp.uint32)
  return jnp.sum(
    bits << jnp.arange(WORD, dtype=jnp.uint32), axis=1, dtype=jnp.uint32
  )


def _first(words: UInt32[Array, 'n'], count: Int32[Array, '']) -> Array:
  """The words with their first ``count`` set bits alone."""
  ends = _ends(words)
  bits = jax.lax.population_count(words).astype(jnp.int32)
  room = jnp.clip(count - (ends - bits), 0, bits)
  last = _nth_bit(words, jnp.maximum(room - 1, 0)).astype(jnp.uint32)
  up_to = jnp.uint32(0xFFFFFFFF) >> (31 - last)
  return jnp.where(room > 0, words & up_to, 0)


def _indices(x: Float32[Array, 'n'], k: int) -> Int32[Array, 'k']:
  # Zeros at the end are below all numbers, or equal and further on.
  x = jnp.pad(x, (0, -len(x) % (SIDE * SIDE)))
  rank = ranks(x).astype(jnp.uint32)
  least = _least(rank.reshape(-1, SIDE, SIDE), k)
  larger = _words(rank > least)
  room = k - jnp.sum(jax.lax.population_count(larger).astype(jnp.int32))
  words = larger | _first(_words(rank == least), room)  # Ties: lower places.
  ends, place = _ends(words), jnp.arange(k)
  which = jnp.searchsorted(ends, place, side='right')
  word, end = words[which], ends[which]
  start = end - jax.lax.population_count(word).astype(jnp.int32)
  return which * WORD + _nth_bit(word, place - start)


def top_k(
  x: Float32[Array, 'rows size'], *, k: int
) -> tuple[Float32[Array, 'rows k'], UInt32[Array, 'rows k']]:
  """The ``k`` numbers of each row that are largest in magnitude."""
  indices = jax.vmap(lambda row: _indices(row, k))(x)
  values = jnp.take_along_axis(x, indices, axis=1, mode='clip')
  return values, indices.astype(jnp.uint32)
