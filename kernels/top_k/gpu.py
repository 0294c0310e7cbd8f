"""Top-k of rows on GPUs: a threshold, then places, and nothing is moved.

A row lies in the registers of a warp. Each lane sorts its numbers, or those of
them that can be among the largest, by a network. The largest of the lanes'
first ones are dropped until enough are gone: what goes last is the threshold.
For a large ``k`` it is found bit by bit, by counting. What is taken becomes
bits in a word for each lane, and words are taken apart from the lowest place.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float32, UInt32

from jaxdist.kernels import gpu
from jaxdist.kernels.top_k import networks
from jaxdist.kernels.top_k.reference import ranks
from jaxdist.kernels.tpu import result

WORD = 32  # Bits.
SMALLEST_ROW = 128
SORTED = 64  # The largest k for which lanes sort.
NOWHERE = -(2**30)  # Before all places, which count down from zero.


def cannot_select(x: Any, *residual: Any, k: int) -> str | None:
  """What :func:`top_k`, with feedback or without, would need instead."""
  del residual, k
  rows, size = x.shape
  if not SMALLEST_ROW <= size <= gpu.LARGEST_ROW or size & (size - 1):
    return (
      f'rows of a power of two from {SMALLEST_ROW} to {gpu.LARGEST_ROW} '
      f'numbers, not {size}'
    )
  return gpu.cannot_run(rows)


def _sorted(rank, k):
  """The ``k`` largest of each lane, or all if they are fewer, in order."""
  _, words, slots, _ = rank.shape
  pieces = [
    rank[:, i : i + 1, j : j + 1] for i in range(words) for j in range(slots)
  ]
  length = min(len(pieces), 2 ** (k - 1).bit_length())
  lists = [
    networks.in_order(pieces[i : i + length])
    for i in range(0, len(pieces), length)
  ]
  return functools.reduce(networks.merged, lists)


def _least_of_sorted(rank, k):
  """The ``k``-th largest of each row."""

  def drop(_, carry):
    lanes, dropped, least = carry
    largest = gpu.along_rows(jnp.max, lanes[0])
    least = jnp.where(dropped < k, largest, least)
    here = lanes[0] == gpu.spread(largest, lanes[0].shape)
    dropped += gpu.along_rows(jnp.sum, jnp.where(here, 1, 0))
    after = [*lanes[1:], gpu.filled(lanes[0].shape, -1, jnp.int32)]
    lanes = [jnp.where(here, b, a) for a, b in zip(lanes, after, strict=True)]
    return lanes, dropped, least

  none = gpu.filled((gpu.ROWS,), 0, jnp.int32)
  start = _sorted(rank, k), none, none
  return jax.lax.fori_loop(0, k, drop, start)[2]


def _least_by_bits(rank, k):
  """The same, by how many are as large as a number."""

  def try_bit(i, least):
    trial = least | (1 << (30 - i))
    as_large = jnp.where(rank >= gpu.spread(trial, rank.shape), 1, 0)
    enough = gpu.along_rows(jnp.sum, as_large) >= k
    return jnp.where(enough, trial, least)

  start = gpu.filled((gpu.ROWS,), 0, jnp.int32)
  return jax.lax.fori_loop(0, 31, try_bit, start)


def _kernel(inputs, indices_ref, *left_ref, k):
  rows, *row = inputs[0].shape
  here = pl.ds(gpu.first_row(rows), gpu.ROWS)
  shape = gpu.ROWS, *row
  slots, size = row[1], math.prod(row)

  def target():
    parts = [gpu.load(ref, here) for ref in inputs]
    return functools.reduce(jnp.add, parts)

  rank = ranks(target())
  find = _least_of_sorted if k <= SORTED else _least_by_bits
  wide = gpu.spread(find(rank, k), shape)
  larger, equal = rank > wide, rank == wide

  slot = gpu.iota(shape, 2)
  bits = lambda mask: jnp.sum(jnp.where(mask, 1 << slot, 0), axis=2)
  start = bits(larger), bits(equal), gpu.filled((gpu.ROWS,), 0, jnp.int32)
  shape = start[0].shape
  lane = gpu.iota(shape, 1) * slots * gpu.LANES + gpu.iota(shape, 2)

  def take_first(j, carry):
    """Of the larger ones; then of the equal ones: ties go to lower places."""
    larger, equal, _ = carry
    words = jnp.where(larger != 0, larger, equal)
    lowest = WORD - 1 - jax.lax.clz(words & -words)
    back = -(lane + lowest * gpu.LANES)
    back = jnp.where(larger != 0, back, back - size)
    back = jnp.where(words != 0, back, NOWHERE)
    first = gpu.along_rows(jnp.max, back)
    place = -first - jnp.where(first <= -size, size, 0)
    column = gpu.spread(place.astype(jnp.uint32), (gpu.ROWS, 1))
    gpu.store(indices_ref, here, pl.ds(j, 1), value=column)
    rest = jnp.where(
      back == gpu.spread(first, shape), words & (words - 1), words
    )
    return (
      jnp.where(larger != 0, rest, 0),
      jnp.where(larger != 0, equal, rest),
      place,
    )

  _, _, last = jax.lax.fori_loop(0, k, take_first, start)
  for ref in left_ref:
    # Read again: registers hold ranks, which have no signs.
    shape = gpu.ROWS, *row
    place = (gpu.iota(shape, 1) * slots + gpu.iota(shape, 2)) * gpu.LANES
    place += gpu.iota(shape, 3)
    taken = larger | (equal & (place <= gpu.spread(last, shape)))
    gpu.store(ref, here, value=jnp.where(taken, 0.0, target()))


def _select(k, *arrays):
  rows, size = arrays[0].shape
  slots = min(WORD, size // gpu.LANES)
  grouped = [x.reshape(rows, -1, slots, gpu.LANES) for x in arrays]
  outputs = [
    result((rows, k), jnp.uint32, arrays),
    result(grouped[0].shape, jnp.float32, arrays),
  ]

  def kernel(*refs):
    _kernel(refs[: len(arrays)], *refs[len(arrays) :], k=k)

  indices, *left = gpu.call(
    kernel, outputs[: len(arrays)], *grouped, programs=pl.cdiv(rows, gpu.ROWS)
  )
  # A few numbers of each row, which XLA gathers.
  places = indices.astype(jnp.int32)
  values = functools.reduce(
    jnp.add, [jnp.take_along_axis(x, places, 1, mode='clip') for x in arrays]
  )
  return values, indices, *(x.reshape(rows, size) for x in left)


def top_k(
  x: Float32[Array, 'rows size'], *, k: int
) -> tuple[Float32[Array, 'rows k'], UInt32[Array, 'rows k']]:
  """The ``k`` numbers of each row that are largest in magnitude."""
  return _select(k, x)


def top_k_with_feedback(
  x: Float32[Array, 'rows size'],
  residual: Float32[Array, 'rows size'],
  *,
  k: int,
) -> tuple[
  Float32[Array, 'rows k'], UInt32[Array, 'rows k'], Float32[Array, 'rows size']
]:
  """Selects of ``x + residual``, and says what is left."""
  return _select(k, x, residual)
