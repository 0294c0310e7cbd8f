"""Top-k of rows on GPUs: a threshold found by counting, bit by bit.

A row lies in the registers of a warp. How many of its numbers are as large as
this? is a comparison and an addition for each register, and one instruction
for the warp's sum. What is taken becomes a bit in a word for each lane. Words
are taken apart from the lowest place on: nothing is sorted or scattered.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float32, Int32, UInt32

from jaxdist.kernels import gpu
from jaxdist.kernels.top_k.reference import ranks
from jaxdist.kernels.tpu import result

WORD = 32  # Bits.
SMALLEST_ROW = 128
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


def _last(bits: int, fits: Callable[[Array], Array]) -> Int32[Array, 'rows']:
  """The last integer of so many bits that fits, as all do that are below it."""

  def try_bit(i, found):
    trial = found | (1 << (bits - 1 - i))
    return jnp.where(fits(trial), trial, found)

  start = gpu.filled((gpu.ROWS,), 0, jnp.int32)
  return jax.lax.fori_loop(0, bits, try_bit, start)


def _kernel(inputs, indices_ref, *left_ref, k):
  rows, *row = inputs[0].shape
  here = pl.ds(gpu.first_row(rows), gpu.ROWS)
  shape = gpu.ROWS, *row
  _, slots, lanes = row

  def target():
    parts = [gpu.load(ref, here) for ref in inputs]
    return functools.reduce(jnp.add, parts)

  def count(mask):
    return gpu.along_rows(jnp.sum, jnp.where(mask, 1, 0))

  rank = ranks(target())
  slot, lane = gpu.iota(shape, 2), gpu.iota(shape, 3)
  place = (gpu.iota(shape, 1) * slots + slot) * lanes + lane
  least = _last(31, lambda t: count(rank >= gpu.spread(t, shape)) >= k)
  room = k - count(rank > gpu.spread(least, shape))
  larger = rank > gpu.spread(least, shape)
  equal = rank == gpu.spread(least, shape)
  # Ties go to the lower places.
  end = _last(
    math.prod(row).bit_length(),
    lambda t: count(equal & (place < gpu.spread(t, shape))) <= room,
  )
  taken = larger | (equal & (place < gpu.spread(end, shape)))

  words = jnp.sum(jnp.where(taken, 1 << slot, 0), axis=2)
  shape = words.shape
  start = gpu.iota(shape, 1) * slots * lanes + gpu.iota(shape, 2)

  def take_first(j, words):
    lowest = WORD - 1 - jax.lax.clz(words & -words)
    back = jnp.where(words != 0, -(start + lowest * lanes), NOWHERE)
    first = gpu.along_rows(jnp.max, back)
    column = gpu.spread((-first).astype(jnp.uint32), (gpu.ROWS, 1))
    gpu.store(indices_ref, here, pl.ds(j, 1), value=column)
    rest = words & (words - 1)
    return jnp.where(back == gpu.spread(first, shape), rest, words)

  jax.lax.fori_loop(0, k, take_first, words)
  for ref in left_ref:
    # Read again: registers hold ranks, which have no signs.
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
