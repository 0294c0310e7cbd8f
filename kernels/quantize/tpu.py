"""Quantization on TPUs: one pass over memory, in tiles of whole rows.

A tile's rows go through in chunks that fit into registers. Narrow results, a
scale a row or fewer than 128 words a row, are laid side by side before they
leave, because memory holds rows of 128 numbers: alone they would take up to 128
times their size.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float32, Key, UInt32

from jaxdist.kernels import numbers
from jaxdist.kernels.quantize.formats import FORMATS
from jaxdist.kernels.tiles import find
from jaxdist.kernels.tpu import (
  LANES,
  SUBLANES,
  cannot_partition,
  cost,
  device_kind,
  lane_group,
  result,
  rows_of,
  spread,
  step_rows,
  transposed_columns,
  transposed_rows,
)

LARGEST_ROW = 8192
MOST_ABREAST = 8  # Rows whose words lie side by side.
SOME = 8  # Workers at most whose words are in a tile.


def _unsupported(size: int, format: str, key: Any = None) -> str | None:
  """What rows would have to be like to be taken, or ``None`` if they are."""
  if size % LANES or size > LARGEST_ROW:
    return f'rows of a multiple of 128 numbers, up to {LARGEST_ROW}, not {size}'
  words = size * FORMATS[format].bits // 32
  if words % LANES and (LANES % words or _abreast(words) > MOST_ABREAST):
    return f'rows of 16, 32, 64 or a multiple of 128 words, not {words}'
  if key is not None and size % (4 * LANES):
    return f'rows of a multiple of 512 numbers to round at random, not {size}'
  return cannot_partition()


def cannot_encode(x: Any, *others: Any, format: str) -> str | None:
  """What :func:`quantize`, with feedback or without, would need instead."""
  return _unsupported(x.shape[1], format, others[-1])


def cannot_decode(
  words: Any, scale: Any, *, format: str, count: int
) -> str | None:
  """What :func:`dequantize` and :func:`dequantize_mean` would need instead."""
  del words, scale
  return _unsupported(count, format)


def _abreast(words: int) -> int:
  """How many rows' words lie side by side."""
  return max(1, LANES // words)


def _cut(kernel: str, rows: int, size: int, abreast: int) -> tuple[int, int]:
  """How many rows a grid step has, and a chunk of it."""
  tiles = find(kernel, device_kind())
  tile = step_rows(tiles, rows, size)
  chunk = min(tile, rows_of(tiles.chunk, size))
  return tile, max(SUBLANES * abreast, chunk)


def _for_chunks(tile: int, chunk: int, body):
  """Calls ``body`` with each chunk's first row."""
  jax.lax.fori_loop(
    0, tile // chunk, lambda i, _: body(pl.multiple_of(i * chunk, chunk)), None
  )


def _pack(codes, bits):
  """Words of a chunk; with fewer than 128 a row, repeated to fill 128 lanes."""
  rows, size = codes.shape
  slots = 32 // bits
  words = size // slots
  if words % LANES == 0:
    parts = [codes[:, s * words : (s + 1) * words] for s in range(slots)]
    return functools.reduce(
      jnp.bitwise_or, [part << (s * bits) for s, part in enumerate(parts)]
    )
  # A column of registers holds several slots.
  wide = LANES // words * bits
  columns = [codes[:, j : j + LANES] for j in range(0, size, LANES)]
  packed = functools.reduce(
    jnp.bitwise_or, [column << (j * wide) for j, column in enumerate(columns)]
  )
  return spread(packed << (lane_group((rows, LANES), words) * bits), words)


def _dither(seed, first, shape):
  """Rows of the definition's random numbers, from the ``first`` on."""
  rows, size = shape
  quarter = rows, size // 4
  row = jax.lax.broadcasted_iota(jnp.int32, quarter, 0).astype(jnp.uint32)
  column = jax.lax.broadcasted_iota(jnp.int32, quarter, 1).astype(jnp.uint32)
  parts = []
  for word in numbers.threefry(seed, row + first, column):
    parts += [word, word >> 16]
  return numbers.to_dither(jnp.concatenate(parts, axis=1))


def _encode_kernel(seed_ref, *refs, format, chunk, stochastic, feedback):
  code = FORMATS[format]
  if feedback:
    x_ref, residual_ref, words_ref, scale_ref, dropped_ref, *scratch = refs
  else:
    x_ref, words_ref, scale_ref, *scratch = refs
  scales_ref, repeated_ref = scratch
  tile, size = x_ref.shape
  words = size * code.bits // 32
  abreast = _abreast(words)
  first = (pl.program_id(0) * tile).astype(jnp.uint32)

  def encode(start):
    rows = pl.ds(start, chunk)
    x, dither = x_ref[rows, :], None
    if feedback:
      x += residual_ref[rows, :]
    if stochastic:
      seed = seed_ref[0, 0], seed_ref[0, 1]
      dither = _dither(seed, first + start.astype(jnp.uint32), (chunk, size))
    codes, scale = code.encode(x, dither)
    packed = _pack(codes, code.bits)
    if abreast == 1:
      words_ref[rows, :] = packed.astype(jnp.uint32)
    else:
      repeated_ref[rows, :] = packed
    scales_ref[rows, :] = jnp.broadcast_to(scale, (chunk, LANES))
    if feedback:
      decoded = code.decode(codes << (32 - code.bits), scale)
      dropped_ref[rows, :] = x - decoded

  _for_chunks(tile, chunk, encode)

  def narrow(start):
    columns = scales_ref[pl.ds(start, LANES), :]
    scale_ref[:, pl.ds(start, LANES)] = transposed_columns(columns)
    if abreast > 1:
      few = LANES // abreast
      side_by_side = 0
      group = lane_group((few, LANES), words)
      for i in range(abreast):
        row = repeated_ref[pl.ds(start + i, few, abreast), :]
        side_by_side = jnp.where(group == i, row, side_by_side)
      at = pl.ds(pl.multiple_of(jax.lax.div(start, abreast), few), few)
      words_ref[at, :] = side_by_side.astype(jnp.uint32)

  _for_chunks(tile, LANES, narrow)


def _encode(x, residual, key, format):
  rows, size = x.shape
  bits = FORMATS[format].bits
  words = size * bits // 32
  abreast = _abreast(words)
  stochastic, feedback = key is not None, residual is not None
  kernel = f'quantize {format}' + stochastic * ' stochastic'
  tile, chunk = _cut(kernel + feedback * ' feedback', rows, size, abreast)
  seed = jnp.zeros(2, jnp.uint32) if key is None else numbers.seed(key)
  arrays = (x, residual) if feedback else (x,)
  whole = pl.BlockSpec((tile, size), lambda i: (i, 0))
  shapes = [
    result((-(-rows // abreast), words * abreast), jnp.uint32, seed, arrays),
    result((1, rows), jnp.float32, seed, arrays),
    result((rows, size), jnp.float32, seed, arrays),
  ]
  specs = [
    pl.BlockSpec((tile // abreast, words * abreast), lambda i: (i, 0)),
    pl.BlockSpec((1, tile), lambda i: (0, i)),
    whole,
  ]
  kept = 3 if feedback else 2
  packed, scale, *dropped = pl.pallas_call(
    functools.partial(
      _encode_kernel,
      format=format,
      chunk=chunk,
      stochastic=stochastic,
      feedback=feedback,
    ),
    grid=(pl.cdiv(rows, tile),),
    in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)] + len(arrays) * [whole],
    out_specs=specs[:kept],
    out_shape=shapes[:kept],
    scratch_shapes=[
      pltpu.VMEM((tile, LANES), jnp.float32),
      pltpu.VMEM((tile if abreast > 1 else SUBLANES, LANES), jnp.int32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel',), vmem_limit_bytes=2**26
    ),
    cost_estimate=cost(arrays, shapes[:kept]),
    name=f'quantize_{format}',
  )(seed[None], *arrays)
  return packed.reshape(-1, words)[:rows], scale.reshape(rows, 1), *dropped


def quantize(
  x: Float32[Array, 'rows size'], key: Key[Array, ''] | None, *, format: str
) -> tuple[UInt32[Array, 'rows words'], Float32[Array, 'rows 1']]:
  """Packed codes and the scale of each row."""
  return _encode(x, None, key, format)


def quantize_with_feedback(
  x: Float32[Array, 'rows size'],
  residual: Float32[Array, 'rows size'],
  key: Key[Array, ''] | None,
  *,
  format: str,
) -> tuple[
  UInt32[Array, 'rows words'],
  Float32[Array, 'rows 1'],
  Float32[Array, 'rows size'],
]:
  """Codes ``x + residual``, and says what that dropped."""
  return _encode(x, residual, key, format)


def _decode_kernel(
  words_ref,
  scale_ref,
  x_ref,
  columns_ref,
  repeated_ref,
  *,
  format,
  chunk,
  workers,
):
  code = FORMATS[format]
  some, _, side_by_side = words_ref.shape
  tile, size = x_ref.shape
  words = size * code.bits // 32
  abreast = _abreast(words)
  step = pl.program_id(1)

  def widen(start):
    rows = pl.ds(start, LANES)
    few = LANES // abreast
    group = lane_group((few, LANES), words)
    for n in range(some):
      columns_ref[n, rows, :] = transposed_rows(scale_ref[n, :, rows])
      if abreast > 1:
        at = pl.ds(pl.multiple_of(jax.lax.div(start, abreast), few), few)
        row = words_ref[n, at, :].astype(jnp.int32)
        turned = [pltpu.roll(row, i * words, 1) for i in range(abreast)]
        for i in range(abreast):
          one = turned[-i % abreast]
          for j in range(1, abreast):
            one = jnp.where(group == j, turned[(j - i) % abreast], one)
          repeated_ref[n, pl.ds(start + i, few, abreast), :] = one

  _for_chunks(tile, LANES, widen)

  def tops(n, rows):
    """Each column of registers with its codes moved to the top bits."""
    if abreast == 1:
      packed = words_ref[n, rows, :].astype(jnp.int32)
      for s in range(32 // code.bits):
        top = packed << (32 - code.bits - s * code.bits)
        for j in range(0, side_by_side, LANES):
          yield top[:, j : j + LANES]
    else:
      wide = abreast * code.bits  # Bits that a column takes of each word.
      later = abreast - 1 - lane_group((chunk, LANES), words)
      packed = repeated_ref[n, rows, :] << (later * code.bits)
      for j in range(size // LANES):
        yield packed << (32 - wide - j * wide)

  def decode(start):
    rows = pl.ds(start, chunk)
    total = None
    for n in range(some):
      scale = columns_ref[n, rows, :]
      decoded = [code.decode(top, scale) for top in tops(n, rows)]
      if total is None:
        total = decoded
        if some < workers:
          before = [x_ref[rows, j : j + LANES] for j in range(0, size, LANES)]
          total = [
            jnp.where(step == 0, x, b + x)
            for b, x in zip(before, total, strict=True)
          ]
      else:
        total = [a + x for a, x in zip(total, decoded, strict=True)]
    if workers > 1:
      last = step == pl.num_programs(1) - 1
      total = [jnp.where(last, x / workers, x) for x in total]
    x_ref[rows, :] = jnp.concatenate(total, axis=1)

  _for_chunks(tile, chunk, decode)


def dequantize_mean(
  words: UInt32[Array, 'n rows words'],
  scale: Float32[Array, 'n rows 1'],
  *,
  format: str,
  count: int,
) -> Float32[Array, 'rows count']:
  """The mean of what ``n`` workers coded, added up in order."""
  workers, rows, width = words.shape
  abreast = _abreast(width)
  tile, chunk = _cut(f'dequantize {format}', rows, count, abreast)
  some = max(n for n in range(1, SOME + 1) if workers % n == 0)
  packed = jnp.pad(words, ((0, 0), (0, -rows % abreast), (0, 0)))
  packed = packed.reshape(workers, -1, width * abreast)
  mean = result((rows, count), jnp.float32, words, scale)
  return pl.pallas_call(
    functools.partial(
      _decode_kernel, format=format, chunk=chunk, workers=workers
    ),
    grid=(pl.cdiv(rows, tile), workers // some),
    in_specs=[
      pl.BlockSpec(
        (some, tile // abreast, width * abreast), lambda i, n: (n, i, 0)
      ),
      pl.BlockSpec((some, 1, tile), lambda i, n: (n, 0, i)),
    ],
    out_specs=pl.BlockSpec((tile, count), lambda i, n: (i, 0)),
    out_shape=mean,
    scratch_shapes=[
      pltpu.VMEM((some, tile, LANES), jnp.float32),
      pltpu.VMEM((some, tile if abreast > 1 else SUBLANES, LANES), jnp.int32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=2**26
    ),
    cost_estimate=cost((packed, scale), mean),
    name=f'dequantize_{format}',
  )(packed, scale.reshape(workers, 1, rows))


def dequantize(
  words: UInt32[Array, 'rows words'],
  scale: Float32[Array, 'rows 1'],
  *,
  format: str,
  count: int,
) -> Float32[Array, 'rows count']:
  """The numbers that the codes stand for."""
  return dequantize_mean(words[None], scale[None], format=format, count=count)
