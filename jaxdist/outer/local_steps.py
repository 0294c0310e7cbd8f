"""Steps on each worker's own parameters, with meetings every few of them."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdist.communicators import collectives
from jaxdist.state import Axis, Clock, Drifts, PerWorker
from jaxdist.transforms import base


class Meeting(NamedTuple):
  """What workers do when they meet.

  Attributes:
    axis: the axis that they lie along.
    init: ``params -> state``.
    meet: ``(params, state, turn) -> (params, state)``: from this worker's
      parameters to those that it goes on with. Collective.
    turns: meetings in a period; divides the steps in it.
    delay: how many steps before a meeting its ``prepare`` runs.
    prepare: ``(params, state) -> state``, where ``delay`` is not 0. Not
      collective.
    ahead: whether what a meeting exchanges is there before its step begins.
    takes_part: ``state -> bool``: whether this worker takes steps until the
      next meeting; ``None`` if all always do.
    direct: ``(gradients, state, step) -> (gradients, state)``: what the inner
      optimizer gets instead of the gradients, where meetings correct them.
      ``step`` counts from 0. Not collective.
  """

  axis: Axis
  init: Callable[[optax.Params], Any]
  meet: Callable[[optax.Params, Any, int], tuple[optax.Params, Any]]
  turns: int = 1
  delay: int = 0
  prepare: Callable[[optax.Params, Any], Any] | None = None
  ahead: bool = False
  takes_part: Callable[[Any], jax.Array] | None = None
  direct: Callable[..., tuple[optax.Updates, Any]] | None = None


class LocalStepsState(NamedTuple):
  """State of transforms that take local steps.

  Attributes:
    drifts: marks that parameters differ between workers.
    clock: counts the steps. The same on all workers.
    inner: the inner optimizer's state. Each worker's own.
    meeting: the meeting's state.
    skipped: this worker's steps left out for a number that is not finite.
    layout: what the params looked like at init.
  """

  drifts: Drifts
  clock: Clock
  inner: PerWorker
  meeting: Any
  skipped: PerWorker
  layout: base.Layout


def local_steps(
  inner: optax.GradientTransformation,
  meeting: Meeting,
  every: int | Sequence[int],
) -> optax.GradientTransformationExtraArgs:
  """Takes the inner optimizer's steps locally, and meets in some of them.

  A worker whose gradient, or what it would lead to, is not finite leaves that
  local step out: there is no exchange in which others could learn of it.

  Args:
    inner: any optimizer.
    meeting: what happens after the steps that have a turn.
    every: steps in a period of all turns, at least 1; or the steps after which
      workers meet.

  Returns:
    A transform whose parameters drift. Its updates are float32, so that params
    plus update is the new value in low precision too.

  Raises:
    ValueError: if ``every`` is out of range, or turns cannot divide it.
  """
  given = None
  if not isinstance(every, int):
    given = _check_steps(every, meeting)
    every = given[-1]
  _check(every, meeting)
  turns, gap = meeting.turns, every // meeting.turns
  inner = optax.with_extra_args_support(inner)

  def init_fn(params):
    own, zero = collectives.vary(
      (params, jnp.zeros((), jnp.int32)), meeting.axis
    )
    return LocalStepsState(
      drifts=Drifts(),
      clock=Clock(jnp.zeros((), jnp.int32), every, turns, meeting.ahead),
      inner=PerWorker(collectives.vary(inner.init(own), meeting.axis)),
      meeting=meeting.init(params),
      skipped=PerWorker(zero),
      layout=base.Layout.of(params),
    )

  def meet(turn, params, state):
    new, state = meeting.meet(params, state, turn)
    to_dtype = lambda x, p: x.astype(p.dtype)
    return jax.tree.map(to_dtype, new, params), state

  if given is not None:
    common = math.gcd(every, len(given))
    rare = f'jaxdist.every.{every // common}_{len(given) // common}'

  def branch(clock, turn):
    def run(params, state):
      if turn == turns:
        return params, state
      with jax.named_scope(clock.scope(turn) if given is None else rare):
        return meet(turn, params, state)

    return run

  def update_fn(updates, state, params=None, *, turn=None, **extra_args):
    if params is None:
      raise ValueError(
        'params must be given where parameters drift: '
        'tx.update(updates, state, params).'
      )
    base.check_updates(updates, state.layout, meeting.axis)
    finite = base.all_finite(updates)
    if meeting.direct:
      updates, meeting_state = meeting.direct(
        updates, state.meeting, state.clock.count
      )
      state = state._replace(meeting=meeting_state)
    steps, inner_state = inner.update(
      updates, state.inner.value, params, **extra_args
    )
    moved = optax.apply_updates(params, steps)
    # Nothing that is added to parameters could make them finite again.
    finite &= base.all_finite(moved)
    moves = finite
    if meeting.takes_part:
      moves &= meeting.takes_part(state.meeting)
    moved = base.where(moves, moved, params)
    clock = state.clock
    if turn is None:
      idle = every > (turns if given is None else len(given))
      new, meeting_state = jax.lax.switch(
        clock.turn() if given is None else _turn(clock, given),
        [branch(clock, i) for i in range(turns + idle)],
        moved,
        state.meeting,
      )
    elif turn < turns:
      new, meeting_state = meet(turn, moved, state.meeting)
    else:
      new, meeting_state = moved, state.meeting
    clock = clock.next()
    if meeting.prepare and (turn is None or turn == turns):
      meeting_state = jax.lax.cond(
        (clock.count + meeting.delay) % gap == 0,
        meeting.prepare,
        lambda _, state: state,
        new,
        meeting_state,
      )
    change = lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32)
    return jax.tree.map(change, new, params), state._replace(
      clock=clock,
      inner=PerWorker(base.where(moves, inner_state, state.inner.value)),
      meeting=meeting_state,
      skipped=PerWorker(state.skipped.value + jnp.where(finite, 0, 1)),
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _turn(clock, steps):
  """0 if workers meet after the coming step, else 1."""
  step = clock.count + 1
  index = jnp.searchsorted(jnp.array(steps), step)
  return jnp.where(jnp.array((*steps, 0))[index] == step, 0, 1)


def _check_steps(steps, meeting):
  if isinstance(steps, str) or not isinstance(steps, Sequence) or not steps:
    raise ValueError(
      f'every must be an integer of at least 1, or a sequence of the steps '
      f'after which workers meet, got {steps!r}.'
    )
  for before, step in zip((0, *steps), steps, strict=False):
    if not isinstance(step, int) or step <= before:
      raise ValueError(
        f'the steps in every must be integers that increase from 1, got '
        f'{step!r} after {before}.'
      )
  if meeting.turns > 1 or meeting.ahead:
    raise ValueError(
      'every must be an integer with fragments or a delay, got a sequence.'
    )
  return tuple(steps)


def _check(every, meeting):
  if every < 1:
    raise ValueError(f'every must be an integer of at least 1, got {every!r}.')
  turns, delay = meeting.turns, meeting.delay
  if every % turns:
    raise ValueError(
      f'fragments must divide every, got fragments={turns} and every={every}.'
    )
  if not 0 <= delay < every // turns:
    raise ValueError(
      f'delay must be at least 0 and less than every / fragments, '
      f'{every // turns}, got {delay}.'
    )
