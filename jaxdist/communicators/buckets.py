"""Leaves as a few block matrices of bounded size, each number exactly once.

Many small collectives cost far more than a large one, so the leaves are laid
end to end and cut into buckets, without regard for where a leaf ends.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Slice(NamedTuple):
  """Numbers ``start`` to ``stop`` of the flattened leaf number ``leaf``."""

  leaf: int
  start: int
  stop: int


def plan(sizes: Sequence[int], bucket_size: int) -> list[list[Slice]]:
  """Cuts leaves, laid end to end, into buckets.

  Args:
    sizes: how many numbers each leaf holds.
    bucket_size: how many numbers each bucket holds; the last may hold fewer.

  Returns:
    For each bucket the slices that it consists of, in order.

  Examples:
    >>> plan([3, 4], bucket_size=5)
    [[Slice(leaf=0, start=0, stop=3), Slice(leaf=1, start=0, stop=2)],
     [Slice(leaf=1, start=2, stop=4)]]
  """
  buckets: list[list[Slice]] = []
  room = 0
  for leaf, size in enumerate(sizes):
    start = 0
    while start < size:
      if not room:
        buckets.append([])
        room = bucket_size
      stop = min(size, start + room)
      buckets[-1].append(Slice(leaf, start, stop))
      room -= stop - start
      start = stop
  return buckets


def bucket_length(bucket: Sequence[Slice]) -> int:
  """How many numbers a bucket holds."""
  return sum(s.stop - s.start for s in bucket)


def to_blocks(
  leaves: Sequence[Float[Array, '...']],
  bucket: Sequence[Slice],
  blocks: int,
  size: int,
) -> Float[Array, 'blocks size']:
  """A bucket's numbers as a matrix of ``blocks`` rows, padded with zeros.

  Args:
    leaves: all leaves.
    bucket: the slices to take.
    blocks: number of rows.
    size: length of a row; the bucket must fit into the rows.

  Returns:
    The block matrix.
  """
  flat = jnp.concatenate(
    [leaves[s.leaf].reshape(-1)[s.start : s.stop] for s in bucket]
  )
  return jnp.pad(flat, (0, blocks * size - flat.size)).reshape(blocks, size)


def from_blocks(
  matrices: Sequence[Float[Array, '_ _']],
  buckets: Sequence[Sequence[Slice]],
  shapes: Sequence[tuple[int, ...]],
) -> list[Float[Array, '...']]:
  """The inverse of :func:`to_blocks` over all buckets.

  Args:
    matrices: a block matrix for each bucket.
    buckets: what :func:`plan` returned.
    shapes: the leaves' shapes; none may be empty.

  Returns:
    The leaves.
  """
  pieces: list[list[Array]] = [[] for _ in shapes]
  for matrix, bucket in zip(matrices, buckets, strict=True):
    flat, offset = matrix.reshape(-1), 0
    for s in bucket:
      length = s.stop - s.start
      pieces[s.leaf].append(flat[offset : offset + length])
      offset += length
  return [
    jnp.concatenate(parts).reshape(shape)
    for parts, shape in zip(pieces, shapes, strict=True)
  ]
