"""A mean in two parts: what each worker encodes, and the rounds that follow."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxdist.communicators import buckets, collectives
from jaxdist.compressors import base as codes
from jaxdist.state import PerWorker

Method = Literal['auto', 'psum', 'gather', 'two_shot']
Shapes = Sequence[Any]  # Arrays, or shapes and dtypes.
Rows = list[Float[Array, '_ _'] | None]  # One matrix a bucket.

# A gather needs one round where two-shot needs two; below this many bytes sent
# a round costs more than the bytes.
_SMALL_GATHER = 2**16


@dataclasses.dataclass(frozen=True)
class Rounds:
  """How leaves are cut, encoded and exchanged; see :func:`jaxdist.mean`.

  Attributes:
    axis: that the workers lie along.
    code: that they encode with.
    method: the pattern.
    bucket_bytes: float32 bytes of a bucket.
    seed: of the codes that draw random numbers.
  """

  axis: str
  code: codes.Compressor
  method: Method
  bucket_bytes: int
  seed: int

  @property
  def encodes_twice(self) -> bool:
    """Whether a chunk's mean is encoded for some number of workers.

    The state then has room for what that drops at every number, so that it can
    be resized.
    """
    return self.method == 'two_shot' or (
      self.method == 'auto'
      and not self.code.linear
      and self.code.block_size is not None
    )

  def plan(self, shapes: Shapes) -> list[list[buckets.Slice]]:
    """Cuts leaves into buckets."""
    sizes = [math.prod(s.shape) for s in shapes]
    length = max(1, sum(sizes))
    if self.code.block_size:
      length = max(1, self.bucket_bytes // (4 * self.code.block_size))
      length *= self.code.block_size
    return buckets.plan(sizes, length)

  def pattern(self, bucket: Sequence[buckets.Slice], workers: int):
    """The method of a bucket, its block matrix's shape and its payload's."""
    length = buckets.bucket_length(bucket)
    size = self.code.block_size or length
    blocks = math.ceil(length / size)
    like = payload_shape(self.code, blocks, size)
    chosen = self.method
    if chosen == 'auto':
      chosen = _cheapest(self.code, _num_bytes(like), workers)
    if chosen == 'two_shot':
      blocks = math.ceil(blocks / workers) * workers
      like = payload_shape(self.code, blocks, size)
    return chosen, (blocks, size), like

  def new_rows(self, shapes: Shapes, feedback: bool) -> PerWorker:
    """Room for what a second encoding drops; None where there is none."""
    if not (feedback and self.encodes_twice):
      return PerWorker(None, 'split')
    workers = collectives.axis_size(self.axis)
    patterns = [self.pattern(bucket, workers) for bucket in self.plan(shapes)]
    return self.held(
      [
        jnp.zeros((math.ceil(blocks / workers), size), jnp.float32)
        for _, (blocks, size), _ in patterns
      ]
    )

  def rows(self, dropped: PerWorker, shapes: Shapes) -> Rows:
    """One matrix, or None, for each bucket."""
    return dropped.value or [None] * len(self.plan(shapes))

  def held(self, rows: Rows) -> PerWorker:
    """The inverse of :meth:`rows`."""
    if None in rows:
      rows = None
    return PerWorker(collectives.vary(rows, self.axis), 'split')

  def owed(self, dropped: Rows, shapes: Shapes) -> list[Array]:
    """All rows of a second encoding, which one worker holds, as leaves."""
    shapes_only = [s.shape for s in shapes]
    return buckets.from_blocks(dropped, self.plan(shapes), shapes_only)

  def encode(
    self, leaves: Sequence[Array], count: Int32[Array, ''], dropped: Rows
  ) -> tuple[list[Any], list[Array], Rows]:
    """Encodes a worker's leaves.

    Args:
      leaves: in float32.
      count: of the exchange; seeds the code.
      dropped: rows that this worker holds from a second encoding, or None.

    Returns:
      For each bucket what is to cross: a payload that is summed, or words; the
      leaves that it decodes to; and the rows that are still held.
    """
    workers = collectives.axis_size(self.axis)
    plan = self.plan(leaves)
    crossing, sents, held = [], [], []
    for i, (bucket, rows) in enumerate(zip(plan, dropped, strict=True)):
      chosen, (blocks, size), _ = self.pattern(bucket, workers)
      x = buckets.to_blocks(leaves, bucket, blocks, size)
      shared, key, _ = self._draws(count, i, x)
      # Rows from a state of another number of workers: each is held by one
      # worker and counts whole, so it enters the mean times their number.
      late = None
      if rows is not None and chosen != 'two_shot':
        late = workers * rows
        x = self._add_to_chunk(x, late)
        rows = jnp.zeros_like(rows)
      payload = shared.encode(x, key)
      sent = shared.decode(payload)
      if late is not None:
        # The caller's residual then keeps what the code drops of them.
        sent = self._add_to_chunk(sent, -late)
      is_summed = chosen == 'psum'
      crossing.append(payload if is_summed else codes.payload_words(payload))
      sents.append(sent)
      held.append(rows)
    shapes = [leaf.shape for leaf in leaves]
    return crossing, buckets.from_blocks(sents, plan, shapes), held

  def exchange(
    self,
    crossing: Sequence[Any],
    shapes: Shapes,
    count: Int32[Array, ''],
    dropped: Rows,
  ) -> tuple[list[Array], Rows]:
    """The mean of what all workers encoded.

    Args:
      crossing: from :meth:`encode`.
      shapes: of the leaves.
      count: as it was then.
      dropped: rows of this worker's chunk, or None.

    Returns:
      The leaves, and what this worker's second encoding dropped.
    """
    workers = collectives.axis_size(self.axis)
    plan = self.plan(shapes)
    results, held = [], []
    for i, (bucket, rows) in enumerate(zip(plan, dropped, strict=True)):
      chosen, _, like = self.pattern(bucket, workers)
      shared, _, key = self._draws(count, i, jax.tree.leaves(crossing[i])[0])
      if chosen == 'psum':
        total = jax.lax.psum(crossing[i], self.axis)  # the wire
        mean = jax.tree.map(lambda x: x / workers, total)
        result = shared.decode(mean)
      elif chosen == 'gather':
        words = collectives.all_gather(crossing[i], self.axis)  # the wire
        result = _decoded_mean(shared, words, like)
      else:
        result, rows = self._two_shot(shared, crossing[i], like, rows, key)
      results.append(result)
      held.append(rows)
    return buckets.from_blocks(results, plan, [s.shape for s in shapes]), held

  def bytes_sent(self, shapes: Shapes, workers: int) -> float:
    """Bytes that a worker sends in one exchange along a ring."""
    patterns = [self.pattern(bucket, workers) for bucket in self.plan(shapes)]
    return math.fsum(
      _bytes_sent(chosen, _num_bytes(like), workers)
      for chosen, _, like in patterns
    )

  def _draws(self, count, bucket, x):
    """The code with what all share, and keys of this worker's two encodings."""
    key = collectives.exchange_key(self.seed, count)
    key = jax.random.fold_in(key, bucket)
    key = collectives.shard_key(key, x, self.axis)
    shared_key, own_key = jax.random.split(key)
    own_key = jax.random.fold_in(own_key, jax.lax.axis_index(self.axis))
    return self.code.at(shared_key), *jax.random.split(own_key)

  def _add_to_chunk(self, x, rows):
    """Adds rows to those blocks of ``x`` that this worker is to reduce."""
    room = len(rows) * collectives.axis_size(self.axis) - len(x)
    padded = jnp.pad(x, ((0, room), (0, 0)))
    start = len(rows) * jax.lax.axis_index(self.axis)
    chunk = jax.lax.dynamic_slice_in_dim(padded, start, len(rows))
    padded = jax.lax.dynamic_update_slice_in_dim(padded, chunk + rows, start, 0)
    return padded[: len(x)]

  def _two_shot(self, code, words, like, rows, key):
    """Reduces one chunk on each worker, then gathers the encoded chunks."""
    workers = collectives.axis_size(self.axis)
    chunks = words.reshape(workers, -1, words.shape[1])
    chunks = collectives.all_to_all(chunks, self.axis)  # the wire, first round
    chunk = _decoded_mean(code, chunks, like)
    if rows is None:
      encoded = code.encode(chunk, key)
    else:
      encoded, rows = code.encode_with_feedback(chunk, rows, key)
    words = codes.payload_words(encoded)
    words = collectives.all_gather(words, self.axis)  # the wire, second round
    words = words.reshape(-1, words.shape[-1])
    return code.decode(codes.payload_from_words(words, like)), rows


@functools.lru_cache(maxsize=1024)
def payload_shape(code: codes.Compressor, blocks: int, size: int) -> Any:
  """Shapes and dtypes of the payload of ``blocks`` blocks of ``size``."""
  encode = lambda x, key: code.at(key).encode(x, key)
  return jax.eval_shape(
    encode,
    jax.ShapeDtypeStruct((blocks, size), jnp.float32),
    jax.eval_shape(lambda: jax.random.key(0)),
  )


def _num_bytes(payload):
  return sum(
    math.prod(leaf.shape) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(payload)
  )


def _bytes_sent(method, payload_bytes, workers):
  if method == 'gather':
    return payload_bytes * (workers - 1)
  return 2 * payload_bytes * (workers - 1) / workers


def _cheapest(code, payload_bytes, workers):
  if code.linear:
    return 'psum'
  gather = _bytes_sent('gather', payload_bytes, workers)
  two_shot = _bytes_sent('two_shot', payload_bytes, workers)
  if code.block_size is None or gather <= max(two_shot, _SMALL_GATHER):
    return 'gather'
  return 'two_shot'


def _decoded_mean(code, words, like):
  """The mean of what each row of gathered words decodes to."""
  unpack = jax.vmap(lambda w: codes.payload_from_words(w, like))
  return code.decode_mean(unpack(words))
