"""The definition of packing.

Numbers of width ``bits`` fill whole words in groups of ``slots = 32 /
gcd(bits, 32)`` numbers. The first ``lanes`` whole groups of a row are
interleaved: slot ``s`` of all groups lies in the contiguous columns ``s *
lanes .. (s + 1) * lanes``, and so does each word of the groups. All shifts are
then between contiguous vectors, which every backend does at full width. What
remains of a row, less than one group, follows in order.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array, UInt32

TRITS = 20  # 3**20 < 2**32


def _pack_slots(codes: UInt32[Array, 'rows slots lanes'], bits: int):
  _, slots, _ = codes.shape
  if slots * bits == 32:
    shifts = jnp.arange(slots, dtype=jnp.uint32)[:, None] * bits
    return jnp.sum(codes << shifts, axis=1, dtype=jnp.uint32)
  words = []
  for start in range(0, slots * bits, 32):
    word = 0
    for slot in range(start // bits, min(slots, -(-(start + 32) // bits))):
      shift = slot * bits - start
      code = codes[:, slot]
      word |= code << shift if shift >= 0 else code >> -shift
    words.append(word)
  return jnp.concatenate(words, axis=1)


def _unpack_slots(words: UInt32[Array, 'rows n lanes'], bits: int, slots: int):
  rows, _, lanes = words.shape
  mask = jnp.uint32(2**bits - 1)
  if 32 % bits == 0:
    shifts = jnp.arange(slots, dtype=jnp.uint32)[:, None] * bits
    return ((words[:, :1] >> shifts) & mask).reshape(rows, slots * lanes)
  codes = []
  for slot in range(slots):
    word, shift = divmod(slot * bits, 32)
    code = words[:, word] >> shift
    if shift + bits > 32:
      code |= words[:, word + 1] << (32 - shift)
    codes.append(code & mask)
  return jnp.concatenate(codes, axis=1)


def _groups(bits: int, count: int) -> tuple[int, int, int]:
  """How many slots a group has, how many whole groups, and what remains."""
  slots = 32 // math.gcd(bits, 32)
  return slots, *divmod(count, slots)


def pack(
  codes: UInt32[Array, 'rows count'], *, bits: int
) -> UInt32[Array, 'rows words']:
  """Packs numbers below ``2**bits``."""
  rows, count = codes.shape
  if bits == 32:
    return codes
  slots, lanes, rest = _groups(bits, count)
  whole = count - rest
  parts = []
  if whole:
    grouped = codes[:, :whole].reshape(rows, slots, lanes)
    parts.append(_pack_slots(grouped, bits))
  if rest:
    parts.append(_pack_slots(codes[:, whole:, None], bits))
  return jnp.concatenate(parts, axis=1) if parts else codes


def unpack(
  words: UInt32[Array, 'rows words'], *, bits: int, count: int
) -> UInt32[Array, 'rows count']:
  """The inverse of :func:`pack`."""
  rows, _ = words.shape
  if bits == 32:
    return words
  slots, lanes, rest = _groups(bits, count)
  whole = (count - rest) * bits // 32
  parts = []
  if whole:
    grouped = words[:, :whole].reshape(rows, -1, lanes)
    parts.append(_unpack_slots(grouped, bits, slots))
  if rest:
    parts.append(_unpack_slots(words[:, whole:, None], bits, rest))
  return jnp.concatenate(parts, axis=1) if parts else words


def pack_trits(
  trits: UInt32[Array, 'rows count'],
) -> UInt32[Array, 'rows words']:
  """Packs numbers below 3, twenty a word; lanes as in :func:`pack`."""
  rows, count = trits.shape
  trits = jnp.pad(trits, ((0, 0), (0, -count % TRITS)))
  grouped = trits.reshape(rows, TRITS, -1)
  powers = jnp.uint32(3) ** jnp.arange(TRITS, dtype=jnp.uint32)[:, None]
  return jnp.sum(grouped * powers, axis=1, dtype=jnp.uint32)


def unpack_trits(
  words: UInt32[Array, 'rows words'], *, count: int
) -> UInt32[Array, 'rows count']:
  """The inverse of :func:`pack_trits`."""
  trits = [words // 3**slot % 3 for slot in range(TRITS)]
  return jnp.concatenate(trits, axis=1)[:, :count]
