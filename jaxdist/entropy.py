"""Lossless coding of arrays' bytes: fewer where they are not random."""

import zlib
from typing import NamedTuple

import numpy as np

from jaxdist.digest import as_bytes

# DEFLATE makes at most 258 bytes of two bits, and some at its ends.
_LARGEST_RATIO = 1032
_SAMPLE = 2**14  # Numbers that are tried.
_WORTH_IT = 0.97  # Of the size, or what is simpler is done.
_SMALL = 2**15  # Bytes.
_RAW_WINDOW = -15  # DEFLATE without zlib's header and checksum.


# By their numbers in a message: Huffman codes alone, or with repetitions.
_STRATEGIES = {1: zlib.Z_HUFFMAN_ONLY, 2: zlib.Z_DEFAULT_STRATEGY}
STORED = 0


class Plane(NamedTuple):
  """One byte of each number of an array, or all of them.

  Attributes:
    method: ``STORED``, or how it was deflated.
    data: the bytes that are written.
  """

  method: int
  data: bytes | memoryview | np.ndarray


def encode(x: np.ndarray) -> list[Plane]:
  r"""Writes an array's bytes in fewer, if that works.

  They are deflated (RFC 1951: Huffman codes, with or without references to what
  was there before), as is best for a sample: either in their order, or the
  first, second, ... bytes of all numbers apart, since a float's exponent is far
  from random even where its mantissa is.

  Args:
    x: an array of at least one number.

  Returns:
    As many planes as a number has bytes, or one with all bytes in their order;
    none is longer than what it stands for.
  """
  rows = as_bytes(x).reshape(-1, x.itemsize)
  sample = _sample(rows)
  apart = [_best(column) for column in sample.T]
  together = _best(sample)
  if sum(size for _, size in apart) < together[1]:
    return [
      _write(column, method)
      for column, (method, _) in zip(rows.T, apart, strict=True)
    ]
  return [_write(rows, together[0])]


def decode(planes: list[Plane], size: int, itemsize: int) -> np.ndarray:
  """The inverse of :func:`encode`.

  Args:
    planes: from a message, so maybe wrong.
    size: numbers in the array.
    itemsize: bytes of each.

  Returns:
    A new flat array of ``size * itemsize`` bytes.

  Raises:
    ValueError: if the planes do not hold exactly that, found before any memory
      is allocated that they cannot fill.
  """
  if len(planes) == 1:
    return _decode_plane(planes[0], size * itemsize).copy()
  for plane in planes:
    _check_size(plane, size)
  flat = np.empty((size, itemsize), np.uint8)
  for column, plane in enumerate(planes):
    flat[:, column] = _decode_plane(plane, size)
  return flat.reshape(-1)


def _sample(rows):
  """All of a few rows, pieces from everywhere of many."""
  if len(rows) <= _SAMPLE:
    return rows
  pieces = 16
  length = _SAMPLE // pieces
  starts = np.linspace(0, len(rows) - length, pieces, dtype=np.int64)
  return np.concatenate([rows[a : a + length] for a in starts])


def _best(data):
  """The method that suits some bytes, and in how many it writes them."""
  data = as_bytes(data)
  sizes = {method: len(_deflate(data, method)) for method in _STRATEGIES}
  # Huffman codes alone are written several times faster.
  best = 1 if _WORTH_IT * sizes[1] < sizes[2] else 2
  if sizes[best] < _WORTH_IT * len(data):
    return best, sizes[best]
  return STORED, len(data)


def _write(data, method):
  data = as_bytes(data)
  if method != STORED:
    deflated = _deflate(data, method)
    if len(deflated) < len(data):
      return Plane(method, deflated)
  return Plane(STORED, data)


def _deflate(data, method):
  # The best search for repetitions takes eight times as long as the usual one.
  level = 9 if len(data) < _SMALL else 6
  coder = zlib.compressobj(
    level, zlib.DEFLATED, _RAW_WINDOW, 9, _STRATEGIES[method]
  )
  return coder.compress(data) + coder.flush()


def _check_size(plane, size):
  data = len(plane.data)
  if plane.method == STORED:
    if data != size:
      raise ValueError(f'{size} bytes are declared and {data} are there.')
  elif plane.method not in _STRATEGIES:
    raise ValueError(f'there is no way {plane.method} to code bytes.')
  elif size > _LARGEST_RATIO * data:
    raise ValueError(f'{data} bytes cannot hold the declared {size}.')


def _decode_plane(plane, size):
  _check_size(plane, size)
  if plane.method == STORED:
    return np.frombuffer(plane.data, np.uint8)
  decoder = zlib.decompressobj(_RAW_WINDOW)
  try:
    # One byte more than there may be, to see whether there is more.
    data = decoder.decompress(plane.data, size + 1)
  except zlib.error as error:
    raise ValueError(f'bytes cannot be inflated: {error}.') from error
  if len(data) != size or not decoder.eof or decoder.unused_data:
    raise ValueError(f'bytes do not inflate to the declared {size}.')
  return np.frombuffer(data, np.uint8)
