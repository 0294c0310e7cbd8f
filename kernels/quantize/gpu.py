"""Quantization on GPUs, by Mosaic: a warpgroup a row, one pass over memory.

The codes of a word lie a fixed distance apart in their row. So a thread that
holds the numbers at one place of each of these parts makes a word by itself.

Lowered for CUDA and interpreted in tests; it has not run on a GPU yet.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float32, Key, UInt32

from jaxdist.kernels.numbers import TINY
from jaxdist.kernels.quantize.formats import FORMATS, rounded
from jaxdist.kernels.tpu import result

THREADS = 128  # Of a warpgroup.
INTERPRET: Any = False  # Tests put JAX's parameters here.
TAKEN = ('int8', 'int4', 'sign')


def cannot_encode(x: Any, *others: Any, format: str) -> str | None:
  """What :func:`quantize`, with feedback or without, would need instead."""
  if format not in TAKEN or others[-1] is not None:
    return f'one of the formats {TAKEN} without a key'
  words = x.shape[1] * FORMATS[format].bits // 32
  if words == 0 or words % THREADS:
    return f'rows of a multiple of {THREADS} words, not {words}'
  return None


def _codes(parts, format):
  """Codes, as of the definition, and the scale of a row in parts."""
  magnitudes = [jnp.abs(x) for x in parts]
  largest = jnp.max(functools.reduce(jnp.maximum, magnitudes))
  if format == 'sign':
    # Large numbers are added up in smaller units.
    unit = jnp.where(largest > 2.0**100, 2.0**-27, 1.0)
    total = jnp.sum(functools.reduce(jnp.add, [m * unit for m in magnitudes]))
    count = len(parts) * parts[0].size
    return [jnp.where(x < 0, 1, 0) for x in parts], total / count / unit
  q_max = 2 ** (FORMATS[format].bits - 1) - 1
  scale = jnp.maximum(largest * (1 / q_max), TINY)
  return [rounded(x * (1 / scale)) for x in parts], scale


def _encode(x, residual, format):
  # Where no kernel runs, its compiler need not be loaded.
  from jax.experimental.pallas import mosaic_gpu as plgpu

  rows, size = x.shape
  code, feedback = FORMATS[format], residual is not None
  slots = 32 // code.bits
  words = size // slots
  arrays = (x, residual) if feedback else (x,)

  def kernel(x_ref, *refs):
    row = jax.lax.axis_index('row')
    spans = [pl.ds(slot * words, words) for slot in range(slots)]
    parts = [x_ref[row, span] for span in spans]
    if feedback:
      residual_ref, words_ref, scale_ref, dropped_ref = refs
      parts = [
        x + residual_ref[row, span]
        for x, span in zip(parts, spans, strict=True)
      ]
    else:
      words_ref, scale_ref = refs
    codes, scale = _codes(parts, format)
    mask = 2**code.bits - 1
    packed = functools.reduce(
      jnp.bitwise_or,
      [(c & mask) << (slot * code.bits) for slot, c in enumerate(codes)],
    )
    words_ref[row, :] = packed.astype(jnp.uint32)
    scale_ref[row] = scale
    if feedback:
      for part, c, span in zip(parts, codes, spans, strict=True):
        if format == 'sign':
          levels = jnp.where(c == 1, -1.0, 1.0)
        else:
          levels = (c << 10 >> 10).astype(jnp.float32)  # With its sign.
        decoded = levels * scale
        dropped_ref[row, span] = part - decoded

  outputs = [
    result((rows, words), jnp.uint32, arrays),
    result((rows,), jnp.float32, arrays),
    result((rows, size), jnp.float32, arrays),
  ]
  packed, scale, *dropped = plgpu.kernel(
    kernel,
    out_type=outputs[: 2 + feedback],
    grid=(rows,),
    grid_names=('row',),
    interpret=INTERPRET,
  )(*arrays)
  return packed, scale[:, None], *dropped


def quantize(
  x: Float32[Array, 'rows size'], key: Key[Array, ''] | None, *, format: str
) -> tuple[UInt32[Array, 'rows words'], Float32[Array, 'rows 1']]:
  """Packed codes and the scale of each row."""
  del key
  return _encode(x, None, format)


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
  del key
  return _encode(x, residual, format)
