"""What the kernels for GPUs share: a warp takes a row.

A warpgroup, which runs a program, takes four rows. The numbers of a row lie
along the lanes of its warp: sums and maxima along rows are local additions and
one instruction for the warp, and no warp waits for another. All four warps take
a row that is too long for one; its array has no axis of rows.

All are lowered for CUDA and interpreted in tests; none has run on a GPU yet.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Int32

from jaxdist import compat
from jaxdist.kernels.tpu import cannot_partition

WARPS = 4  # Of a warpgroup.
LANES = 32  # Of a warp.
THREADS = WARPS * LANES
ROWS = WARPS  # Of a program, if each takes a warp.
LARGEST_ROW = 4096  # 128 registers of a thread, of 255.
INTERPRET: Any = False  # Tests put JAX's parameters here.


def cannot_run(rows: int, some: int = ROWS) -> str | None:
  """What a kernel whose programs take some rows would need instead."""
  if rows < some:
    return f'at least {some} rows, not {rows}'
  return cannot_partition()


def _mosaic():
  # Where no kernel runs, its compiler need not be loaded.
  from jax.experimental.pallas import mosaic_gpu

  return mosaic_gpu


def _layout(shape: tuple[int, ...]) -> Any:
  """Where the numbers of an array are whose axes begin with a program's rows.

  Those of a row lie along lanes, of which there are ``128 / rows`` for each. A
  program's only row lies along all.
  """
  mosaic = _mosaic()
  if not shape:
    return None  # All lanes have it.
  rows, ndim = shape[0], len(shape)
  lanes, of_warp = THREADS // min(rows, THREADS), rows // WARPS
  if ndim == 1 and lanes > 1:
    return _layout((rows, lanes)).reduce(1)  # All lanes of a row have its one.
  if ndim == 1:
    dims = {'warp_dims': (-3,), 'lane_dims': (-2,)}
    tiles = [(THREADS,), (LANES,), (1,)]
  elif shape[1] == 1 and ndim == 2:
    dims = {'warp_dims': (-2,), 'lane_dims': (mosaic.Replicated(lanes),)}
    tiles = [shape]
  elif of_warp == 1:
    dims = {'warp_dims': (-1 - ndim,), 'lane_dims': (-2,)}
    tiles = [(rows, *[1] * (ndim - 2), lanes), (1,)]
  else:
    dims = {'warp_dims': (-5,), 'lane_dims': (-3, -2)}
    tiles = [(rows, lanes), (of_warp, lanes), (1,)]
  tiling = mosaic.Tiling(tuple(tiles))
  return mosaic.Layout.TILED(tiling, **dims, vector_dim=-1)


def call(
  kernel: Callable[..., None],
  outputs: Sequence[Any],
  *arrays: Array,
  programs: int,
  scratch: Sequence[Any] = (),
  barriers: bool = False,
) -> Sequence[Array]:
  """Runs so many programs, of a warpgroup each.

  Args:
    kernel: takes references to arrays, outputs and scratch.
    outputs: their types.
    *arrays: that it reads.
    programs: how many.
    scratch: types in shared memory.
    barriers: whether threads wait for each other before and after each store.
      Without, the kernel waits where it must.

  Returns:
    The outputs.
  """
  mosaic = _mosaic()
  return mosaic.kernel(
    kernel,
    out_type=outputs,
    scratch_types=scratch,
    grid=(programs,),
    grid_names=('program',),
    compiler_params=mosaic.CompilerParams(
      lowering_semantics=mosaic.LoweringSemantics.Lane,  # Layouts as told.
      unsafe_no_auto_barriers=not barriers,
    ),
    interpret=INTERPRET,
  )(*arrays)


def shared(shape: tuple[int, ...], dtype: Any) -> Any:
  """Shared memory, for a program's scratch."""
  return _mosaic().SMEM(shape, dtype)


def each_warp(body: Callable[[Array], None]) -> None:
  """Calls ``body`` in each warp with its number; it computes with scalars."""
  _mosaic().warp_map(body)


def first_row(rows: int, some: int = ROWS) -> Array:
  """The first of a program's rows; the last ones' are moved up to the end."""
  return jnp.minimum(jax.lax.axis_index('program') * some, rows - some)


def at_rows(rows: int, some: int) -> Any:
  """Where they are; the only one has no axis of its own."""
  first = first_row(rows, some)
  return first if some == 1 else pl.ds(first, some)


def load(ref: Any, *at: Any) -> Array:
  """Reads a part of a matrix, or of rows' numbers, into registers."""
  return compat.load_registers(ref, at, _layout(ref.at[at].shape))


def store(ref: Any, *at: Any, value: Array) -> None:
  """The inverse of :func:`load`."""
  compat.store_registers(ref, at, value)


def iota(shape: tuple[int, ...], axis: int) -> Int32[Array, '...']:
  """Places along an axis."""
  layout = _layout(shape)
  return _mosaic().broadcasted_iota(jnp.int32, shape, axis, layout=layout)


def filled(shape: tuple[int, ...], value: Any, dtype: Any) -> Array:
  """An array of one number, in registers, to begin a loop with."""
  array = jnp.full(shape, value, dtype)
  return _mosaic().layout_cast(array, _layout(shape))


def spread(x: Array, shape: tuple[int, ...]) -> Array:
  """Numbers of rows, along the rows."""
  wide = jax.lax.broadcast_in_dim(x, shape, range(x.ndim))
  return _mosaic().layout_cast(wide, _layout(shape))


def along_rows(reduce: Callable[..., Array], x: Array) -> Array:
  """A number of each row: the reduction over all other axes."""
  if x.ndim == 1:
    return reduce(x, axis=0)
  return functools.reduce(lambda x, _: reduce(x, axis=1), range(1, x.ndim), x)
