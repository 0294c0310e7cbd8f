"""Puts selected numbers back into rows on TPUs, and adds up those of workers.

Each lane holds a row: a number goes to its place by a comparison with the
places in a register, and nothing is scattered in memory.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float32, UInt32

from jaxdist.kernels.tiles import find
from jaxdist.kernels.top_k.tpu import LARGEST_K, LARGEST_ROW
from jaxdist.kernels.tpu import (
  LANES,
  SUBLANES,
  cannot_partition,
  device_kind,
  result,
  step_rows,
)


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


def _scatter_kernel(values_ref, indices_ref, x_ref, turned_ref, *, k, some):
  workers = values_ref.shape[0]
  tile, size = x_ref.shape
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
      at = pl.multiple_of(part * some * SUBLANES, SUBLANES)
      turned_ref[pl.ds(at, some * SUBLANES), :] = total

    jax.lax.fori_loop(0, size // (some * SUBLANES), fill, None)
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
  tiles = find('scatter', device_kind())
  tile = step_rows(tiles, rows, size)
  # Registers that are summed up at a time.
  some = math.gcd(tiles.chunk // (SUBLANES * LANES), size // SUBLANES)
  turned = pl.BlockSpec((workers, k, tile), lambda i: (0, 0, i))
  return pl.pallas_call(
    functools.partial(_scatter_kernel, k=k, some=some),
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
