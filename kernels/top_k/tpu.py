"""Top-k of rows on TPUs: sorting networks across registers.

A tile of 128 rows is turned so that each lane holds a row. Comparing registers
number by number then works on all rows at once, and nothing ever moves between
lanes. One network over the magnitudes finds each row's k-th largest. A second,
over the places of all that is larger, and then of what is equal to it, finds
the k places. Neither carries anything along, so a comparison is two
instructions; the values are fetched once the places are known.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float32, UInt32

from jaxdist.kernels.numbers import float_bits, from_float_bits
from jaxdist.kernels.tpu import (
  LANES,
  SUBLANES,
  cannot_partition,
  gathers_sublanes,
  result,
  transposed_rows,
)

LARGEST_ROW = 4096
LARGEST_K = 64
TILE = 2**18  # Numbers in a tile: 1 MiB, at which transfers reach full speed.
SOME = 16  # Registers whose values are fetched at a time, to hide waits.
CHUNK = 16  # Rows that are in registers at a time.
INFINITY = 0x7F800000  # The bits of a float.
SMALLEST = 0x00800000  # Those of the smallest that is not subnormal.


def cannot_select(x: Any, *residual: Any, k: int) -> str | None:
  """What :func:`top_k`, with feedback or without, would need instead."""
  del residual
  size = x.shape[1]
  if size % LANES or size > LARGEST_ROW:
    return f'rows of a multiple of 128 numbers, up to {LARGEST_ROW}, not {size}'
  if k > LARGEST_K or size % (SUBLANES * _length(k)):
    return (
      f'k up to {LARGEST_K}, and rows of a multiple of 8 times the power of '
      f'two from k on, not {k} of {size}'
    )
  return cannot_partition()


def _length(k: int) -> int:
  """Of the sorted lists that hold the best so far."""
  return max(SUBLANES, 2 ** math.ceil(math.log2(k)))


def _ranks(x):
  """Floats in the definition's order of magnitudes, NaN as infinity.

  Floats take one instruction where integers take two to find the larger.
  Subnormal magnitudes, which units may take as zero, become negative integers.
  """
  bits = jnp.minimum(float_bits(x) & 0x7FFFFFFF, INFINITY)
  subnormal = (bits - SMALLEST).astype(jnp.float32)
  return jnp.where(bits < SMALLEST, subnormal, from_float_bits(bits))


def _exchange(items, i, j):
  a, b = items[i], items[j]
  items[i], items[j] = jnp.maximum(a, b), jnp.minimum(a, b)


def _sorted(items):
  """Descending, by Batcher's merges of odd and even places."""
  items, n = list(items), len(items)
  p = 1
  while p < n:
    step = p
    while step:
      for low in range(step % p, n - step, 2 * step):
        for i in range(low, min(low + step, n - step)):
          if i // (2 * p) == (i + step) // (2 * p):
            _exchange(items, i, i + step)
      step //= 2
    p *= 2
  return items


def _merged(a, b):
  """The larger half of two sorted lists, sorted."""
  n = len(a)
  items = [jnp.maximum(a[i], b[n - 1 - i]) for i in range(n)]
  step = n // 2
  while step:
    for i in range(n):
      if not i & step:
        _exchange(items, i, i + step)
    step //= 2
  return items


def _largest(count, length, load):
  """The ``length`` largest of each lane of ``count`` registers, sorted."""

  def group(i):
    return _sorted([load(i * length + j) for j in range(length)])

  best = jax.lax.fori_loop(
    1, count // length, lambda i, best: _merged(best, group(i)), group(0)
  )
  for shift in (4, 2, 1):  # Then of all sublanes, which all get the result.
    best = _merged(best, [pltpu.roll(item, shift, 0) for item in best])
  return best


def _stacked(items):
  """Registers with item ``8 i + j`` in sublane ``j`` of the ``i``-th."""
  sublane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
  for i in range(0, len(items), SUBLANES):
    stack = items[i]
    for j, item in enumerate(items[i : i + SUBLANES]):
      stack = jnp.where(sublane == j, item, stack)
    yield stack


def _select_kernel(*refs, k, feedback, gathers):
  if feedback:
    x_ref, residual_ref, values_ref, indices_ref, dropped_ref, *rest = refs
  else:
    x_ref, values_ref, indices_ref, *rest = refs
  turned_ref, ranks_ref, limit_ref, last_ref = rest
  tile, size = x_ref.shape
  length, count = _length(k), size // SUBLANES
  sublane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
  columns = [slice(j, j + LANES) for j in range(0, size, LANES)]

  def register(ref, i):
    return ref[pl.ds(pl.multiple_of(i * SUBLANES, SUBLANES), SUBLANES), :]

  def places(i):
    """Where in their rows the numbers of a register are."""
    return (sublane + i * SUBLANES).astype(jnp.float32)

  def select(block, _):
    rows = pl.ds(pl.multiple_of(block * LANES, LANES), LANES)
    for part in columns:
      x = x_ref[rows, part]
      if feedback:
        x += residual_ref[rows, part]
      x = x.T
      turned_ref[part, :] = x
      ranks_ref[part, :] = _ranks(x)

    ranks = functools.partial(register, ranks_ref)
    least = _largest(count, length, ranks)[k - 1]

    def order(i):
      """Falls with the place, and by a row's length for what is equal."""
      rank, place = ranks(i), places(i)
      equal = jnp.where(rank == least, -(place + size), -4.0 * size)
      return jnp.where(rank > least, -place, equal)

    found = _largest(count, length, order)[:k]
    found = [(-place).astype(jnp.int32) for place in found]
    last = found[-1]
    found = list(_stacked([jnp.where(i < size, i, i - size) for i in found]))

    def fetch(some, values):
      for i in [some * SOME + j for j in range(SOME)]:
        if gathers:
          here = register(turned_ref, i)
          fetched = [
            jnp.take_along_axis(here, place & 7, axis=0) for place in found
          ]
          at = [place >> 3 == i for place in found]
          values = list(map(jnp.where, at, fetched, values))
          continue
        for j in range(SUBLANES):
          row = turned_ref[pl.ds(i * SUBLANES + j, 1), :]
          at = [place == i * SUBLANES + j for place in found]
          values = [
            jnp.where(here, row, value)
            for here, value in zip(at, values, strict=True)
          ]
      return values

    values = [jnp.zeros((SUBLANES, LANES), jnp.float32) for _ in found]
    values = jax.lax.fori_loop(0, count // SOME, fetch, values)
    for i, (value, place) in enumerate(zip(values, found, strict=True)):
      part = slice(i * SUBLANES, (i + 1) * SUBLANES)
      values_ref[part, rows] = value
      indices_ref[part, rows] = place.astype(jnp.uint32)

    if feedback:
      # What is larger is sent, and what is equal up to the last place sent.
      last = jnp.where(last < size, -1, last - size)
      limit_ref[...] = transposed_rows(least[:1])
      last_ref[...] = transposed_rows(last[:1])
      jax.lax.fori_loop(0, LANES // CHUNK, functools.partial(drop, block), None)

  def drop(block, i, _):
    here = pl.ds(pl.multiple_of(i * CHUNK, CHUNK), CHUNK)
    rows = pl.ds(pl.multiple_of(block * LANES + i * CHUNK, CHUNK), CHUNK)
    limit, last = limit_ref[here, :], last_ref[here, :]
    lane = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, LANES), 1)
    for part in columns:
      x = x_ref[rows, part] + residual_ref[rows, part]
      rank, place = _ranks(x), lane + part.start
      tied = (rank == limit) & (place <= last)
      dropped_ref[rows, part] = jnp.where((rank > limit) | tied, 0.0, x)

  jax.lax.fori_loop(0, tile // LANES, select, None)


def _select(x, residual, k):
  rows, size = x.shape
  tile = max(LANES, TILE // size)
  feedback = residual is not None
  arrays = (x, residual) if feedback else (x,)
  depth = -(-k // SUBLANES) * SUBLANES
  whole = pl.BlockSpec((tile, size), lambda i: (i, 0))
  turned = pl.BlockSpec((depth, tile), lambda i: (0, i))
  values, indices, *dropped = pl.pallas_call(
    functools.partial(
      _select_kernel, k=k, feedback=feedback, gathers=gathers_sublanes()
    ),
    grid=(pl.cdiv(rows, tile),),
    in_specs=len(arrays) * [whole],
    out_specs=[turned, turned] + feedback * [whole],
    out_shape=[
      result((depth, rows), jnp.float32, arrays),
      result((depth, rows), jnp.uint32, arrays),
    ]
    + feedback * [result((rows, size), jnp.float32, arrays)],
    scratch_shapes=[
      pltpu.VMEM((size, LANES), jnp.float32),
      pltpu.VMEM((size, LANES), jnp.float32),
      pltpu.VMEM((LANES, LANES), jnp.float32),
      pltpu.VMEM((LANES, LANES), jnp.int32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel',), vmem_limit_bytes=2**26
    ),
    name=f'top_{k}',
  )(*arrays)
  return values[:k].T, indices[:k].T, *dropped


def top_k(
  x: Float32[Array, 'rows size'], *, k: int
) -> tuple[Float32[Array, 'rows k'], UInt32[Array, 'rows k']]:
  """The ``k`` numbers of each row that are largest in magnitude."""
  return _select(x, None, k)


def top_k_with_feedback(
  x: Float32[Array, 'rows size'],
  residual: Float32[Array, 'rows size'],
  *,
  k: int,
) -> tuple[
  Float32[Array, 'rows k'], UInt32[Array, 'rows k'], Float32[Array, 'rows size']
]:
  """Selects of ``x + residual``, and says what is left."""
  return _select(x, residual, k)


def cannot_scatter(values: Any, indices: Any, *, size: int) -> str | None:
  """What :func:`scatter` and :func:`scatter_mean` would need instead."""
  del indices
  k = values.shape[-1]
  if size % LANES or size > LARGEST_ROW or k > LARGEST_K:
    return (
      f'k up to {LARGEST_K}, and rows of a multiple of 128 numbers, up to '
      f'{LARGEST_ROW}, not {k} of {size}'
    )
  return cannot_partition()


def _scatter_kernel(values_ref, indices_ref, x_ref, turned_ref, *, k):
  workers = values_ref.shape[0]
  tile, size = x_ref.shape
  some = LANES // SUBLANES  # Registers that are summed up at a time.
  sublane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)

  def scatter(block, _):
    rows = pl.ds(pl.multiple_of(block * LANES, LANES), LANES)

    def fill(part, _):
      places = [sublane + (part * some + i) * SUBLANES for i in range(some)]

      def add(n, total):
        decoded = [jnp.zeros((SUBLANES, LANES), jnp.float32)] * some
        for j in range(k):
          value = values_ref[n, j : j + 1, rows]
          index = indices_ref[n, j : j + 1, rows].astype(jnp.int32)
          decoded = [
            jnp.where(place == index, value, x)
            for place, x in zip(places, decoded, strict=True)
          ]
        return [t + x for t, x in zip(total, decoded, strict=True)]

      zeros = [jnp.zeros((SUBLANES, LANES), jnp.float32)] * some
      total = jnp.concatenate(jax.lax.fori_loop(0, workers, add, zeros))
      turned_ref[pl.ds(pl.multiple_of(part * LANES, LANES), LANES), :] = total

    jax.lax.fori_loop(0, size // LANES, fill, None)
    for j in range(0, size, LANES):
      total = turned_ref[j : j + LANES, :].T
      x_ref[rows, j : j + LANES] = total / workers if workers > 1 else total

  jax.lax.fori_loop(0, tile // LANES, scatter, None)


def scatter_mean(
  values: Float32[Array, 'n rows k'],
  indices: UInt32[Array, 'n rows k'],
  *,
  size: int,
) -> Float32[Array, 'rows size']:
  """The mean over workers of rows of zeros with their values in place."""
  workers, rows, k = values.shape
  tile = max(LANES, TILE // size)
  turned = pl.BlockSpec((workers, k, tile), lambda i: (0, 0, i))
  return pl.pallas_call(
    functools.partial(_scatter_kernel, k=k),
    grid=(pl.cdiv(rows, tile),),
    in_specs=[turned, turned],
    out_specs=pl.BlockSpec((tile, size), lambda i: (i, 0)),
    out_shape=result((rows, size), jnp.float32, values, indices),
    scratch_shapes=[pltpu.VMEM((size, LANES), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel',), vmem_limit_bytes=2**26
    ),
    name=f'scatter_{k}',
  )(jnp.swapaxes(values, 1, 2), jnp.swapaxes(indices, 1, 2))


def scatter(
  values: Float32[Array, 'rows k'],
  indices: UInt32[Array, 'rows k'],
  *,
  size: int,
) -> Float32[Array, 'rows size']:
  """Rows of zeros with ``values`` at ``indices``."""
  return scatter_mean(values[None], indices[None], size=size)
