"""Lossless coding of arrays' bytes: fewer where they are not random."""

import zlib
from typing import NamedTuple

import numpy as np

from jaxdist.digest import as_bytes

# DEFLATE makes at most 258 bytes of two bits, and some at its ends.
_LARGEST_RATIO = 1032
_SAMPLE = 2**14  # Bytes of a plane that are tried.
_WORTH_IT = 0.97  # Of the sample's size, or it is stored as it is.
_RAW_WINDOW = -15  # DEFLATE without zlib's header and checksum.


class Method(NamedTuple):
  """How a plane of bytes is written."""

  level: int
  strategy: int


# By their numbers in a message: Huffman codes alone, or with repetitions.
_METHODS = {
  1: Method(1, zlib.Z_HUFFMAN_ONLY),
  2: Method(6, zlib.Z_DEFAULT_STRATEGY),
}
STORED = 0


class Plane(NamedTuple):
  """One byte of each number of an array.

  Attributes:
    method: ``STORED``, or how it was deflated.
    data: the bytes that are written.
  """

  method: int
  data: bytes | memoryview | np.ndarray


def encode(x: np.ndarray) -> list[Plane]:
  r"""Writes an array's bytes in fewer, if that works.

  The first, second, ... bytes of all numbers are coded apart: a float's
  exponent, or a packed word of rare codes, is far from random even where a
  mantissa is. Each plane is deflated (Huffman codes with or without references
  to repetitions, RFC 1951) as was best for a sample of it, or stored.

  Args:
    x: an array of at least one number.

  Returns:
    As many planes as a number has bytes, or one that holds the array as it is
    if nothing is gained.
  """
  flat = as_bytes(x)
  planes = [
    _encode_plane(np.ascontiguousarray(plane))
    for plane in flat.reshape(-1, x.itemsize).T
  ]
  if all(plane.method == STORED for plane in planes):
    return [Plane(STORED, flat)]
  return planes


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


def _encode_plane(plane):
  sample = _sample(plane)
  sizes = {n: len(_deflate(sample, method)) for n, method in _METHODS.items()}
  best = min(sizes, key=sizes.get)
  if sizes[best] < _WORTH_IT * len(sample):
    data = _deflate(plane, _METHODS[best])
    if len(data) < len(plane):
      return Plane(best, data)
  return Plane(STORED, plane)


def _sample(plane):
  """All of a short plane, pieces from everywhere of a long one."""
  if len(plane) <= _SAMPLE:
    return plane
  pieces = 16
  length = _SAMPLE // pieces
  starts = np.linspace(0, len(plane) - length, pieces, dtype=np.int64)
  return np.concatenate([plane[a : a + length] for a in starts])


def _deflate(data, method):
  coder = zlib.compressobj(
    method.level, zlib.DEFLATED, _RAW_WINDOW, 9, method.strategy
  )
  return coder.compress(data) + coder.flush()


def _check_size(plane, size):
  data = len(plane.data)
  if plane.method == STORED:
    if data != size:
      raise ValueError(f'{size} bytes are declared and {data} are there.')
  elif plane.method not in _METHODS:
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
