"""Trees of arrays as bytes, for what leaves the machine as file or message.

A message is four magic bytes, a version and the length of the header; the
header, which describes the tree and every leaf; the leaves' bytes; and a digest
of all before it. Memory is little-endian. Nothing in a message is ever executed
or imported.
"""

import math
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist import entropy
from jaxdist.digest import DIGEST_BYTES, as_bytes, digest
from jaxdist.keys import is_key, key_impl
from jaxdist.outline import Reader, Writer, difference, outline_of
from jaxdist.resize import placed

_MAGIC = b'\x93jdp'
_VERSION = 1
_PREFIX = len(_MAGIC) + 1 + 4  # With the version and the header's length.
_MAX_NDIM = 32
# A type's number in a message is its place here: only ever append.
_DTYPES = [
  jnp.dtype(name)
  for name in (
    *('bool', 'int8', 'int16', 'int32', 'int64'),
    *('uint8', 'uint16', 'uint32', 'uint64'),
    *('float16', 'bfloat16', 'float32', 'float64', 'complex64', 'complex128'),
    *('int2', 'int4', 'uint2', 'uint4', 'float4_e2m1fn'),
    *('float8_e3m4', 'float8_e4m3', 'float8_e4m3b11fnuz', 'float8_e4m3fn'),
    *('float8_e4m3fnuz', 'float8_e5m2', 'float8_e5m2fnuz', 'float8_e8m0fnu'),
  )
]
# Not every byte is a number of these.
_NARROW = ('bool', 'int2', 'int4', 'uint2', 'uint4', 'float4_e2m1fn')
_CHECKED_AT_ONCE = 2**16  # They are widened to be checked.


class UnpackError(ValueError):
  """Bytes are damaged, cut off, or never were of :func:`jaxdist.pack`."""


class _Spec(NamedTuple):
  """What a leaf is, beside its numbers.

  Attributes:
    kind: ``'array'``, ``'number'`` of Python, or ``'key'``.
    dtype: of the numbers, of a key's words.
    shape: likewise.
    impl: the implementation of keys.
  """

  kind: str
  dtype: np.dtype
  shape: tuple[int, ...]
  impl: str = ''

  def __str__(self) -> str:
    words = f'{self.impl} {self.kind}'.strip()
    return f'{words} of {self.dtype} {self.shape}'


_KINDS = ('array', 'number', 'key')


def pack(tree: Any, *, compress: bool = True) -> bytes:
  """Writes a tree of arrays as bytes that describe and check themselves.

  For what one process gives to another, or to a file: changes of parameters,
  payloads of a compressor. The numbers come back bit for bit, NaNs too. What
  Huffman codes or repetitions make smaller is written so (DEFLATE, the bytes of
  a number apart where that is better); random bytes, such as those of float32
  mantissas, are written as they are. A SHA-256, cut to 16 bytes, tells damage.
  It does not tell malice: anyone can write bytes with a right one.

  Args:
    tree: of dicts with str or int keys, lists, tuples and None, or of any nodes
      that JAX knows; for those :func:`unpack` needs ``like``. Leaves are JAX
      arrays that this process holds whole, typed PRNG keys, NumPy arrays and
      Python numbers.
    compress: whether to look for fewer bytes. Without it, packing is a copy and
      the digest.

  Returns:
    The bytes: those of the leaves or fewer, about ten for each leaf and five
    for each node, and 25.

  Raises:
    ValueError: if a leaf is none of these or was donated, a key of a dict is
      neither, or the tree is more than 64 nodes deep. Names it.

  Examples:
    >>> import jaxdist as jd
    >>> data = jd.pack({'change': jnp.zeros(1000), 'round': 7})
    >>> len(data)
    86
    >>> jd.unpack(data)['round']
    7
  """
  if sys.byteorder != 'little':
    raise NotImplementedError('pack and unpack need a little-endian machine.')
  header = Writer()
  header.outline(outline_of(tree))
  body = []
  for path, leaf in jax.tree.leaves_with_path(tree):
    name = jax.tree_util.keystr(path) or 'the tree'
    spec = _spec(name, leaf)
    header.byte(_KINDS.index(spec.kind))
    header.byte(_DTYPES.index(spec.dtype))
    header.numbers(spec.shape)
    header.text(spec.impl)
    if 0 in spec.shape:
      continue
    x = _numbers(name, leaf)
    stored = [entropy.Plane(entropy.STORED, as_bytes(x))]
    planes = entropy.encode(x) if compress else stored
    header.byte(len(planes))
    for plane in planes:
      header.byte(plane.method)
      header.number(len(plane.data))
      body.append(plane.data)
  start = _MAGIC + bytes([_VERSION]) + len(header.data).to_bytes(4, 'little')
  parts = [start, header.data, *body]
  return b''.join([*parts, digest(*parts)])


def unpack(data: bytes | bytearray | memoryview, like: Any = None) -> Any:
  """Reads what :func:`pack` wrote, or says that it is not that.

  Declared sizes are checked against the bytes that are there before memory is
  allocated: arrays are at most 1032 times ``len(data)``, the best that DEFLATE
  can do, or of the size of ``like``. The tree takes a few hundred bytes a node.

  Args:
    data: the bytes.
    like: a tree of arrays or ``jax.ShapeDtypeStruct`` that says what must be in
      it, and as what to return it: JAX arrays, placed as these are, NumPy
      arrays, or Python numbers. Without it, arrays come as NumPy arrays of
      their own, keys as JAX arrays, and a tree with other nodes than dicts,
      lists, tuples and None is refused. Give it wherever the bytes may be of
      another kind than expected.

  Returns:
    The tree.

  Raises:
    UnpackError: if the bytes are damaged, cut off, longer, of another version
      or never were such a message. A :class:`ValueError`.
    ValueError: if the tree is not as ``like``; names the leaf or node.

  Examples:
    >>> import jaxdist as jd
    >>> data = jd.pack([jnp.arange(3.0)])
    >>> jd.unpack(data, like=[jax.ShapeDtypeStruct((3,), jnp.float32)])
    [Array([0., 1., 2.], dtype=float32)]
    >>> jd.unpack(data[:-1])
    Traceback (most recent call last):
      ...
    jaxdist.pack.UnpackError: data is damaged: its digest is another.
  """
  outline, specs, planes = _read_message(memoryview(data).cast('B'))
  if like is not None:
    _check_like(outline, specs, like)
  elif other := outline.first_other():
    raise ValueError(f'data holds a {other}: give `like`.')
  values = list(map(_read_leaf, outline.leaf_paths(), specs, planes))
  if like is None:
    return outline.build(iter(values))
  leaves, structure = jax.tree.flatten(like)
  return jax.tree.unflatten(structure, map(_as_like, values, leaves))


def _spec(name, leaf):
  """What a leaf is; it may be abstract."""
  if is_key(leaf):
    words = jax.eval_shape(jax.random.key_data, leaf)
    return _Spec('key', jnp.dtype(words.dtype), words.shape, key_impl(leaf))
  if isinstance(leaf, bool | int | float | complex):
    kind, dtype, shape = 'number', np.asarray(leaf).dtype, ()
  else:
    kind, dtype = 'array', getattr(leaf, 'dtype', None)
    shape = getattr(leaf, 'shape', None)
  if dtype is None:
    what = type(leaf).__name__
    raise ValueError(f'{name} must be an array or a number, got {what}.')
  dtype = np.dtype(dtype).newbyteorder('=')
  if dtype not in _DTYPES:
    raise ValueError(f'{name} must be an array of numbers, got one of {dtype}.')
  return _Spec(kind, dtype, tuple(shape))


def _numbers(name, leaf):
  """A leaf's numbers as a NumPy array in native byte order."""
  if isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct):
    raise ValueError(f'{name} has no numbers: call pack outside jit.')
  if isinstance(leaf, jax.Array):
    if leaf.is_deleted():
      raise ValueError(f'{name} was deleted: it was donated to a function.')
    if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
      raise ValueError(f'{name} must be on this process, got {leaf.sharding}.')
    if is_key(leaf):
      leaf = jax.random.key_data(leaf)
  x = np.asarray(leaf)
  return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder('='))


def _read_message(data):
  """The outline, the leaves' specs and their planes."""
  if len(data) < _PREFIX + DIGEST_BYTES or data[: len(_MAGIC)] != _MAGIC:
    raise UnpackError('data was not written by jaxdist.pack, or is cut off.')
  if data[len(_MAGIC)] != _VERSION:
    raise UnpackError(
      f'data has version {data[len(_MAGIC)]}; this version of jaxdist reads '
      f'version {_VERSION}.'
    )
  if digest(data[:-DIGEST_BYTES]) != data[-DIGEST_BYTES:]:
    raise UnpackError('data is damaged: its digest is another.')
  start = _PREFIX + int.from_bytes(data[_PREFIX - 4 : _PREFIX], 'little')
  body = data[start:-DIGEST_BYTES]
  try:
    reader = Reader(data[_PREFIX : min(start, len(data) - DIGEST_BYTES)])
    outline = reader.outline()
    specs, planes = [], []
    for _ in outline.leaf_paths():
      spec, lengths = _read_header(reader)
      specs.append(spec)
      planes.append([])
      for method, length in lengths:
        if length > len(body):
          raise ValueError('data ends before its leaves.')
        planes[-1].append(entropy.Plane(method, body[:length]))
        body = body[length:]
    reader.end()
    if len(body):
      raise ValueError('data goes on behind its leaves.')
  except ValueError as error:
    raise UnpackError(f'data is no message of jaxdist.pack: {error}') from error
  return outline, specs, planes


def _read_header(reader):
  kind, dtype = reader.byte(len(_KINDS)), _DTYPES[reader.byte(len(_DTYPES))]
  spec = _Spec(_KINDS[kind], dtype, reader.numbers(_MAX_NDIM), reader.text())
  if dtype.itemsize * math.prod(max(size, 1) for size in spec.shape) >= 2**63:
    raise ValueError(f'no array has shape {spec.shape}.')
  if spec.kind == 'number' and spec.shape:
    raise ValueError(f'no number has shape {spec.shape}.')
  if 0 in spec.shape:
    return spec, []
  count = reader.byte(1 + dtype.itemsize)
  if count not in (1, dtype.itemsize):
    raise ValueError(f'{dtype} has no {count} planes.')
  return spec, [(reader.byte(256), reader.number()) for _ in range(count)]


def _read_leaf(path, spec, planes):
  size = math.prod(spec.shape)
  itemsize = spec.dtype.itemsize
  try:
    flat = entropy.decode(planes, size, itemsize) if size else np.zeros(0)
    x = flat.view(spec.dtype).reshape(spec.shape)
    if spec.dtype.name in _NARROW and not _is_valid(x):
      raise ValueError(f'not all bytes are of {spec.dtype}.')
    if spec.kind == 'key':
      return jax.random.wrap_key_data(x, impl=spec.impl)
  except (ValueError, TypeError) as error:
    name = ''.join(path) or 'data'
    raise UnpackError(f'{name} cannot be read: {error}') from error
  return x.item() if spec.kind == 'number' else x


def _is_valid(x):
  """Whether narrow numbers have no bit set beside their own."""
  flat = x.reshape(-1)
  for start in range(0, flat.size, _CHECKED_AT_ONCE):
    part = flat[start : start + _CHECKED_AT_ONCE]
    wide = part.astype(np.float32).astype(x.dtype)
    if not np.array_equal(wide.view(np.uint8), part.view(np.uint8)):
      return False
  return True


def _check_like(outline, specs, like):
  where = lambda path: path or 'the tree'
  found = difference(outline, outline_of(like))
  if found is not None:
    path, have, asked = found
    raise ValueError(f'{where(path)} is {have} in data and {asked} in `like`.')
  for path, have, leaf in zip(
    outline.leaf_paths(), specs, jax.tree.leaves(like), strict=True
  ):
    name = where(''.join(path))
    asked = _spec(name, leaf)
    if have != asked:
      raise ValueError(f'{name} is {have} in data and {asked} in `like`.')


def _as_like(value, like):
  return placed(value, like) if hasattr(like, 'dtype') else value
