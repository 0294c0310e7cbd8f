"""Rotation on TPUs: one pass over memory, on the matrix unit.

Walsh-Hadamard matrices are Kronecker products: registers of 128 lanes are
multiplied by the one of that size, and then added and subtracted among each
other. Its entries are exact in bfloat16, so that a float32 product is one with
the three bfloat16 numbers that a float32 is the sum of.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float32, Key

from jaxdist.kernels.hadamard.reference import matrix, signs
from jaxdist.kernels.tiles import find
from jaxdist.kernels.tpu import (
  LANES,
  SUBLANES,
  cannot_partition,
  cost,
  device_kind,
  result,
  rows_of,
  step_rows,
)

LARGEST_ROW = 8192


def cannot_rotate(x: Any, key: Any) -> str | None:
  """What :func:`rotate` and :func:`unrotate` would need instead."""
  del key
  if not LANES <= x.shape[1] <= LARGEST_ROW:
    return f'rows of {LANES} to {LARGEST_ROW} numbers, not {x.shape[1]}'
  return cannot_partition()


def _parts(x):
  """The bfloat16 numbers that add up to float32 ones, side by side."""
  parts = []
  for _ in range(3):
    parts.append(x.astype(jnp.bfloat16))
    x -= parts[-1].astype(jnp.float32)
  return jnp.concatenate(parts, axis=1)


def _butterfly(blocks):
  """Each with each, with the signs of a Walsh-Hadamard matrix."""
  if len(blocks) == 1:
    return blocks
  low = _butterfly(blocks[: len(blocks) // 2])
  high = _butterfly(blocks[len(blocks) // 2 :])
  return [a + b for a, b in zip(low, high, strict=True)] + [
    a - b for a, b in zip(low, high, strict=True)
  ]


def _kernel(before_ref, after_ref, matrix_ref, x_ref, y_ref, *, chunk):
  tile, size = x_ref.shape
  columns = range(0, size, LANES)

  def rotate(i, _):
    rows = pl.ds(pl.multiple_of(i * chunk, chunk), chunk)
    x = x_ref[rows, :] * before_ref[...]
    # One above the other, so that the matrix is loaded once for all.
    x = jnp.concatenate([x[:, j : j + LANES] for j in columns], axis=0)
    y = jnp.dot(_parts(x), matrix_ref[...], preferred_element_type=jnp.float32)
    blocks = [y[j : j + chunk] for j in range(0, len(columns) * chunk, chunk)]
    y = jnp.concatenate(_butterfly(blocks), axis=1)
    y_ref[rows, :] = y * after_ref[...]

  jax.lax.fori_loop(0, tile // chunk, rotate, None)


def _hadamard(x, before, after):
  rows, size = x.shape
  tiles = find('hadamard', device_kind())
  tile = step_rows(tiles, rows, size, least=SUBLANES)
  chunk = min(tile, max(SUBLANES, rows_of(tiles.chunk, size)))
  row = pl.BlockSpec((1, size), lambda i: (0, 0))
  whole = pl.BlockSpec((tile, size), lambda i: (i, 0))
  # Normalised at first, so that nothing on the way exceeds the result.
  before = before * np.float32(size**-0.5)
  blocks = jnp.asarray(np.tile(matrix(LANES), (3, 1)), jnp.bfloat16)
  y = result(x.shape, jnp.float32, x, before, after)
  return pl.pallas_call(
    functools.partial(_kernel, chunk=chunk),
    grid=(pl.cdiv(rows, tile),),
    in_specs=[row, row, pl.BlockSpec(blocks.shape, lambda i: (0, 0)), whole],
    out_specs=whole,
    out_shape=y,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel',), vmem_limit_bytes=2**26
    ),
    cost_estimate=cost(x, y),
    name='hadamard',
  )(before[None], after[None], blocks, x)


def rotate(
  x: Float32[Array, 'rows size'], key: Key[Array, '']
) -> Float32[Array, 'rows size']:
  """Flips random columns, then multiplies each row by ``H``."""
  flips = signs(key, x.shape[1])
  return _hadamard(x, flips, jnp.ones_like(flips))


def unrotate(
  y: Float32[Array, 'rows size'], key: Key[Array, '']
) -> Float32[Array, 'rows size']:
  """The inverse of :func:`rotate`."""
  flips = signs(key, y.shape[1])
  return _hadamard(y, jnp.ones_like(flips), flips)
