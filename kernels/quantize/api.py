"""Quantizes rows, packed, and back; with feedback, and the mean of many."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Key, UInt32

from jaxdist.kernels.checks import check_rows, check_shape
from jaxdist.kernels.dispatch import Form, Op
from jaxdist.kernels.pack.api import num_words
from jaxdist.kernels.quantize import gpu, reference, tpu
from jaxdist.kernels.quantize.formats import FORMATS


def _op(name, cannot, *static):
  def form(module, platform):
    # Traced once for each shape: kernels are long. Those for GPUs have not run
    # on one.
    kernel = jax.jit(getattr(module, name), static_argnames=static)
    unsupported, ran = getattr(module, cannot), module is not gpu
    return Form(kernel, (platform,), unsupported, automatic=ran)

  return Op(
    name,
    {
      'xla': Form(getattr(reference, name)),
      'tpu': form(tpu, 'tpu'),
      'gpu': form(gpu, 'cuda'),
    },
  )


def _encoding(name):
  return _op(name, 'cannot_encode', 'format')


def _decoding(name):
  return _op(name, 'cannot_decode', 'format', 'count')


_quantize = _encoding('quantize')
_dequantize = _decoding('dequantize')
_with_feedback = _encoding('quantize_with_feedback')
_mean = _decoding('dequantize_mean')


def quantize(
  x: Float32[Array, 'rows size'],
  format: str,
  *,
  key: Key[Array, ''] | None = None,
  implementation: str | None = None,
) -> tuple[UInt32[Array, 'rows words'], Float32[Array, 'rows 1']]:
  """Rounds each row to a grid of its own.

  ============ =================================================== =========
  format       grid, times the row's scale                         scale
  ============ =================================================== =========
  int8, int4   -q..q, where q is 127 or 7                          max / q
  int2         -3, -1, 1, 3                                        fitted
  sign         -1, 1                                               mean
  e3m0         0 and powers of two from 1/64 to 1, of both signs   max
  e2m1         0, 1/2, 1, 3/2, 2, 3, 4, 6, of both signs           max / 6
  e4m3         8-bit floats up to 448                              max / 448
  ============ =================================================== =========

  Args:
    x: rows of numbers.
    format: one of the above.
    key: rounds up or down at random, without bias to within 2**-17 of a step;
      for ``int8``, ``int4`` and ``int2``, whose scale then is max / 3. ``None``
      rounds to nearest.
    implementation: see :class:`jaxdist.kernels.dispatch.Op`. ``'gpu'`` has
      not run on a GPU yet, so that only its name picks it.

  Returns:
    Packed codes and the scales. A row with a NaN or an infinity has a scale
    that is not finite.

  Examples:
    >>> words, scale = quantize(jnp.array([[7., -2.2, 0., 3.4]]), 'int4')
    >>> dequantize(words, scale, 'int4', 4)
    Array([[ 7., -2.,  0.,  3.]], dtype=float32)
  """
  check_rows('x', x, jnp.float32)
  _check_format(format, key)
  return _quantize(x, key, format=format, implementation=implementation)


def dequantize(
  words: UInt32[Array, 'rows words'],
  scale: Float32[Array, 'rows 1'],
  format: str,
  count: int,
  *,
  implementation: str | None = None,
) -> Float32[Array, 'rows count']:
  """The numbers that :func:`quantize` rounded to.

  Args:
    words: packed codes.
    scale: of each row.
    format: as given to :func:`quantize`.
    count: numbers in a row.
    implementation: see :class:`jaxdist.kernels.dispatch.Op`.

  Returns:
    The rows.
  """
  _check_format(format)
  check_rows('words', words, jnp.uint32)
  check_rows('scale', scale, jnp.float32)
  _check_payload(words, scale, format, count, words.shape[:1])
  return _dequantize(
    words, scale, format=format, count=count, implementation=implementation
  )


def quantize_with_feedback(
  x: Float32[Array, 'rows size'],
  residual: Float32[Array, 'rows size'],
  format: str,
  *,
  key: Key[Array, ''] | None = None,
  implementation: str | None = None,
) -> tuple[
  UInt32[Array, 'rows words'],
  Float32[Array, 'rows 1'],
  Float32[Array, 'rows size'],
]:
  """Codes what is new and what was dropped before, in one pass over memory.

  Args:
    x: rows of numbers.
    residual: what was dropped of the rows before.
    format: see :func:`quantize`.
    key: see :func:`quantize`.
    implementation: see :class:`jaxdist.kernels.dispatch.Op`.

  Returns:
    Packed codes and scales of ``x + residual``, and what they drop of it.

  Examples:
    >>> x = jnp.array([[7., -2.25, 0., 3.5]])
    >>> quantize_with_feedback(x, jnp.zeros((1, 4)), 'int4')[2]
    Array([[ 0.  , -0.25,  0.  , -0.5 ]], dtype=float32)
  """
  check_rows('x', x, jnp.float32)
  check_rows('residual', residual, jnp.float32)
  check_shape('residual', residual, x.shape)
  _check_format(format, key)
  return _with_feedback(
    x, residual, key, format=format, implementation=implementation
  )


def dequantize_mean(
  words: UInt32[Array, 'n rows words'],
  scale: Float32[Array, 'n rows 1'],
  format: str,
  count: int,
  *,
  implementation: str | None = None,
) -> Float32[Array, 'rows count']:
  """The mean of what ``n`` workers coded, in one pass over memory.

  Args:
    words: packed codes of each worker.
    scale: of each worker's rows.
    format: as given to :func:`quantize`.
    count: numbers in a row.
    implementation: see :class:`jaxdist.kernels.dispatch.Op`.

  Returns:
    The mean; float32 sums, in the workers' order. Forms may differ by a
    rounding of each sum, where a product and a sum are rounded as one.
  """
  _check_format(format)
  check_rows('words', words, jnp.uint32, ndim=3)
  check_rows('scale', scale, jnp.float32, ndim=3)
  _check_payload(words, scale, format, count, words.shape[:2])
  return _mean(
    words, scale, format=format, count=count, implementation=implementation
  )


def _check_format(format, key=None):
  if format not in FORMATS:
    raise ValueError(f'format must be one of {list(FORMATS)}, got {format!r}.')
  if key is not None and not FORMATS[format].stochastic:
    able = [name for name, code in FORMATS.items() if code.stochastic]
    raise ValueError(
      f'key must be None for format {format!r}; only {able} round at random.'
    )


def _check_payload(words, scale, format, count, lead):
  check_shape('words', words, (*lead, num_words(count, FORMATS[format].bits)))
  check_shape('scale', scale, (*lead, 1))
