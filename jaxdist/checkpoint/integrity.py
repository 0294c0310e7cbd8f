"""A digest for each shard of what is saved, and a look at what was read.

A leaf is cut as its sharding cuts it when it is saved: a grid of equal shards,
each of which gets a digest from a process that holds it. What is read later may
be cut in another way.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxdist.checkpoint.layout import CorruptCheckpointError
from jaxdist.digest import DIGEST_BYTES, digest
from jaxdist.resize import on_host

T = TypeVar('T')
Cell = tuple[int, ...]  # A shard's place in the grid.
_MESSAGE_BYTES = 1000


class Seal(NamedTuple):
  """How an array was cut, and the digests of its shards.

  Attributes:
    shard: the shape of each shard.
    digests: one after the other, in hexadecimal.
  """

  shard: tuple[int, ...]
  digests: str


def seal(arrays: Mapping[str, Any]) -> dict[str, Seal]:
  """Digests of all shards of some arrays.

  **On the wire:** between processes, 17 bytes for each shard, gathered.

  Args:
    arrays: by name; NumPy arrays, of which the first process's counts, and JAX
      arrays, of which other processes may hold parts. No typed PRNG keys,
      nothing empty.

  Returns:
    By name, the same on all processes.
  """
  shards = {name: _shard_shape(x) for name, x in arrays.items()}
  cells = [
    (name, cell)
    for name, x in arrays.items()
    for cell in _grid(x.shape, shards[name])
  ]
  digests = _digests(
    (name, cell, data)
    for name, x in arrays.items()
    for cell, data in _written_here(x)
  )
  if jax.process_count() > 1:
    digests = _gather(cells, digests)
  joined = dict.fromkeys(arrays, '')
  for name, cell in cells:
    joined[name] += digests[name, cell].hex()
  return {name: Seal(shards[name], joined[name]) for name in arrays}


def check(values: Mapping[str, Any], seals: Mapping[str, Seal]) -> str:
  """Compares arrays with what was saved.

  Each process looks at what it holds. Where an array is cut into smaller parts
  than it was, or across them, all of it goes to every process, one array at a
  time.

  Args:
    values: by name; NumPy arrays, whole, or JAX arrays in any sharding.
    seals: for each of these names.

  Returns:
    What is damaged, in words; empty if nothing is.
  """
  found = _digests(
    (name, cell, data)
    for name, x in values.items()
    for cell, data in _held_here(x, seals[name].shard)
  )
  bad = []
  for name, x in values.items():
    shard, digests = seals[name]
    written = bytes.fromhex(digests)
    for row, cell in enumerate(_grid(x.shape, shard)):
      expected = written[row * DIGEST_BYTES : (row + 1) * DIGEST_BYTES]
      if found.get((name, cell), expected) != expected:
        bad.append(_words(name, cell, shard, x.shape))
  more = f' and {len(bad) - 1} more' if len(bad) > 1 else ''
  return bad[0] + more if bad else ''


def together(fn: Callable[[], T]) -> T:
  """Calls a function on all processes; where one of them fails, all do.

  Args:
    fn: called without arguments.

  Returns:
    What it returns.

  Raises:
    CorruptCheckpointError: if it did on any process, with that one's words.
  """
  result, error = None, None
  try:
    result = fn()
  except CorruptCheckpointError as caught:
    error = caught
  if jax.process_count() > 1:
    words = str(error or '').encode()[:_MESSAGE_BYTES]
    padded = np.frombuffer(words.ljust(_MESSAGE_BYTES, b'\0'), np.uint8)
    all_words = multihost_utils.process_allgather(padded)  # the wire
    for rank, row in enumerate(all_words):
      words = row.tobytes().rstrip(b'\0').decode(errors='replace')
      if words and error is None:
        error = CorruptCheckpointError(f'process {rank} found: {words}')
  if error is not None:
    raise error
  return result


def _shard_shape(x):
  if isinstance(x, jax.Array):
    return tuple(x.sharding.shard_shape(x.shape))
  return x.shape


def _grid(shape, shard) -> Iterator[Cell]:
  return np.ndindex(*(n // s for n, s in zip(shape, shard, strict=True)))


def _start(index):
  return tuple(part.start or 0 for part in index)


def _written_here(x):
  """The shards that this process writes."""
  if isinstance(x, jax.Array):
    shard = _shard_shape(x)
    for part in x.addressable_shards:
      if part.replica_id == 0:
        starts = zip(_start(part.index), shard, strict=True)
        yield tuple(start // n for start, n in starts), part.data
  elif jax.process_index() == 0:
    yield (0,) * x.ndim, x


def _held_here(x, shard):
  """What this process holds, cut into shards of a shape."""
  blocks = {}
  if isinstance(x, jax.Array):
    held = _shard_shape(x)
    if any(n % m for n, m in zip(held, shard, strict=True)):
      x = on_host(x)
    else:
      blocks = {_start(part.index): part.data for part in x.addressable_shards}
  for start, block in (blocks or {(0,) * x.ndim: x}).items():
    block = np.asarray(block)
    first = [at // n for at, n in zip(start, shard, strict=True)]
    for cell in _grid(block.shape, shard):
      part = tuple(
        slice(at * n, (at + 1) * n) for at, n in zip(cell, shard, strict=True)
      )
      yield tuple(map(sum, zip(first, cell, strict=True))), block[part]


def _digests(shards):
  """Digests by name and cell, made on all cores."""
  with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    futures = {
      (name, cell): pool.submit(digest, np.asarray(data))
      for name, cell, data in shards
    }
    return {key: future.result() for key, future in futures.items()}


def _gather(cells, digests):
  """All digests, each from the process that has it."""
  table = np.zeros((len(cells), DIGEST_BYTES + 1), np.uint8)
  for row, key in enumerate(cells):
    if key in digests:
      table[row, 0] = 1
      table[row, 1:] = np.frombuffer(digests[key], np.uint8)
  tables = multihost_utils.process_allgather(table)  # the wire
  owners = tables[:, :, 0].argmax(axis=0)
  return {
    key: tables[owner, row, 1:].tobytes()
    for row, (key, owner) in enumerate(zip(cells, owners, strict=True))
  }


def _words(name, cell, shard, shape):
  name = name or 'the state'
  if shard == shape:
    return name
  part = ', '.join(
    f'{at * n}:{(at + 1) * n}' for at, n in zip(cell, shard, strict=True)
  )
  return f'{name}[{part}]'
