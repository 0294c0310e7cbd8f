"""Top-k of rows on TPUs: sorting networks across registers, in two levels.

Blocks of 128 rows are turned so that each lane holds a row, and the lists of up
to eight blocks lie side by side in a register's sublanes. Comparing registers
then works on 1024 rows at once, and nothing moves between lanes:

1. The largest ``k`` numbers of a row lie in the ``k`` groups of neighbours
   whose maxima are largest. So the maxima of all groups are found, and of these
   the best.
2. The numbers of those groups are the candidates, of which the best are found.

One network over the magnitudes finds the k-th largest. A second, over the
places of all that is larger, and then of what is equal to it, finds the k
places. Neither carries anything along. Item ``i`` of block ``b``'s list is in
row ``i * blocks + b`` of its scratch memory.
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
from jaxdist.kernels.tiles import find
from jaxdist.kernels.top_k.networks import in_order, largest
from jaxdist.kernels.tpu import (
  LANES,
  SUBLANES,
  cannot_partition,
  device_kind,
  gathers_sublanes,
  result,
  step_rows,
  transposed_rows,
)

LARGEST_ROW = 4096
LARGEST_K = 64
INFINITY = 0x7F800000  # The bits of a float.
SMALLEST = 0x00800000  # Those of the smallest that is not subnormal.
ABREAST = 8  # Registers of groups at a time, to hide waits.
LAST = -(2.0**24)  # Below all ranks.


def cannot_select(x: Any, *residual: Any, k: int) -> str | None:
  """What :func:`top_k`, with feedback or without, would need instead."""
  del residual
  size = x.shape[1]
  if size % LANES or size > LARGEST_ROW:
    return f'rows of a multiple of 128 numbers, up to {LARGEST_ROW}, not {size}'
  if k > LARGEST_K:
    return f'k up to {LARGEST_K}, not {k} of {size}'
  return cannot_partition()


def _length(k: int) -> int:
  """Of the sorted lists that hold the best so far."""
  return max(SUBLANES, 2 ** math.ceil(math.log2(k)))


def _bits(x):
  """Of magnitudes."""
  return float_bits(x) & 0x7FFFFFFF


def _ranks(bits):
  """Floats in the definition's order of magnitudes, NaN as infinity.

  Floats take one instruction where integers take two to find the larger.
  Subnormal magnitudes, which units may take as zero, become negative integers.
  """
  bits = jnp.minimum(bits, INFINITY)
  subnormal = (bits - SMALLEST).astype(jnp.float32)
  return jnp.where(bits < SMALLEST, subnormal, from_float_bits(bits))


def _group(size: int, k: int) -> int:
  """How many neighbours form a group: about as many groups as candidates."""
  group = 1
  while group < LANES // SUBLANES and 2 * group**2 * k <= size:
    group *= 2
  return group


def _padded(items: int, k: int, blocks: int) -> int:
  """Items of a list with those that fill up registers and sorted lists."""
  return pl.cdiv(items * blocks, SUBLANES * _length(k)) * (
    SUBLANES * _length(k) // blocks
  )


def _select_kernel(*refs, k, group, blocks, chunk, feedback, gathers):
  if feedback:
    x_ref, residual_ref, values_ref, indices_ref, dropped_ref, *rest = refs
  else:
    x_ref, values_ref, indices_ref, *rest = refs
  turned_ref, numbers_ref, ranks_ref, candidates_ref, *rest = rest
  groups_ref, found_ref, *rest = rest
  tile, size = x_ref.shape
  length, deep = _length(k), pl.cdiv(k, SUBLANES)
  registers = size // (SUBLANES * group)  # Of groups' first numbers, say.
  abreast = math.gcd(registers, ABREAST)
  eight = SUBLANES * group
  columns = [slice(j, j + LANES) for j in range(0, size, LANES)]
  of_list = 0  # The part of its block's list that a sublane holds.
  if blocks < SUBLANES:
    sublane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
    of_list = sublane >> int(math.log2(blocks))

  def best(items, place=lambda item: item, sort=False):
    """Which of each list are the ``k`` first, equal ones in order of place."""
    total = _padded(items, k, blocks)
    if items < total:
      fill = jnp.full(((total - items) * blocks, LANES), LAST)
      ranks_ref[items * blocks : total * blocks, :] = fill

    def ranks(i):
      return ranks_ref[pl.ds(pl.multiple_of(i * SUBLANES, SUBLANES), SUBLANES)]

    count = total * blocks // SUBLANES
    least = largest(count, length, blocks, ranks)[k - 1]

    def order(i):
      """Falls with the place, and by a list's length for what is equal."""
      rank = ranks(i)
      at = jnp.float32(place(i * (SUBLANES // blocks) + of_list))
      equal = jnp.where(rank == least, -1.0 * total, -4.0 * total)
      return jnp.where(rank > least, 0.0, equal) - at

    found = largest(count, length, blocks, order)[:k]
    found = [jnp.where(i > -total, i, i + total) for i in found]
    return [
      (-i).astype(jnp.int32) for i in (in_order(found) if sort else found)
    ]

  def write(ref, found):
    for i, item in enumerate(found):
      ref[i * blocks : (i + 1) * blocks, :] = item[:blocks]

  def read(ref, block):
    """Of a block's lists, eight items a register."""
    return [
      ref[pl.ds(i * SUBLANES * blocks + block, SUBLANES, blocks), :]
      for i in range(deep)
    ]

  def pick(register, which):
    """Of each lane, the sublanes that are named."""
    if gathers:
      return jnp.take_along_axis(register, which, axis=0)
    picked = register[:1]
    for i in range(1, SUBLANES):
      picked = jnp.where(which == i, register[i : i + 1], picked)
    return jnp.broadcast_to(picked, register.shape)

  def number(block, i, j):
    """Where the ``j``-th ones of the ``i``-th eight groups are."""
    at = block * size + (i * group + j) * SUBLANES
    return pl.ds(pl.multiple_of(at, SUBLANES), SUBLANES)

  def candidates(block, i, j):
    """Where the ``j``-th ones of the ``i``-th eight groups found are."""
    return pl.ds((j * k + i * SUBLANES) * blocks + block, SUBLANES, blocks)

  def candidate(item):
    """Which one an item is, in order of place: of a group, then of the next."""
    j = (item * pl.cdiv(2**16, k)) >> 16  # item // k
    return item * group - j * (k * group - 1)

  def select(some, _):
    first = some * blocks * LANES

    def rows_of(block):
      return pl.ds(pl.multiple_of(first + block * LANES, LANES), LANES)

    def turn(some, _):
      squares = [
        (some * pair + block, n)
        for block in range(pair)
        for n in range(size // LANES)
      ]

      def find_maxima(square):
        block, n = squares[square]
        for i in range(n * LANES // eight, (n + 1) * LANES // eight):
          members = []
          for j in range(group):
            at = square % 2 * LANES + i * eight % LANES + j
            members.append(turned_ref[pl.ds(at, SUBLANES, group), :])
            numbers_ref[number(block, i, j), :] = members[-1]
          at = pl.ds(i * SUBLANES * blocks + block, SUBLANES, blocks)
          members = map(_bits, members)
          ranks_ref[at, :] = _ranks(functools.reduce(jnp.maximum, members))

      for square, (block, n) in enumerate(squares):
        column = columns[n]
        x = x_ref[rows_of(block), column]
        if feedback:
          x += residual_ref[rows_of(block), column]
        x = x.T
        if square:  # Meanwhile.
          find_maxima(square - 1)
        at = square % 2 * LANES
        turned_ref[at : at + LANES, :] = x
      find_maxima(len(squares) - 1)

    pair = math.gcd(blocks, 4)
    jax.lax.fori_loop(0, blocks // pair, turn, None)
    # In order of place, so that candidates are.
    write(groups_ref, best(size // group, sort=True))

    def gather(block, _):
      groups = read(groups_ref, block)
      which = [g & (SUBLANES - 1) for g in groups]

      def look(some, held):
        held = list(held)
        for i in [some * abreast + n for n in range(abreast)]:
          here = [g >> 3 == i for g in groups]
          for j in range(group):
            x = numbers_ref[number(block, i, j), :]
            for d in range(deep):
              n = d * group + j
              held[n] = jnp.where(here[d], pick(x, which[d]), held[n])
        return held

      held = deep * group * [jnp.zeros((SUBLANES, LANES), jnp.float32)]
      held = jax.lax.fori_loop(0, registers // abreast, look, held)
      for j in range(group):
        for d in range(deep):  # What is too much, the next ones overwrite.
          x, at = held[d * group + j], candidates(block, d, j)
          candidates_ref[at, :] = x
          ranks_ref[at, :] = _ranks(_bits(x))

    jax.lax.fori_loop(0, blocks, gather, None)
    write(found_ref, best(k * group, candidate))

    def finish(block, _):
      groups = read(groups_ref, block)
      rows = rows_of(block)
      for d, item in enumerate(read(found_ref, block)):
        slot, j = item >> int(math.log2(group)), item & (group - 1)
        which, slot = slot & (SUBLANES - 1), slot >> 3
        value, place = jnp.zeros(item.shape, jnp.float32), item
        for e in range(deep):
          here = slot == e
          place = jnp.where(here, pick(groups[e], which) * group + j, place)
          for n in range(group):
            x = candidates_ref[candidates(block, e, n), :]
            value = jnp.where(here & (j == n), pick(x, which), value)
        part = slice(d * SUBLANES, (d + 1) * SUBLANES)
        values_ref[part, rows] = value
        indices_ref[part, rows] = place.astype(jnp.uint32)
      if feedback:
        i = (k - 1) % SUBLANES  # The last one found is the smallest.
        drop(rows_of, block, value[i : i + 1], place[i : i + 1], *rest)

    jax.lax.fori_loop(0, blocks, finish, None)

  def drop(rows_of, block, value, place, limit_ref, last_ref):
    # What is larger is sent, and what is equal up to the last place sent. NaN
    # is no larger than infinity.
    bits = _bits(value)
    never = jnp.int32(2**31 - 1)
    limit_ref[...] = transposed_rows(jnp.where(bits < INFINITY, bits, never))
    last_ref[...] = transposed_rows(place)
    few = chunk // LANES

    def some(i, _):
      here = pl.ds(pl.multiple_of(i * few, few), few)
      rows = pl.ds(pl.multiple_of(rows_of(block).start + i * few, few), few)
      larger, last = limit_ref[here, :], last_ref[here, :]
      equal = jnp.minimum(larger, INFINITY) - 1
      lane = jax.lax.broadcasted_iota(jnp.int32, (few, LANES), 1)
      for column in columns:
        x = x_ref[rows, column] + residual_ref[rows, column]
        limit = jnp.where(lane <= last - column.start, equal, larger)
        dropped_ref[rows, column] = jnp.where(_bits(x) > limit, 0.0, x)

    jax.lax.fori_loop(0, LANES // few, some, None)

  jax.lax.fori_loop(0, tile // (blocks * LANES), select, None)


def _select(x, residual, k):
  rows, size = x.shape
  feedback = residual is not None
  tiles = find(f'top_k {k}' + feedback * ' feedback', device_kind())
  tile = step_rows(tiles, rows, size)
  blocks, group = min(SUBLANES, tile // LANES), _group(size, k)
  arrays = (x, residual) if feedback else (x,)
  depth = pl.cdiv(k, SUBLANES) * SUBLANES
  found = k * group + depth - k
  lists = blocks * max(
    found,
    _padded(size // group, k, blocks),
    _padded(k * group, k, blocks),
  )
  whole = pl.BlockSpec((tile, size), lambda i: (i, 0))
  turned = pl.BlockSpec((depth, tile), lambda i: (0, i))
  values, indices, *dropped = pl.pallas_call(
    functools.partial(
      _select_kernel,
      k=k,
      group=group,
      blocks=blocks,
      chunk=min(tiles.chunk, LANES * LANES),
      feedback=feedback,
      gathers=gathers_sublanes(),
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
      pltpu.VMEM((2 * LANES, LANES), jnp.float32),
      pltpu.VMEM((blocks * size, LANES), jnp.float32),
      pltpu.VMEM((lists, LANES), jnp.float32),
      pltpu.VMEM((blocks * found, LANES), jnp.float32),
      pltpu.VMEM((blocks * depth, LANES), jnp.int32),
      pltpu.VMEM((blocks * depth, LANES), jnp.int32),
    ]
    + feedback * 2 * [pltpu.VMEM((LANES, LANES), jnp.int32)],
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
