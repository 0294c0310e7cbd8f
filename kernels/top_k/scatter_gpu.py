"""Puts selected numbers back into rows on GPUs, and adds up those of workers.

A row lies in shared memory. Its warp goes through the numbers as scalars and
adds each where it belongs: the sums are in the workers' order, and nothing is
scattered in memory.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float32, UInt32

from jaxdist.kernels import gpu
from jaxdist.kernels.tpu import result

LARGEST_ROW = 8192  # Four are in shared memory.
AT_ONCE = 16  # Numbers that are under way from memory to a warp.
MOST = 32  # Registers of a thread that are filled at a time.
PADDING = 4  # Numbers after a row, where those without a place go.


def cannot_scatter(values: Any, indices: Any, *, size: int) -> str | None:
  """What :func:`scatter` and :func:`scatter_mean` would need instead."""
  del indices
  if size % gpu.LANES or size > LARGEST_ROW:
    return (
      f'rows of a multiple of {gpu.LANES} numbers, up to {LARGEST_ROW}, '
      f'not {size}'
    )
  return gpu.cannot_run(values.shape[-2])


def _kernel(values_ref, indices_ref, x_ref, rows_ref):
  workers, rows, k = values_ref.shape
  _, size = x_ref.shape
  first = gpu.first_row(rows)
  here, all_four = pl.ds(first, gpu.ROWS), pl.ds(0, gpu.ROWS)
  some = gpu.LANES * math.gcd(size // gpu.LANES, MOST)

  def for_parts(body):
    def part(i, _):
      body(pl.ds(i * some, some))

    jax.lax.fori_loop(0, size // some, part, None)

  zeros = gpu.filled((gpu.ROWS, some), 0, jnp.float32)
  for_parts(lambda span: gpu.store(rows_ref, all_four, span, value=zeros))

  @gpu.each_warp
  def _(warp):
    row = first + warp

    def add(n, numbers):
      values = [values_ref[n, row, j] for j in numbers]
      indices = [indices_ref[n, row, j] for j in numbers]
      places = [jnp.minimum(i, size).astype(jnp.int32) for i in indices]
      if workers > 1:  # A worker's places are different.
        before = [rows_ref[warp, place] for place in places]
        values = [a + b for a, b in zip(before, values, strict=True)]
      for place, value in zip(places, values, strict=True):
        rows_ref[warp, place] = value

    def add_all(n, _):
      def add_some(i, _):
        add(n, [i * AT_ONCE + j for j in range(AT_ONCE)])

      jax.lax.fori_loop(0, k // AT_ONCE, add_some, None)
      add(n, range(k - k % AT_ONCE, k))

    jax.lax.fori_loop(0, workers, add_all, None)

  def finish(span):
    x = gpu.load(rows_ref, all_four, span)
    gpu.store(x_ref, here, span, value=x / workers)

  for_parts(finish)


def scatter_mean(
  values: Float32[Array, 'n rows k'],
  indices: UInt32[Array, 'n rows k'],
  *,
  size: int,
) -> Float32[Array, 'rows size']:
  """The mean over workers of rows of zeros with their values in place."""
  rows = values.shape[1]
  (x,) = gpu.call(
    _kernel,
    [result((rows, size), jnp.float32, values, indices)],
    values,
    indices,
    programs=pl.cdiv(rows, gpu.ROWS),
    scratch=[gpu.shared((gpu.ROWS, size + PADDING), jnp.float32)],
    barriers=True,
  )
  return x


def scatter(
  values: Float32[Array, 'rows k'],
  indices: UInt32[Array, 'rows k'],
  *,
  size: int,
) -> Float32[Array, 'rows size']:
  """Rows of zeros with ``values`` at ``indices``."""
  return scatter_mean(values[None], indices[None], size=size)
