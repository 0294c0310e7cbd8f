"""Averaging with neighbours only: on a ring, a one-peer graph, or in pairs."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Int32

from jaxdist.communicators import base, buckets, checks, collectives
from jaxdist.communicators.rounds import payload_shape
from jaxdist.compressors import base as codes
from jaxdist.compressors.identity import identity
from jaxdist.state import PerWorker

Topology = Literal['ring', 'one_peer_exponential', 'random_pairs']
# Who sends to whom: (source, destination), each worker once.
Permutation = list[tuple[int, int]]


class GossipState(NamedTuple):
  """State of :func:`gossip`.

  Attributes:
    count: rounds so far. The same on all workers.
    told: what the neighbours know of this worker, a block matrix for each
      group of neighbours; ``None`` without a compressor. Each worker's own.
    heard: the sum of what this worker knows of its neighbours; likewise.
  """

  count: Int32[Array, '']
  told: PerWorker
  heard: PerWorker


def gossip(
  axis: str,
  topology: Topology = 'ring',
  compressor: codes.Compressor | None = None,
  *,
  mixing: ArrayLike = 1.0,
  seed: int = 0,
) -> base.Communicator:
  r"""Averages each worker's tree with its neighbours'.

  .. math:: x_i \gets x_i + \frac{\gamma}{n+1} \sum_{j} (\hat x_j - \hat x_i)

  over the n neighbours of a round: both on a ``'ring'``; one on a
  ``'one_peer_exponential'`` graph, whose distance is 1, 2, 4, ... in turn (with
  a power of two workers, each such cycle averages exactly); or one in
  ``'random_pairs'``, which are drawn anew in each round from a seed that all
  share, each pair as likely as any (of an odd number, one worker waits). The
  mean over all workers is kept, whatever the code.

  Without a compressor :math:`\hat x = x`. With one, :math:`\hat x_i` is what
  the neighbours know of worker i: difference coding, where only the code of
  :math:`x_i - \hat x_i` travels and both ends add it to :math:`\hat x_i`
  (CHOCO), so that lossy codes still reach consensus. That takes two more copies
  of the tree on a ring, and two for each distance on the exponential graph;
  random pairs have no code.

  **On the wire:** one payload to each neighbour of the round (ppermute); no
  all-reduce. Results differ between workers: use it where parameters may drift,
  as in :func:`jaxdist.local_sgd`. Non-finite numbers spread to neighbours.

  Args:
    axis: name of the axis that the workers lie along.
    topology: who talks to whom.
    compressor: the code; ``None`` sends float32.
    mixing: :math:`\gamma` in (0, 1]. Codes that drop much need a small one
      (top 1%: about 0.05), or the differences grow.
    seed: of the pairs, and of the codes that draw random numbers.

  Returns:
    A :class:`Communicator` whose result does not agree between workers.

  Raises:
    ValueError: if ``topology`` is not known, or has no code; ``mixing`` is
      outside (0, 1]; or the code does not contract (the differences would grow
      without bound).

  Examples:
    >>> import jaxdist as jd
    >>> ring = jd.gossip('data', 'ring')
    >>> tree = jnp.arange(4.0).reshape(4, 1) * 3
    >>> mix = lambda x: ring.exchange(x, ring.init(x, False))[0]
    >>> jax.vmap(mix, axis_name='data')(tree).ravel()
    Array([4., 3., 6., 5.], dtype=float32)

  References:
    Koloskova et al, `Decentralized Stochastic Optimization and Gossip
    Algorithms with Compressed Communication
    <https://arxiv.org/abs/1902.00340>`_, 2019 (algorithm 2); Assran et al,
    `Stochastic Gradient Push <https://arxiv.org/abs/1811.10792>`_, 2019 (the
    exponential graph)
  """
  checks.check_axis(axis)
  checks.check_compressor(compressor)
  topologies = Topology.__args__
  if topology not in topologies:
    raise ValueError(f'topology must be one of {topologies}, got {topology!r}.')
  checks.check_fraction('mixing', mixing)
  is_average = not isinstance(mixing, jax.core.Tracer) and mixing == 1
  seed = checks.seed(seed)
  if topology == 'random_pairs' and compressor is not None:
    raise ValueError(
      f"compressor must be None with topology='random_pairs': difference "
      f'coding would remember each possible partner. Got {compressor!r}.'
    )
  code = compressor if compressor is not None else identity(block_size=128)
  checks.check_contracts(
    'difference coding', code, 'Take one that does, or compressor=None.'
  )

  def matrix_shape(shapes):
    length = sum(math.prod(s.shape) for s in shapes)
    size = code.block_size or max(1, length)
    return math.ceil(length / size), size

  def init(shapes, feedback):
    del feedback  # Difference coding remembers what was dropped.
    memory = None
    if compressor is not None:
      groups = _rounds(topology, collectives.axis_size(axis), seed)
      memory = [jnp.zeros(matrix_shape(shapes), jnp.float32) for _ in groups]
    memory = PerWorker(collectives.vary(memory, axis), None)
    return GossipState(jnp.zeros((), jnp.int32), memory, memory)

  def exchange(leaves, state):
    workers = collectives.axis_size(axis)
    groups = _rounds(topology, workers, seed)
    plan = buckets.plan(
      [leaf.size for leaf in leaves], sum(leaf.size for leaf in leaves)
    )
    x = buckets.to_blocks(leaves, plan[0], *matrix_shape(leaves))
    key = collectives.exchange_key(seed, state.count)
    key = collectives.shard_key(key, x, axis)
    shared_key, own_key = jax.random.split(key)
    own_key = jax.random.fold_in(own_key, jax.lax.axis_index(axis))
    shared = code.at(shared_key)
    like = payload_shape(code, *x.shape)

    def talk(permutations, told, heard):
      """One round, with a neighbour for each permutation."""
      payload = shared.encode(x - told, own_key)
      told = told + shared.decode(payload)
      words = codes.payload_words(payload)
      for permutation in permutations:
        received = jax.lax.ppermute(words, axis, permutation)  # the wire
        heard = heard + shared.decode(codes.payload_from_words(received, like))
      count = len(permutations)
      if compressor is None and is_average:
        # The same bits for both of a pair.
        return (x + heard) / (count + 1), told, heard
      mixed = x + mixing / (count + 1) * (heard - count * told)
      return mixed, told, heard

    def turn(i):
      def branch(told, heard):
        with jax.named_scope(f'jaxdist.every.{len(groups)}'):
          if compressor is None:
            zeros = jnp.zeros_like(x)
            mixed, sent, _ = talk(groups[i], zeros, zeros)
            return mixed, sent, told, heard
          mixed, one_told, one_heard = talk(groups[i], told[i], heard[i])
          told = [*told[:i], one_told, *told[i + 1 :]]
          heard = [*heard[:i], one_heard, *heard[i + 1 :]]
          return mixed, one_told, told, heard

      return branch

    index = state.count % len(groups)
    if topology == 'random_pairs':
      index = jax.random.randint(shared_key, (), 0, len(groups))
    mixed, sent, told, heard = jax.lax.switch(
      index,
      [turn(i) for i in range(len(groups))],
      state.told.value,
      state.heard.value,
    )
    shapes = [leaf.shape for leaf in leaves]
    return (
      buckets.from_blocks([mixed], plan, shapes),
      buckets.from_blocks([sent], plan, shapes),
      GossipState(
        state.count + 1, PerWorker(told, None), PerWorker(heard, None)
      ),
    )

  def bytes_sent(shapes, workers):
    groups = _rounds(topology, workers, seed)
    words = jax.eval_shape(
      codes.payload_words, payload_shape(code, *matrix_shape(shapes))
    )
    sent = sum(
      source != destination
      for permutations in groups
      for permutation in permutations
      for source, destination in permutation
    )
    return sent / workers / len(groups) * 4 * words.size

  name = f'gossip({axis!r}, {topology!r}'
  name += f', {code!r})' if compressor is not None else ')'
  return base.over_leaves(
    name,
    axis,
    init,
    exchange,
    bytes_sent,
    contraction=code.contraction,
    unbiased=code.unbiased,
    agrees=False,
  )


def _rounds(
  topology: Topology, workers: int, seed: int
) -> list[list[Permutation]]:
  """For each kind of round its permutations, one for each neighbour."""
  shift = lambda d: [(i, (i + d) % workers) for i in range(workers)]
  if workers == 1:
    return [[]]
  if topology == 'ring':
    return [[shift(1), shift(-1)] if workers > 2 else [shift(1)]]
  if topology == 'random_pairs':
    return [[matching] for matching in _matchings(workers, seed)]
  return [[shift(2**i)] for i in range(math.ceil(math.log2(workers)))]


def _matchings(workers: int, seed: int) -> list[Permutation]:
  """Ways to pair all workers, in which each pair occurs exactly once.

  A round-robin tournament: one stands still, the others move around a circle.
  """
  seats = workers + workers % 2  # Who meets an empty seat waits.
  names = np.random.default_rng(seed).permutation(workers).tolist()
  matchings = []
  for turn in range(seats - 1):
    circle = [(turn + i) % (seats - 1) for i in range(seats - 1)]
    order = [seats - 1, *circle]
    pairs = [(order[i], order[-i]) for i in range(1, seats // 2)]
    pairs = [(order[0], order[seats // 2]), *pairs]
    partner = list(range(seats))
    for a, b in pairs:
      partner[a], partner[b] = b, a
    matchings.append(
      [
        (names[i], names[j] if j < workers else names[i])
        for i, j in enumerate(partner[:workers])
      ]
    )
  return matchings
