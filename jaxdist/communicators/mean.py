"""The mean over workers of what each of them encodes."""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from jaxdist.communicators import base, buckets, checks, collectives
from jaxdist.communicators.delayed import delayed
from jaxdist.compressors import base as codes
from jaxdist.compressors.identity import identity
from jaxdist.state import PerWorker

Method = Literal['auto', 'psum', 'gather', 'two_shot']

# A gather needs one round where two-shot needs two; below this many bytes sent
# a round costs more than the bytes.
_SMALL_GATHER = 2**16


class MeanState(NamedTuple):
  """State of :func:`mean`.

  Attributes:
    count: exchanges so far; seeds the codes. The same on all workers.
    dropped: what encoding the reduced chunks dropped, for each bucket a block
      matrix of this worker's chunk; ``None`` where there is never a second
      encoding, or no feedback. Each worker's own.
  """

  count: Int32[Array, '']
  dropped: PerWorker


def mean(
  axis: str,
  compressor: codes.Compressor | None = None,
  method: Method = 'auto',
  delay: int = 0,
  *,
  bucket_bytes: int = 2**28,
  seed: int = 0,
) -> base.Communicator:
  r"""The mean over workers of what their trees decode to.

  .. math:: \bar x = \frac1W \sum_i D(E(x_i))

  Leaves are laid end to end, cut into buckets and blocks, encoded, and
  exchanged as packed words by one of three patterns. **On the wire**, for a
  payload of p bytes a worker, each worker sends

  ============ ================ ==============================================
  ``psum``     2 p (W-1)/W      payloads are summed on the way; linear codes
  ``gather``   p (W-1)          every worker gets all payloads and decodes them
  ``two_shot`` about 2 p (W-1)/W  each worker reduces one chunk (all_to_all) and
                                encodes its mean again (all_gather)
  ============ ================ ==============================================

  in one collective a bucket and round. With feedback, what the second encoding
  of ``two_shot`` drops is kept by the worker that encoded it and added to its
  chunk next time, as the server error of 1-bit Adam; where ``'auto'`` takes
  another pattern after a change of the number of workers, it travels with the
  next exchange. With one worker nothing is sent and nothing is lost. Bits on
  the wire need no further agreement: a non-finite number on one worker makes
  the result non-finite on all.

  Args:
    axis: name of the axis that the workers lie along.
    compressor: the code; ``None`` sends float32.
    method: the pattern. ``'auto'`` takes ``psum`` for linear codes, else
      ``gather`` where it sends no more than ``two_shot`` or is small (64 KiB),
      else ``two_shot``.
    delay: 1 gives the mean of what was handed in one step ago (zeros at first),
      so that nothing in a step waits for its transfer; one int32 all-reduce
      more tells at once of numbers that are not finite.
    bucket_bytes: float32 bytes of updates in a bucket; bounds the memory that
      encoding needs.
    seed: of the codes that draw random numbers.

  Returns:
    A :class:`Communicator`.

  Raises:
    ValueError: for a pattern that cannot be right with this code, or an option
      out of range.

  Examples:
    >>> import jaxdist as jd
    >>> communicator = jd.mean('data', jd.quantize(bits=4))
    >>> dense = jd.mean('data')
    >>> params = {'w': jnp.zeros((1024, 1024))}
    >>> dense.bytes_sent(params, 8) / communicator.bytes_sent(params, 8)
    7.93...

  References:
    Tang et al, `1-bit Adam <https://arxiv.org/abs/2102.02888>`_, 2021 (the two
    rounds and the second residual)
  """
  checks.check_axis(axis)
  checks.check_compressor(compressor)
  code = compressor if compressor is not None else identity(block_size=128)
  _check_method(method, code)
  delay = checks.integer('delay', delay, 0, 2)
  bucket_bytes = checks.integer('bucket_bytes', bucket_bytes, 1)
  seed = checks.seed(seed)
  bucket_size = None
  if code.block_size:
    bucket_size = max(1, bucket_bytes // (4 * code.block_size))
    bucket_size *= code.block_size

  def plan(shapes):
    sizes = [math.prod(s.shape) for s in shapes]
    return buckets.plan(sizes, bucket_size or max(1, sum(sizes)))

  def pattern(bucket, workers):
    """The method of a bucket, its block matrix's shape and its payload's."""
    length = buckets.bucket_length(bucket)
    size = code.block_size or length
    blocks = math.ceil(length / size)
    like = payload_shape(code, blocks, size)
    chosen = method
    if method == 'auto':
      chosen = _cheapest(code, _num_bytes(like), workers)
    if chosen == 'two_shot':
      blocks = math.ceil(blocks / workers) * workers
      like = payload_shape(code, blocks, size)
    return chosen, (blocks, size), like

  # Whether there is a second encoding for some number of workers. The state
  # then has room for what it drops at every number, so that it can be resized.
  encodes_twice = method == 'two_shot' or (
    method == 'auto' and not code.linear and code.block_size is not None
  )

  def init(shapes, feedback):
    dropped = None
    if feedback and encodes_twice:
      workers = collectives.axis_size(axis)
      patterns = [pattern(bucket, workers) for bucket in plan(shapes)]
      dropped = [
        jnp.zeros((math.ceil(blocks / workers), size), jnp.float32)
        for _, (blocks, size), _ in patterns
      ]
    dropped = PerWorker(collectives.vary(dropped, axis), 'split')
    return MeanState(jnp.zeros((), jnp.int32), dropped)

  def alone(leaves, state):
    """Takes what was dropped while there were more workers."""
    if state.dropped.value is None:
      return leaves, state
    owed = buckets.from_blocks(
      state.dropped.value, plan(leaves), [leaf.shape for leaf in leaves]
    )
    return list(map(jnp.add, leaves, owed)), init(leaves, feedback=True)

  def exchange(leaves, state):
    workers = collectives.axis_size(axis)
    base_key = jax.random.fold_in(jax.random.key(seed), state.count)
    plans = plan(leaves)
    feedback = state.dropped.value is not None
    kept = state.dropped.value if feedback else [None] * len(plans)
    results, sents, dropped = [], [], []
    for i, bucket in enumerate(plans):
      chosen, (blocks, size), like = pattern(bucket, workers)
      x = buckets.to_blocks(leaves, bucket, blocks, size)
      key = collectives.shard_key(jax.random.fold_in(base_key, i), x, axis)
      shared_key, own_key = jax.random.split(key)
      own_key = jax.random.fold_in(own_key, jax.lax.axis_index(axis))
      first_key, second_key = jax.random.split(own_key)
      shared = code.at(shared_key)

      # Rows from a state of another number of workers: each is held by one
      # worker and counts whole, so it enters the mean times their number.
      late = None
      if kept[i] is not None and chosen != 'two_shot':
        late = workers * kept[i]
        x = _add_to_chunk(x, late, axis, workers)
      payload = shared.encode(x, first_key)
      sent = shared.decode(payload)
      still_dropped = None
      if late is not None:
        # The caller's residual then keeps what the code drops of them.
        sent = _add_to_chunk(sent, -late, axis, workers)
        still_dropped = jnp.zeros_like(kept[i])
      sents.append(sent)
      if chosen == 'psum':
        result = _psum_mean(shared, payload, axis, workers)
      elif chosen == 'gather':
        words = collectives.all_gather(codes.payload_words(payload), axis)
        result = _decoded_mean(shared, words, like)
      else:
        result, still_dropped = _two_shot_mean(
          shared, payload, like, axis, workers, kept[i], second_key
        )
      results.append(result)
      dropped.append(still_dropped)
    dropped = collectives.vary(dropped, axis) if feedback else None
    shapes = [leaf.shape for leaf in leaves]
    return (
      buckets.from_blocks(results, plans, shapes),
      buckets.from_blocks(sents, plans, shapes),
      MeanState(state.count + 1, PerWorker(dropped, 'split')),
    )

  def bytes_sent(shapes, workers):
    patterns = [pattern(bucket, workers) for bucket in plan(shapes)]
    return sum(
      _bytes_sent(chosen, _num_bytes(like), workers)
      for chosen, _, like in patterns
    )

  name = f'mean({axis!r}'
  name += f', {code!r}' if compressor is not None else ''
  name += f', method={method!r})' if method != 'auto' else ')'
  communicator = base.over_leaves(
    name,
    axis,
    init,
    exchange,
    bytes_sent,
    alone,
    contraction=code.contraction,
    unbiased=code.unbiased,
  )
  return delayed(communicator) if delay else communicator


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


def _psum_mean(code, payload, axis, workers):
  total = jax.lax.psum(payload, axis)  # the wire
  return code.decode(jax.tree.map(lambda x: x / workers, total))


def _add_to_chunk(x, rows, axis, workers):
  """Adds rows to those blocks of ``x`` that this worker is to reduce."""
  room = len(rows) * workers - len(x)
  padded = jnp.pad(x, ((0, room), (0, 0)))
  start = len(rows) * jax.lax.axis_index(axis)
  chunk = jax.lax.dynamic_slice_in_dim(padded, start, len(rows))
  padded = jax.lax.dynamic_update_slice_in_dim(padded, chunk + rows, start, 0)
  return padded[: len(x)]


def _decoded_mean(code, words, like):
  """The mean of what each row of gathered words decodes to."""
  unpack = jax.vmap(lambda w: codes.payload_from_words(w, like))
  return code.decode_mean(unpack(words))


def _two_shot_mean(code, payload, like, axis, workers, kept, key):
  """Reduces one chunk on each worker, then gathers the encoded chunks."""
  words = codes.payload_words(payload)
  chunks = words.reshape(workers, -1, words.shape[1])
  chunks = collectives.all_to_all(chunks, axis)  # the wire, first round
  chunk = _decoded_mean(code, chunks, like)
  if kept is None:
    encoded = code.encode(chunk, key)
  else:
    encoded, kept = code.encode_with_feedback(chunk, kept, key)
  words = codes.payload_words(encoded)
  words = collectives.all_gather(words, axis)  # the wire, second round
  result = code.decode(
    codes.payload_from_words(words.reshape(-1, words.shape[-1]), like)
  )
  return result, kept


def _check_method(method, code):
  methods = Method.__args__
  if method not in methods:
    raise ValueError(f'method must be one of {methods}, got {method!r}.')
  if method == 'psum' and not code.linear:
    raise ValueError(
      f"method='psum' sums payloads before decoding and needs a linear code; "
      f'{code!r} is not. Use method="gather", "two_shot" or "auto".'
    )
  if method == 'two_shot' and code.block_size is None:
    raise ValueError(
      f"method='two_shot' gives each worker some of the blocks; {code!r} has "
      f'only one. Use method="gather".'
    )
