"""The ring as one TPU kernel that sends to its neighbours by itself.

A grid step multiplies a chunk of rows with a tile of columns. What goes to a
neighbour leaves while the next products are computed: whole chunks on their way
to a product, sums tile by tile. Every transfer has a place of its own in the
receiver's memory, so that nothing is overwritten before it is read and no
permission to send is needed.

Chunks travel half of the ring at most. The hops of one are numbers of the same
parity, two apart: odd ones go to the right and even ones to the left.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from jaxdist.kernels.collective_matmul.reference import product
from jaxdist.kernels.tpu import LANES, cannot_partition, result

MEMORY = 2**25  # Bytes for the chunk, the tiles and their doubles.
TILE = 512  # Columns at most.
ROWS = 16  # That a register of bfloat16 numbers has.
IDS = {'gather': 11, 'scatter': 12}  # Of the barriers; no other kernel has one.


def _tile(cols: int) -> int:
  return math.gcd(cols, TILE)


def _unsupported(rows: int, x: Any, w: Any) -> str | None:
  (inner, cols), size = w.shape, x.dtype.itemsize
  if rows % ROWS or inner % LANES or cols % LANES:
    return (
      f'chunks of a multiple of {ROWS} rows, and multiples of {LANES} columns, '
      f'not {rows} x {inner} times {inner} x {cols}'
    )
  tile = _tile(cols)
  needed = 2 * size * inner * (rows + tile) + 5 * 4 * rows * tile
  if needed > MEMORY:
    return f'chunks and tiles that take up to {MEMORY} bytes, not {needed}'
  return cannot_partition()


def cannot_gather(x: Any, w: Any, *, axis: str) -> str | None:
  """What :func:`all_gather_matmul` would need instead."""
  del axis
  return _unsupported(x.shape[0], x, w)


def cannot_scatter(x: Any, w: Any, *, axis: str) -> str | None:
  """What :func:`matmul_reduce_scatter` would need instead."""
  return _unsupported(x.shape[0] // jax.lax.axis_size(axis), x, w)


def _away(hop: Any) -> Any:
  """How many places to the left something was when it made so many hops."""
  return jnp.where((hop & 1) == 1, (hop + 1) >> 1, -(hop >> 1))


def _next(axis: str, me: Array, hop: Any) -> dict[str, Array]:
  """The worker that a hop leads to."""
  workers = jax.lax.axis_size(axis)
  step = jnp.where((hop & 1) == 1, 1, workers - 1)
  return {axis: jax.lax.rem(me + step, workers)}


def _meet(axis, me, workers):
  """Waits until both neighbours are in this kernel too."""
  barrier = pltpu.get_barrier_semaphore()
  for neighbour in (me + 1, me + workers - 1):
    there = {axis: jax.lax.rem(neighbour, workers)}
    pl.semaphore_signal(barrier, 1, device_id=there)
  pl.semaphore_wait(barrier, 2)


def _call(kernel, name, workers, tiles, in_specs, out, out_specs, scratch):
  return pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(workers, tiles),
      in_specs=in_specs,
      out_specs=out_specs,
      scratch_shapes=scratch,
    ),
    out_shape=out,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('arbitrary', 'arbitrary'),
      vmem_limit_bytes=2**26,
      collective_id=IDS[name],
      has_side_effects=True,
    ),
    name=f'ring_{name}',
  )


def _gather_kernel(me_ref, x_ref, w_ref, y_ref, arrived_ref, *scratch, axis):
  chunk_ref, sent, received = scratch
  step, column = pl.program_id(0), pl.program_id(1)
  workers = jax.lax.axis_size(axis)

  def transfer(hop):
    """Of what came by the hop before it, which is two less."""
    return pltpu.make_async_remote_copy(
      arrived_ref.at[jnp.maximum(hop - 2, 0)],
      arrived_ref.at[hop],
      sent.at[hop],
      received.at[hop],
      device_id=_next(axis, me_ref[0], hop),
    )

  @pl.when((step == 0) & (column == 0))
  def start():
    _meet(axis, me_ref[0], workers)
    pltpu.sync_copy(x_ref, arrived_ref.at[0])
    if workers > 1:
      transfer(1).start()

  @pl.when(column == 0)
  def fetch():
    @pl.when(step > 0)
    def arrive():
      transfer(step).wait_recv()

    @pl.when(step < workers - 2)
    def pass_on():
      transfer(step + 2).start()

    pltpu.sync_copy(arrived_ref.at[step], chunk_ref)

  y_ref[...] = product(chunk_ref[...], w_ref[...]).astype(y_ref.dtype)

  @pl.when((step == workers - 1) & (column == pl.num_programs(1) - 1))
  def end():
    for hop in range(1, workers):
      transfer(hop).wait_send()


def all_gather_matmul(
  x: Float[Array, 'rows inner'], w: Float[Array, 'inner cols'], *, axis: str
) -> Float[Array, 'all_rows cols']:
  """All workers' rows times this worker's columns."""
  workers = jax.lax.axis_size(axis)
  (rows, inner), cols = x.shape, w.shape[1]
  tile = _tile(cols)
  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  chunk_of = lambda hop, me: jax.lax.rem(me[0] + workers - _away(hop), workers)
  y, _ = _call(
    functools.partial(_gather_kernel, axis=axis),
    'gather',
    workers,
    cols // tile,
    [anywhere, pl.BlockSpec((inner, tile), lambda s, j, me: (0, j))],
    [
      result((workers * rows, cols), x.dtype, x, w),
      result((workers, rows, inner), x.dtype, x, w),
    ],
    [
      pl.BlockSpec((rows, tile), lambda s, j, me: (chunk_of(s, me), j)),
      anywhere,
    ],
    [
      pltpu.VMEM((rows, inner), x.dtype),
      pltpu.SemaphoreType.DMA((workers,)),
      pltpu.SemaphoreType.DMA((workers,)),
    ],
  )(jax.lax.axis_index(axis)[None], x, w)
  return y


def _scatter_kernel(me_ref, x_ref, w_ref, y_ref, arrived_ref, *scratch, axis):
  going, coming, sent, received = scratch
  step, column = pl.program_id(0), pl.program_id(1)
  workers, tiles = jax.lax.axis_size(axis), pl.num_programs(1)
  place = step * tiles + column  # Of transfers, in order of time.
  transfers = received.shape[0]

  def transfer(i):
    """Of a tile's sum, which has as many hops left as there are steps."""
    slot = jax.lax.rem(i, 2)
    return pltpu.make_async_remote_copy(
      going.at[slot],
      arrived_ref.at[i],
      sent.at[slot],
      received.at[i],
      device_id=_next(axis, me_ref[0], workers - 1 - i // tiles),
    )

  def arrive(i):
    transfer(i).wait_recv()
    pltpu.sync_copy(arrived_ref.at[i], coming)

  @pl.when(place == 0)
  def start():
    _meet(axis, me_ref[0], workers)

  total = product(x_ref[...], w_ref[...])

  @pl.when(step < 2)
  def begin():
    coming[...] = jnp.zeros_like(total)

  @pl.when(step >= 2)
  def add_same_way():
    arrive(place - 2 * tiles)

  total += coming[...]

  @pl.when(step < workers - 1)
  def pass_on():
    @pl.when(place >= 2)
    def free():
      transfer(place - 2).wait_send()

    going[jax.lax.rem(place, 2)] = total
    transfer(place).start()

  @pl.when(step == workers - 1)
  def write():
    if workers > 1:
      arrive(place - tiles)  # From the other side.
    y_ref[...] = (total + coming[...]).astype(y_ref.dtype)

  @pl.when(place == workers * tiles - 1)
  def end():
    if workers > 1:
      for i in range(max(0, transfers - 2), transfers):
        transfer(jnp.int32(i)).wait_send()


def matmul_reduce_scatter(
  x: Float[Array, 'all_rows inner'], w: Float[Array, 'inner cols'], *, axis: str
) -> Float[Array, 'rows cols']:
  """This worker's rows of the sum of all workers' products."""
  workers = jax.lax.axis_size(axis)
  inner, cols = w.shape
  rows, tile = x.shape[0] // workers, _tile(w.shape[1])
  tiles = cols // tile
  wide = jnp.promote_types(x.dtype, jnp.float32)
  chunk_of = lambda step, me: jax.lax.rem(
    me[0] + workers + _away(workers - 1 - step), workers
  )
  transfers = max(1, (workers - 1) * tiles)
  y, _ = _call(
    functools.partial(_scatter_kernel, axis=axis),
    'scatter',
    workers,
    tiles,
    [
      pl.BlockSpec((rows, inner), lambda s, j, me: (chunk_of(s, me), 0)),
      pl.BlockSpec((inner, tile), lambda s, j, me: (0, j)),
    ],
    [
      result((rows, cols), x.dtype, x, w),
      result((transfers, rows, tile), wide, x, w),
    ],
    [
      # Written in the last step alone; until then its first block stays.
      pl.BlockSpec(
        (rows, tile), lambda s, j, me: (0, jnp.where(s == workers - 1, j, 0))
      ),
      pl.BlockSpec(memory_space=pl.ANY),
    ],
    [
      pltpu.VMEM((2, rows, tile), wide),
      pltpu.VMEM((rows, tile), wide),
      pltpu.SemaphoreType.DMA((2,)),
      pltpu.SemaphoreType.DMA((transfers,)),
    ],
  )(jax.lax.axis_index(axis)[None], x, w)
  return y
