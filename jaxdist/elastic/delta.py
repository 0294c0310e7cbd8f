"""Parameters on their way to a replica, and its change on the way back."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from jaxdist.communicators import buckets
from jaxdist.communicators.base import (
  all_finite,
  exchanged_leaves,
  is_exchanged,
  where,
)
from jaxdist.communicators.rounds import Rounds
from jaxdist.compressors import base as codes
from jaxdist.digest import DIGEST_BYTES
from jaxdist.elastic.ledger import Tag
from jaxdist.elastic.settings import Agreement
from jaxdist.pack import pack, unpack
from jaxdist.transforms.base import zeros

_BUCKET_BYTES = 2**28


class Change(NamedTuple):
  """What a replica sends.

  Attributes:
    tag: whose work it is.
    program: the digest of the agreement that it was made under.
    words: the encoded change, a matrix for each bucket.
    loss: the mean over the inner steps.
    owed: the norm of the residual that the replica goes on with.
  """

  tag: tuple[int, int, int]
  program: Any
  words: list[Any]
  loss: float
  owed: float


class Wire:
  """Encodes and decodes under an agreement, on either side.

  Changes are laid out and encoded as by ``jd.mean(axis, code, 'gather',
  seed=seed)``, with the round for the number of the exchange and the replica
  for the worker; so the numbers are the same.

  Args:
    agreement: see :class:`Agreement`.
  """

  def __init__(self, agreement: Agreement):
    self.agreement = agreement
    self.digest = agreement.digest()
    rounds = Rounds('', agreement.code, 'gather', _BUCKET_BYTES, agreement.seed)
    # Slices of leaves, the shape of their blocks, and that of the payload.
    self._buckets = [
      (bucket, *rounds.pattern(bucket, 1)[1:])
      for bucket in rounds.plan(exchanged_leaves(agreement.like))
    ]

  def pack_params(self, round: int, params: optax.Params) -> bytes:
    """What the coordinator sends: float32 parameters, packed."""
    message = {'round': round, 'params': jax.tree.leaves(params)}
    return pack(message, compress=False)

  def unpack_params(self, data: bytes) -> tuple[int, optax.Params]:
    """The inverse of :meth:`pack_params`.

    Raises:
      UnpackError: if the bytes are damaged.
      ValueError: if they hold something else.
    """
    leaves, structure = jax.tree.flatten(zeros(self.agreement.like))
    message = unpack(data, {'round': 0, 'params': leaves})
    return message['round'], jax.tree.unflatten(structure, message['params'])

  def pack_change(
    self, tag: Tag, words: list[Array], loss: float, owed: float
  ) -> bytes:
    """What a replica sends."""
    program = np.frombuffer(self.digest, np.uint8)
    return pack(tuple(Change(tuple(tag), program, words, loss, owed)))

  def unpack_change(self, data: bytes) -> Change:
    """The inverse of :meth:`pack_change`.

    Raises:
      UnpackError: if the bytes are damaged.
      ValueError: if they hold something else, or are of another agreement.
    """
    program = np.zeros(DIGEST_BYTES, np.uint8)
    like = tuple(Change((0, 0, 0), program, self.nothing, 0.0, 0.0))
    change = Change(*unpack(data, like))
    if change.program.tobytes() != self.digest:
      raise ValueError('data is a change of another program.')
    return change

  @functools.cached_property
  def nothing(self) -> list[np.ndarray]:
    """Words of zeros, such as those of a change."""
    return [
      np.zeros(jax.eval_shape(codes.payload_words, like).shape, np.uint32)
      for *_, like in self._buckets
    ]

  @functools.cached_property
  def encode(self):
    """``(anchor, params, residual, round, replica) -> (words, residual, ...)``.

    Compiled. Gives the words, the residual to go on with (None without
    feedback), its norm, and whether the change is finite; if it is not, the
    residual is what it was.
    """

    def encode(anchor, params, residual, round, replica):
      change = jax.tree.map(
        lambda p, a: p.astype(jnp.float32) - a, params, anchor
      )
      target = change
      if residual is not None:
        decay = self.agreement.decay
        target = jax.tree.map(lambda c, e: c + decay * e, change, residual)
      words, sent = self._encode(target, round, replica)
      finite = all_finite(sent)
      if residual is None:
        return words, None, jnp.float32(0), finite
      left = jax.tree.map(jnp.subtract, target, sent)
      left = where(finite, left, residual)
      return words, left, optax.tree.norm(left), finite

    return jax.jit(encode, donate_argnums=2)

  @functools.cached_property
  def decode(self):
    """``(words, round, replica) -> (change, whether finite)``. Compiled."""

    def decode(words, round, replica):
      blocks = []
      for i, (*_, like) in enumerate(self._buckets):
        payload = codes.payload_from_words(words[i], like)
        code, _ = self._draws(round, i, replica)
        blocks.append(code.decode(payload))
      change = self._tree(blocks)
      return change, all_finite(change)

    return jax.jit(decode)

  def _encode(self, tree, round, replica):
    words, sent = [], []
    leaves = exchanged_leaves(tree)
    for i, (bucket, shape, _) in enumerate(self._buckets):
      x = buckets.to_blocks(leaves, bucket, *shape)
      code, key = self._draws(round, i, replica)
      payload = code.encode(x, key)
      words.append(codes.payload_words(payload))
      sent.append(code.decode(payload))
    return words, self._tree(sent)

  def _draws(self, round, bucket, replica):
    """The code with what all share, and a replica's own key."""
    key = jax.random.fold_in(jax.random.key(self.agreement.seed), round)
    shared_key, key = jax.random.split(jax.random.fold_in(key, bucket))
    key, _ = jax.random.split(jax.random.fold_in(key, replica))
    return self.agreement.code.at(shared_key), key

  def _tree(self, blocks):
    """Block matrices as parameters; empty leaves pass by."""
    like = self.agreement.like
    shapes = [leaf.shape for leaf in exchanged_leaves(like)]
    plan = [bucket for bucket, *_ in self._buckets]
    leaves = iter(buckets.from_blocks(blocks, plan, shapes))
    return jax.tree.map(
      lambda x: next(leaves) if is_exchanged(x) else jnp.zeros(x.shape), like
    )
