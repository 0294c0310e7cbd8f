"""One communicator after another: a warm-up, then what is to stay."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from jaxdist import state as worker_state
from jaxdist.communicators import base


class StagedState(NamedTuple):
  """State of :func:`staged`.

  Attributes:
    count: exchanges so far. The same on all workers.
    states: one for each communicator, or a single one if all keep the same.
  """

  count: Int32[Array, '']
  states: tuple[Any, ...]


def staged(
  communicators: Sequence[base.Communicator], boundaries: Sequence[int]
) -> base.Communicator:
  """Exchanges through one communicator after another.

  Training is most sensitive at its start: send more then, and less and less
  later. All stages are branches of one compiled step, so that moving on
  compiles nothing, and :func:`jaxdist.traffic` lists what each of them sends:
  under ``jaxdist.warmup.0``, ``jaxdist.warmup.1``, ... those that end, which
  count nothing in the long run. **On the wire:** what the stage's communicator
  sends.

  Communicators that keep the same state, as those that differ by density only
  and name the same method, hand it on. Others must hold nothing back when they
  end: it would be lost.

  Args:
    communicators: for each stage, all along one axis.
    boundaries: the exchange at which each stage but the first begins, as for
      :func:`optax.join_schedules`.

  Returns:
    A :class:`Communicator`. Its ``bytes_sent`` are those of the last stage.

  Raises:
    ValueError: if the stages run along different axes, some agree between
      workers and some don't, boundaries do not rise or are not one fewer than
      the stages; when ``init`` runs, if a stage would take something with it.

  Examples:
    >>> import jaxdist as jd
    >>> two_shot = lambda d: jd.mean('data', jd.top_k(d), 'two_shot')
    >>> communicator = jd.staged(  # A quarter, a sixteenth, then a hundredth.
    ...   [two_shot(1 / 4), two_shot(1 / 16), two_shot(1 / 100)],
    ...   boundaries=[100, 200],
    ... )
    >>> params = {'w': jnp.zeros((1024, 1024))}
    >>> communicator.bytes_sent(params, workers=8)
    100352.0
  """
  if len(boundaries) != len(communicators) - 1:
    raise ValueError(
      f'boundaries must be one fewer than the {len(communicators)} '
      f'communicators, got {list(boundaries)}.'
    )
  if (
    sorted(set(boundaries)) != list(boundaries)
    or min(boundaries, default=1) < 1
  ):
    raise ValueError(
      f'boundaries must rise from at least 1, got {list(boundaries)}.'
    )
  base.check_together(communicators)
  last = len(communicators) - 1

  def init(tree, feedback=False):
    states = [c.init(tree, feedback) for c in communicators]
    kinds = [_kind(state) for state in states]
    if all(kind == kinds[0] for kind in kinds):
      states = states[:1]
    for communicator, state in zip(communicators, states[:-1], strict=False):
      if _holds(state):
        raise ValueError(
          f'communicators must hold nothing back when their stage ends, unless '
          f'all keep the same state; {communicator!r} does. Name one method '
          f'for all, as in jd.mean(axis, code, "two_shot").'
        )
    return StagedState(jnp.zeros((), jnp.int32), tuple(states))

  def exchange(tree, state):
    def branch(stage):
      # Traffic counts what ends as nothing, and what stays as every step's.
      name = f'warmup.{stage}' if stage < last else 'every.1'
      place = min(stage, len(state.states) - 1)

      def run(tree, states):
        with jax.named_scope(f'jaxdist.{name}'):
          result, sent, new = communicators[stage].exchange(tree, states[place])
        return result, sent, (*states[:place], new, *states[place + 1 :])

      return run

    stage = jnp.sum(state.count >= jnp.asarray(boundaries, jnp.int32))
    result, sent, states = jax.lax.switch(
      stage, [branch(i) for i in range(last + 1)], tree, state.states
    )
    return result, sent, StagedState(state.count + 1, states)

  return base.Communicator(
    f'staged({list(communicators)!r}, {list(boundaries)})',
    communicators[0].axis,
    init,
    exchange,
    communicators[-1].bytes_sent,
    contraction=min(c.contraction for c in communicators),
    unbiased=all(c.unbiased for c in communicators),
    agrees=communicators[0].agrees,
    late=any(c.late for c in communicators),
    encodes_twice=any(c.encodes_twice for c in communicators),
    uncompressed=communicators[-1].uncompressed,
  )


def _kind(state):
  """What must be equal for a state to be handed on."""
  leaves, treedef = jax.tree.flatten(state)
  return treedef, [(leaf.shape, leaf.dtype) for leaf in leaves]


def _holds(state):
  """Whether a state has something of each worker's own."""
  is_own = worker_state.is_per_worker
  nodes = filter(is_own, jax.tree.leaves(state, is_leaf=is_own))
  return any(jax.tree.leaves(node) for node in nodes)
