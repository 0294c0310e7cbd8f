"""Top-k of rows on CPUs: thresholds found by counting, nothing sorted.

The largest ``k`` numbers of a row lie in the ``k`` groups of neighbours whose
maxima are largest. So one pass over them finds the maxima, and the rest needs
these alone, and then the numbers of ``k`` groups. The k-th largest is found bit
by bit: how many are as large as this? Rows lie along lanes, 128 abreast, so
that a count adds whole vectors. 128 rows are done with before the next ones
come, so that all of the passes happen in cache.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from jaxdist.kernels.numbers import column_sum
from jaxdist.kernels.top_k.reference import ranks

LANES = 128  # Rows abreast.
FEWEST = 2**18  # Numbers in all rows; sorting fewer takes no time.
WORD = 32  # Bits.


def cannot_select(x: Any, *residual: Any, k: int) -> str | None:
  """What :func:`top_k`, with feedback or without, would need instead."""
  del residual
  rows, size = x.shape
  if rows * size < FEWEST or rows < LANES:
    return (
      f'at least {FEWEST} numbers in {LANES} rows, not {rows * size} in {rows}'
    )
  if 2 * k * _group(size, k) > size:
    return f'k that is small beside the length of a row, not {k} of {size}'
  return None


def _group(size: int, k: int) -> int:
  """How many neighbours form a group: about as many groups as candidates."""
  group = 1
  while size % (2 * group) == 0 and 4 * group * group * k <= 2 * size:
    group *= 2
  return group


def _turned(x: Int32[Array, 'lanes n']) -> Int32[Array, '1 m lanes']:
  """Rows as columns, of a multiple of 32 numbers."""
  # Zeros at the end are below all numbers, or equal and further on.
  return jnp.pad(x, ((0, 0), (0, -x.shape[1] % WORD))).T[None]


def _count(mask: Bool[Array, 'b m lanes']) -> Int32[Array, 'b 1 lanes']:
  return column_sum(mask.astype(jnp.int32))


def _last(bits: int, fits: Callable[[Array], Array], like: Array) -> Array:
  """The last integer of so many bits that fits, as all do that are below it."""

  def try_bit(i, found):
    trial = found | (1 << (bits - 1 - i))
    return jnp.where(fits(trial), trial, found)

  return jax.lax.fori_loop(0, bits, try_bit, jnp.zeros_like(like))


def _places(rank: Int32[Array, 'lanes n'], k: int) -> Int32[Array, 'lanes k']:
  """Where each row's ``k`` largest are, in order of place."""
  n = rank.shape[1]
  rank = _turned(rank)
  place = jax.lax.broadcasted_iota(jnp.int32, rank.shape, 1)
  like = rank[:, :1]
  least = _last(31, lambda trial: _count(rank >= trial) >= k, like)
  larger, equal = rank > least, rank == least
  room = k - _count(larger)
  # Ties go to the lower places.
  fits = lambda trial: _count(equal & (place < trial)) <= room
  end = _last(n.bit_length(), fits, like)
  taken = larger | (equal & (place < end))

  # As bits, of which the lowest is taken out k times.
  taken = taken.astype(jnp.uint32).reshape(len(rank), -1, WORD, LANES)
  taken <<= jnp.arange(WORD, dtype=jnp.uint32)[:, None]
  words = jnp.sum(taken, axis=2, dtype=jnp.uint32)
  which = jax.lax.broadcasted_iota(jnp.int32, words.shape, 1)

  def take_first(words, _):
    first = jnp.where(words != 0, which, words.shape[1])
    first = jnp.min(first, axis=1, keepdims=True)
    here = which == first
    word = jnp.sum(jnp.where(here, words, 0), axis=1, dtype=jnp.uint32)
    below = jax.lax.population_count((word & (~word + 1)) - 1)
    found = first[:, 0] * WORD + below.astype(jnp.int32)
    return jnp.where(here, words & (words - 1), words), found

  _, found = jax.lax.scan(take_first, words, length=k)
  return found[:, 0].T


def _select(
  x: Float32[Array, 'lanes size'], k: int
) -> tuple[Float32[Array, 'lanes k'], UInt32[Array, 'lanes k']]:
  rows, size = x.shape
  group = _group(size, k)
  grouped = x.reshape(rows, -1, group)
  maxima = jnp.max(ranks(grouped), axis=2)
  groups = _places(maxima, k)
  few = jnp.take_along_axis(grouped, groups[:, :, None], 1, mode='clip')
  places = _places(ranks(few.reshape(rows, -1)), k)
  of_group = jnp.take_along_axis(groups, places // group, 1, mode='clip')
  indices = of_group * group + places % group
  values = jnp.take_along_axis(x, indices, 1, mode='clip')
  return values, indices.astype(jnp.uint32)


def _select_and_drop(x, residual, k):
  target = x + residual
  values, indices = _select(target, k)
  # What is larger is sent, and what is equal up to the last place sent.
  kept, places = ranks(values), indices.astype(jnp.int32)
  least = jnp.min(kept, axis=1, keepdims=True)
  last = jnp.where(kept == least, places, -1).max(axis=1, keepdims=True)
  rank = ranks(target)
  place = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
  sent = (rank > least) | ((rank == least) & (place <= last))
  return values, indices, jnp.where(sent, 0.0, target)


def _by_blocks(function: Callable[..., Any], *arrays: Array) -> Any:
  """Calls a function with 128 rows after the other."""
  rows, size = arrays[0].shape
  blocks = [
    jnp.pad(x, ((0, -rows % LANES), (0, 0))).reshape(-1, LANES, size)
    for x in arrays
  ]
  found = jax.lax.map(lambda some: function(*some), blocks)
  return jax.tree.map(lambda x: x.reshape(-1, x.shape[2])[:rows], found)


def top_k(
  x: Float32[Array, 'rows size'], *, k: int
) -> tuple[Float32[Array, 'rows k'], UInt32[Array, 'rows k']]:
  """The ``k`` numbers of each row that are largest in magnitude."""
  return _by_blocks(lambda x: _select(x, k), x)


def top_k_with_feedback(
  x: Float32[Array, 'rows size'],
  residual: Float32[Array, 'rows size'],
  *,
  k: int,
) -> tuple[
  Float32[Array, 'rows k'], UInt32[Array, 'rows k'], Float32[Array, 'rows size']
]:
  """Selects of ``x + residual``, and says what is left."""
  return _by_blocks(lambda x, r: _select_and_drop(x, r, k), x, residual)
