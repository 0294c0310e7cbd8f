"""Quantization on GPUs, by Mosaic: a warp a row, one pass over memory.

The codes of a word lie a fixed distance apart in their row. So a thread that
holds the numbers at one place of each of these parts makes a word by itself.
Rows of fewer words than a warp has lanes share one; four warps take a long row,
and keep it in shared memory where their registers are too few.
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

# All warps of a program take a longer row, if its words are enough for them.
SMALL_ROW = 2048
LARGEST_ROW = gpu.WARPS * gpu.LARGEST_ROW


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
  if size > gpu.LARGEST_ROW:
    fits = words % gpu.THREADS == 0
  if rest or not fits or not 0 < size <= LARGEST_ROW:
    return (
      f'rows of 4, 8, 16 or a multiple of 32 times {slots} numbers, or above '
      f'{gpu.LARGEST_ROW} of 128 times {slots}, up to {LARGEST_ROW}, not {size}'
    )
  return gpu.cannot_run(rows, _rows(words, slots))


def _rows(words, slots):
  """How many a program takes: one, or one or several for each warp."""
  if words * slots > SMALL_ROW and words % gpu.THREADS == 0:
    return 1
  return gpu.THREADS // min(words, gpu.LANES)


def _dithers(seed_ref, first_row, shape, slots):
  """What is added to the numbers of each slot: those of the definition."""
  *of_rows, words = shape
  row = gpu.spread(first_row, shape)
  if of_rows:
    row += gpu.iota(shape, 0)
  row, column = row.astype(jnp.uint32), gpu.iota(shape, len(of_rows))
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


def _encode(key, format, *arrays):
  rows, size = arrays[0].shape
  code = FORMATS[format]
  slots = 32 // code.bits
  words = size // slots
  some = _rows(words, slots)
  long = size > gpu.LARGEST_ROW  # Shared memory holds it, not registers.
  seeds = [] if key is None else [seed(key)]
  shape = (words,) if some == 1 else (some, words)
  spans = [pl.ds(slot * words, words) for slot in range(slots)]
  spread = lambda numbers: [gpu.spread(number, shape) for number in numbers]

  def kernel(*refs):
    refs = list(refs)
    inputs = [refs.pop(0) for _ in arrays]
    seed_ref = refs.pop(0) if seeds else None
    words_ref, scale_ref = refs.pop(0), refs.pop(0)
    dropped_ref = [refs.pop(0) for _ in arrays[1:]]
    first_row, here = gpu.first_row(rows, some), gpu.at_rows(rows, some)

    loaded = [
      functools.reduce(jnp.add, [gpu.load(ref, here, span) for ref in inputs])
      for span in spans
    ]
    parts = lambda: loaded
    if refs:
      (held_ref,) = refs
      for x, span in zip(loaded, spans, strict=True):
        gpu.store(held_ref, span, value=x)
      # Read after the maximum, at which all warps have waited for each other.
      parts = lambda: [gpu.load(held_ref, span) for span in spans]

    def total(function, *numbers):
      sums = [function(x, *spread(numbers)) for x in parts()]
      return jax.tree.map(
        lambda *x: gpu.along_rows(jnp.sum, functools.reduce(jnp.add, x)), *sums
      )

    bits = [float_bits(jnp.abs(x)) for x in loaded]
    largest = gpu.along_rows(jnp.max, functools.reduce(jnp.maximum, bits))
    asked = Rows(size, from_float_bits(largest), total)
    scale, *numbers = code.fit(asked, random=key is not None)
    wide, *numbers = spread((scale, *numbers))
    dithers = slots * [None]
    if seeds:
      dithers = _dithers(seed_ref, first_row, shape, slots)
    packed = gpu.filled(shape, 0, jnp.uint32)
    for slot, (x, dither) in enumerate(zip(parts(), dithers, strict=True)):
      # Converted at once: Mosaic forgets that a choice of constants has a sign.
      codes = code.code(x, dither, *numbers).astype(jnp.uint32)
      packed |= codes << (slot * code.bits)
      for ref in dropped_ref:
        top = (codes << (32 - code.bits)).astype(jnp.int32)
        value = x - code.decode(top, wide)
        gpu.store(ref, here, spans[slot], value=value)
    gpu.store(words_ref, here, value=packed)
    gpu.store(scale_ref, here, value=scale)

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
    scratch=[gpu.shared((size,), jnp.float32)] if long else [],
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
  code = FORMATS[format]
  slots = 32 // code.bits
  some = _rows(width, slots)

  def kernel(words_ref, scale_ref, x_ref):
    here = gpu.at_rows(rows, some)

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
