"""What a compressor is: a code for blocks of numbers, and what it promises."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt32

from jaxdist.kernels.pack import api as packing

Payload = Any  # A pytree of uint32 words and float32 numbers, blocks leading.


@dataclasses.dataclass(frozen=True)
class Packed:
  """Small unsigned integers, packed without gaps into 32-bit words.

  Attributes:
    words: the packed bits, ``(blocks, words)``, a row for each block.
    bits: width of each number in bits.
    count: how many numbers each row holds.
  """

  words: Any  # UInt32[Array, 'blocks words'], or what stands for it in a tree.
  bits: int
  count: int

  @classmethod
  def pack(cls, codes: UInt32[Array, 'blocks count'], bits: int) -> 'Packed':
    """Packs numbers below ``2**bits``."""
    return cls(packing.pack(codes, bits), bits, codes.shape[1])

  def unpack(self) -> UInt32[Array, 'blocks count']:
    """The numbers again."""
    return packing.unpack(self.words, self.bits, self.count)


jax.tree_util.register_dataclass(
  Packed, data_fields=['words'], meta_fields=['bits', 'count']
)


@dataclasses.dataclass(frozen=True)
class Compressor:
  r"""A code for the rows (blocks) of a float32 matrix.

  ``encode`` and ``decode`` are pure functions on any number of blocks of any
  length. They send nothing; a communicator sends the payload. Zero decodes to
  zero exactly, and a block with a NaN or an infinity decodes to a block with at
  least one non-finite number, so that a bad gradient is seen by all who get it.

  Attributes:
    name: how it was made, for reports: ``'quantize(bits=4)'``.
    encode: ``(x, key) -> payload``. ``key`` is this worker's own randomness;
      deterministic codes ignore it.
    decode: ``payload -> x``.
    block_size: numbers in a block, a multiple of 128; ``None`` if one block is
      to hold the whole tree.
    contraction: the largest known :math:`d` with :math:`E|x - D(E(x))|^2 \le
      (1 - d) |x|^2` for all x. Feedback needs at least 0; it is negative for
      unbiased codes whose noise can exceed the signal.
    unbiased: whether :math:`E[D(E(x))] = x`.
    linear: whether payloads may be summed before decoding.
    seeded: for codes that need randomness shared by all workers (which
      coordinates, which rotation): makes the code for one key. ``encode`` and
      ``decode`` of the code itself then raise.
    fused_feedback: :meth:`encode_with_feedback` in one pass over memory.
    fused_mean: :meth:`decode_mean` in one pass over memory.
  """

  name: str
  encode: Callable[[Float[Array, 'blocks size'], Key[Array, '']], Payload]
  decode: Callable[[Payload], Float[Array, 'blocks size']]
  block_size: int | None
  contraction: float
  unbiased: bool = False
  linear: bool = False
  seeded: Callable[[Key[Array, '']], 'Compressor'] | None = None
  fused_feedback: Callable[..., tuple[Payload, Array]] | None = None
  fused_mean: Callable[[Payload], Float[Array, 'blocks size']] | None = None

  def at(self, shared_key: Key[Array, '']) -> 'Compressor':
    """This code with its shared randomness drawn from a key that all share."""
    return self if self.seeded is None else self.seeded(shared_key)

  def encode_with_feedback(
    self,
    x: Float[Array, 'blocks size'],
    residual: Float[Array, 'blocks size'],
    key: Key[Array, ''],
  ) -> tuple[Payload, Float[Array, 'blocks size']]:
    """The payload of ``x + residual``, and what it drops of that."""
    if self.fused_feedback is not None:
      return self.fused_feedback(x, residual, key)
    target = x + residual
    payload = self.encode(target, key)
    return payload, target - self.decode(payload)

  def decode_mean(self, payloads: Payload) -> Float[Array, 'blocks size']:
    """The mean of what payloads, stacked along a first axis, decode to."""
    if self.fused_mean is not None:
      return self.fused_mean(payloads)
    first = jax.tree.map(lambda leaf: leaf[0], payloads)
    others = jax.tree.map(lambda leaf: leaf[1:], payloads)
    add = lambda total, payload: (total + self.decode(payload), None)
    total, _ = jax.lax.scan(add, self.decode(first), others)
    return total / jax.tree.leaves(payloads)[0].shape[0]

  def __repr__(self) -> str:
    return self.name


def payload_words(payload: Payload) -> UInt32[Array, 'blocks words']:
  """A payload's leaves side by side, as one array of words a block."""
  return jnp.concatenate(
    [
      jax.lax.bitcast_convert_type(x, jnp.uint32)
      for x in jax.tree.leaves(payload)
    ],
    axis=1,
  )


def payload_from_words(
  words: UInt32[Array, 'blocks words'], like: Payload
) -> Payload:
  """The inverse of :func:`payload_words`.

  Args:
    words: one row of words for each block.
    like: a payload (shapes and dtypes suffice) of the same code and block
      length, with any number of blocks.

  Returns:
    The payload of these words.
  """
  leaves, treedef = jax.tree.flatten(like)
  ends = [0]
  for leaf in leaves:
    ends.append(ends[-1] + leaf.shape[1])
  return jax.tree.unflatten(
    treedef,
    [
      jax.lax.bitcast_convert_type(words[:, a:b], leaf.dtype)
      for a, b, leaf in zip(ends, ends[1:], leaves, strict=False)
    ],
  )
