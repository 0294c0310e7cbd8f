"""Quantization on GPUs, by Mosaic: a warp a row, one pass over memory.

The codes of a word lie a fixed distance apart in their row. So a thread that
holds the numbers at one place of each of these parts makes a word by itself.
Rows of fewer words than a warp has lanes share one.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float32, Key, UInt32

from jaxdist.kernels import gpu
from jaxdist.kernels.numbers import (
  float_bits,
  from_float_bits,
  seed,
  threefry,
  to_dither,
)
from jaxdist.kernels.quantize.formats import FORMATS, Rows
from jaxdist.kernels.tpu import result


def cannot_encode(x: Any, *others: Any, format: str) -> str | None:
  """What :func:`quantize`, with feedback or without, would need instead."""
  del others
  return _unsupported(*x.shape, format)


def cannot_decode(
  words: Any, scale: Any, *, format: str, count: int
) -> str | None:
  """What :func:`dequantize` and :func:`dequantize_mean` would need instead."""
  del scale
  return _unsupported(words.shape[-2], count, format)


def _unsupported(rows, size, format):
  slots = 32 // FORMATS[format].bits
  words, rest = divmod(size, slots)
  fits = words in (4, 8, 16) or words % gpu.LANES == 0
  if rest or not fits or not 0 < size <= gpu.LARGEST_ROW:
    return (
      f'rows of 4, 8, 16 or a multiple of 32 times {slots} numbers, up to '
      f'{gpu.LARGEST_ROW}, not {size}'
    )
  return gpu.cannot_run(rows, _rows(words))


def _rows(words):
  """How many a program takes."""
  return gpu.THREADS // min(words, gpu.LANES)


def _dithers(seed_ref, first_row, shape, slots):
  """What is added to the numbers of each slot: those of the definition."""
  row = (first_row + gpu.iota(shape, 0)).astype(jnp.uint32)
  column, words = gpu.iota(shape, 1), shape[1]
  # A call draws for one column in each quarter of the row.
  calls = slots // 4
  draws = []
  for i in range(calls):
    place = (column + i * words).astype(jnp.uint32)
    draws.append(threefry((seed_ref[0], seed_ref[1]), row, place))
  dithers = []
  for slot in range(slots):
    part, i = divmod(slot, calls)
    word = draws[i][part // 2]
    dithers.append(to_dither(word >> 16 if part % 2 else word))
  return dithers


def _rows_of(parts):
  """What a format asks about rows in parts."""

  def total(function, *numbers):
    wide = _spread(numbers, parts)
    sums = [function(x, *wide) for x in parts]
    return jax.tree.map(
      lambda *x: gpu.along_rows(jnp.sum, functools.reduce(jnp.add, x)), *sums
    )

  bits = [float_bits(jnp.abs(x)) for x in parts]
  largest = gpu.along_rows(jnp.max, functools.reduce(jnp.maximum, bits))
  size = len(parts) * parts[0].shape[1]
  return Rows(size, from_float_bits(largest), total)


def _spread(numbers, parts):
  return [gpu.spread(number, parts[0].shape) for number in numbers]


def _encode(key, format, *arrays):
  rows, size = arrays[0].shape
  code = FORMATS[format]
  slots = 32 // code.bits
  words = size // slots
  some = _rows(words)
  seeds = [] if key is None else [seed(key)]

  def kernel(*refs):
    refs = list(refs)
    inputs = [refs.pop(0) for _ in arrays]
    seed_ref = refs.pop(0) if seeds else None
    words_ref, scale_ref, *dropped_ref = refs
    first_row = gpu.first_row(rows, some)
    here, shape = pl.ds(first_row, some), (some, words)
    spans = [pl.ds(slot * words, words) for slot in range(slots)]
    parts = [
      functools.reduce(jnp.add, [gpu.load(ref, here, span) for ref in inputs])
      for span in spans
    ]
    dithers = slots * [None]
    if seeds:
      dithers = _dithers(seed_ref, first_row, shape, slots)
    scale, *numbers = code.fit(_rows_of(parts), random=key is not None)
    numbers = _spread(numbers, parts)
    # Converted at once: Mosaic forgets that a choice of constants has a sign.
    codes = [
      code.code(x, dither, *numbers).astype(jnp.uint32)
      for x, dither in zip(parts, dithers, strict=True)
    ]
    packed = functools.reduce(
      jnp.bitwise_or,
      [c << (slot * code.bits) for slot, c in enumerate(codes)],
    )
    gpu.store(words_ref, here, value=packed)
    gpu.store(scale_ref, here, value=scale)
    for ref in dropped_ref:
      wide = gpu.spread(scale, shape)
      for x, c, span in zip(parts, codes, spans, strict=True):
        top = (c << (32 - code.bits)).astype(jnp.int32)
        gpu.store(ref, here, span, value=x - code.decode(top, wide))

  outputs = [
    result((rows, words), jnp.uint32, arrays),
    result((rows,), jnp.float32, arrays),
    result((rows, size), jnp.float32, arrays),
  ]
  packed, scale, *dropped = gpu.call(
    kernel,
    outputs[: 1 + len(arrays)],
    *arrays,
    *seeds,
    programs=pl.cdiv(rows, some),
  )
  return packed, scale[:, None], *dropped


def quantize(
  x: Float32[Array, 'rows size'], key: Key[Array, ''] | None, *, format: str
) -> tuple[UInt32[Array, 'rows words'], Float32[Array, 'rows 1']]:
  """Packed codes and the scale of each row."""
  return _encode(key, format, x)


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
  return _encode(key, format, x, residual)


def dequantize_mean(
  words: UInt32[Array, 'n rows words'],
  scale: Float32[Array, 'n rows 1'],
  *,
  format: str,
  count: int,
) -> Float32[Array, 'rows count']:
  """The mean of what ``n`` workers coded, added up in order."""
  workers, rows, width = words.shape
  some, code = _rows(width), FORMATS[format]
  slots = 32 // code.bits

  def kernel(words_ref, scale_ref, x_ref):
    here = pl.ds(gpu.first_row(rows, some), some)

    def decoded(n):
      packed = gpu.load(words_ref, n, here)
      wide = gpu.spread(gpu.load(scale_ref, n, here), packed.shape)
      # A code goes to the top; what is below it does not count.
      tops = [packed << (32 - end * code.bits) for end in range(1, slots + 1)]
      return [code.decode(top.astype(jnp.int32), wide) for top in tops]

    def add(n, total):
      return [t + x for t, x in zip(total, decoded(n), strict=True)]

    total = jax.lax.fori_loop(1, workers, add, decoded(0))
    for slot, x in enumerate(total):
      span = pl.ds(slot * width, width)
      gpu.store(x_ref, here, span, value=x / workers)

  (x,) = gpu.call(
    kernel,
    [result((rows, count), jnp.float32, words, scale)],
    words,
    scale[:, :, 0],
    programs=pl.cdiv(rows, some),
  )
  return x


def dequantize(
  words: UInt32[Array, 'rows words'],
  scale: Float32[Array, 'rows 1'],
  *,
  format: str,
  count: int,
) -> Float32[Array, 'rows count']:
  """The numbers that the codes stand for."""
  return dequantize_mean(words[None], scale[None], format=format, count=count)
