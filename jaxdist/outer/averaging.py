"""Meetings of workers: averaging what changed, or mixing with neighbours."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from jaxdist.communicators import collectives
from jaxdist.communicators.base import Communicator
from jaxdist.outer.fragments import Pattern, assign
from jaxdist.outer.local_steps import Meeting
from jaxdist.state import PerWorker
from jaxdist.transforms import base
from jaxdist.transforms.error_feedback import (
  exchange_with_feedback,
  zero_residual,
)


class AverageChangesState(NamedTuple):
  """State of :func:`average_changes`.

  Attributes:
    anchor: the parameters that all last agreed on, in float32. The same on all
      workers.
    outer: the outer optimizer's state for each fragment. The same on all
      workers.
    residual: what was dropped from the changes sent so far; ``None`` without
      feedback. Each worker's own.
    snapshot: the changes when they were last looked at, on their way; ``None``
      without a delay. Each worker's own.
    communicator: the communicator's, for each fragment.
    count: meetings so far. The same on all workers.
    skipped: meetings dropped for a non-finite change. The same on all workers.
  """

  anchor: optax.Params
  outer: tuple[optax.OptState, ...]
  residual: PerWorker
  snapshot: PerWorker
  communicator: tuple[Any, ...]
  count: Int32[Array, '']
  skipped: Int32[Array, '']


def average_changes(
  communicator: Communicator,
  outer: optax.GradientTransformation,
  *,
  feedback: bool | None,
  decay: float,
  fragments: int = 1,
  delay: int = 0,
  mix: float = 0.0,
  pattern: Pattern | Any = 'strided',
  share: Callable[[jax.Array], jax.Array] | None = None,
) -> Meeting:
  """Moves an anchor by the mean change since it last moved; all go there.

  If a change is not finite, all workers go back to the anchor together.

  Args:
    communicator: exchanges the changes; its result agrees between workers.
    outer: takes the mean change, negated, as the anchor's gradient.
    feedback: whether to keep what the code drops; ``None``: if it is biased.
    decay: of the residual.
    fragments: how many parts of the parameters have a turn each.
    delay: steps between looking at the changes and moving the anchor.
    mix: the share of its own parameters that a worker keeps.
    pattern: which leaves are in which fragment.
    share: from the number of meetings so far to this worker's weight, of mean 1
      over workers; with a weight of 0 it takes no steps and sends nothing.
      ``None``: all have 1.

  Returns:
    A :class:`Meeting`.

  Raises:
    ValueError: if feedback cannot work with this communicator, or an option is
      out of range.
  """
  feedback = with_feedback(communicator, feedback, decay)
  _check(fragments, delay, mix, pattern)
  axis = communicator.axis
  outer = optax.with_extra_args_support(outer)

  def init(params):
    parts = assign(params, fragments, pattern)
    anchor = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    zeros = zero_residual(params, axis)
    return AverageChangesState(
      anchor,
      tuple(outer.init(parts.mask(anchor, i)) for i in range(fragments)),
      zeros if feedback else PerWorker(None),
      zeros if delay else PerWorker(None),
      tuple(
        communicator.init(parts.keep(params, i), feedback=feedback)
        for i in range(fragments)
      ),
      jnp.zeros((), jnp.int32),
      jnp.zeros((), jnp.int32),
    )

  def changes(params, state):
    return jax.tree.map(
      lambda p, a: p.astype(jnp.float32) - a, params, state.anchor
    )

  def prepare(params, state):
    return state._replace(snapshot=PerWorker(changes(params, state)))

  def meet(params, state, turn):
    parts = assign(params, fragments, pattern)
    change = state.snapshot.value if delay else changes(params, state)
    change = parts.keep(change, turn)
    residual = PerWorker(
      parts.keep(state.residual.value, turn) if feedback else None
    )
    if share is not None:
      weight = share(state.count)
      silent = lambda tree: base.where(
        weight > 0, tree, optax.tree.zeros_like(tree)
      )
      change = silent(optax.tree.scale(weight, change))
    mean, held, comm_state = exchange_changes(
      communicator,
      change,
      residual if share is None else silent(residual),
      state.communicator[turn],
      decay,
    )
    if share is not None:
      # Who is silent may still have sent what was owed for others: a share of
      # its slice, or what was in flight as the number of workers changed.
      owed = optax.tree.add(residual, held)
      held = base.where(weight > 0, held, owed)
    if feedback:
      held = parts.mask(held.value, turn)
      held = PerWorker(parts.put(state.residual.value, held, turn))
    anchor = parts.mask(state.anchor, turn)
    updates, outer_state = outer.update(
      parts.mask(jax.tree.map(jnp.negative, mean), turn),
      state.outer[turn],
      anchor,
    )
    finite = base.all_finite(mean)
    anchor = base.where(finite, optax.apply_updates(anchor, updates), anchor)
    others = lambda old, new: (*old[:turn], new, *old[turn + 1 :])
    new = state._replace(
      outer=others(state.outer, outer_state),
      residual=held,
      communicator=others(state.communicator, comm_state),
    )
    new = base.where(finite, new, state)._replace(
      anchor=parts.put(state.anchor, anchor, turn),
      count=state.count + 1,
      skipped=state.skipped + jnp.where(finite, 0, 1),
    )
    goal = collectives.vary(anchor, axis)
    if mix:
      own = parts.mask(params, turn)
      mixed = jax.tree.map(
        lambda p, a: mix * p.astype(jnp.float32) + (1 - mix) * a, own, goal
      )
      goal = base.where(finite, mixed, goal)
    return parts.put(params, goal, turn), new

  return Meeting(
    axis,
    init,
    meet,
    turns=fragments,
    delay=delay,
    prepare=prepare if delay else None,
    ahead=delay > 0,
    takes_part=None if share is None else lambda state: share(state.count) > 0,
  )


def exchange_changes(
  communicator: Communicator,
  change: optax.Updates,
  residual: PerWorker,
  state: Any,
  decay: float,
) -> tuple[optax.Updates, PerWorker, Any]:
  """One exchange, with feedback if there is a residual.

  Returns:
    The communicator's result, the new residual, and its new state.
  """
  if residual.value is None:
    mean, _, state = communicator.exchange(change, state)
    return mean, residual, state
  return exchange_with_feedback(communicator, change, residual, state, decay)


def with_feedback(
  communicator: Communicator, feedback: bool | None, decay: float
) -> bool:
  """Whether to keep what the code drops: by default, if it is biased.

  Raises:
    ValueError: if feedback cannot work, or ``decay`` does nothing.
  """
  if feedback is None:
    feedback = not communicator.unbiased
  if feedback:
    base.check_feedback(communicator, decay)
  elif decay != 1.0:
    raise ValueError(f'decay does nothing without feedback, got {decay}.')
  return feedback


def mix_params(communicator: Communicator) -> Meeting:
  """Mixes each worker's parameters with its neighbours'.

  Args:
    communicator: one whose result differs between workers, such as gossip.

  Returns:
    A :class:`Meeting`.
  """

  def init(params):
    return communicator.init(params)

  def meet(params, state, turn):
    del turn
    mixed, _, state = communicator.exchange(params, state)
    return mixed, state

  return Meeting(communicator.axis, init, meet)


def _check(fragments, delay, mix, pattern):
  if not isinstance(fragments, int) or fragments < 1:
    raise ValueError(
      f'fragments must be an integer of at least 1, got {fragments!r}.'
    )
  if not isinstance(delay, int) or delay < 0:
    raise ValueError(f'delay must be an integer of at least 0, got {delay!r}.')
  if not 0 <= mix <= 1:
    raise ValueError(f'mix must be in [0, 1], got {mix}.')
  if isinstance(pattern, str) and pattern not in Pattern.__args__:
    raise ValueError(
      f'pattern must be one of {Pattern.__args__} or a tree of fragment '
      f'numbers, got {pattern!r}.'
    )
