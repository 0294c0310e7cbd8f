"""Steps on each worker's own parameters, with a meeting every few of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from jaxdist.communicators import collectives
from jaxdist.communicators.base import Communicator
from jaxdist.state import Drifts, PerWorker
from jaxdist.transforms import base
from jaxdist.transforms.error_feedback import (
  exchange_with_feedback,
  zero_residual,
)


class Meeting(NamedTuple):
  """What workers do when they meet.

  Attributes:
    axis: the axis that they lie along.
    init: ``params -> state``.
    meet: ``(params, state) -> (params, state)``: from this worker's parameters
      to those that it goes on with. Collective.
  """

  axis: str
  init: Callable[[optax.Params], Any]
  meet: Callable[[optax.Params, Any], tuple[optax.Params, Any]]


class LocalStepsState(NamedTuple):
  """State of transforms that take local steps.

  Attributes:
    drifts: marks that parameters differ between workers.
    count: steps so far. The same on all workers.
    inner: the inner optimizer's state. Each worker's own.
    meeting: the meeting's state.
    skipped: this worker's steps left out for a non-finite gradient.
    layout: what the params looked like at init.
  """

  drifts: Drifts
  count: Int32[Array, '']
  inner: PerWorker
  meeting: Any
  skipped: PerWorker
  layout: base.Layout


def local_steps(
  inner: optax.GradientTransformation, meeting: Meeting, every: int
) -> optax.GradientTransformationExtraArgs:
  """Takes the inner optimizer's steps locally, and meets every few of them.

  A worker whose gradient is not finite leaves that local step out: there is no
  exchange in which others could learn of it.

  Args:
    inner: any optimizer.
    meeting: what happens after every ``every``-th step.
    every: at least 1.

  Returns:
    A transform whose parameters drift. Its updates are float32, so that params
    plus update is the new value in low precision too.

  Raises:
    ValueError: if ``every`` is out of range.
  """
  if not isinstance(every, int) or every < 1:
    raise ValueError(f'every must be an integer of at least 1, got {every!r}.')
  inner = optax.with_extra_args_support(inner)

  def init_fn(params):
    own, zero = collectives.vary(
      (params, jnp.zeros((), jnp.int32)), meeting.axis
    )
    return LocalStepsState(
      drifts=Drifts(),
      count=jnp.zeros((), jnp.int32),
      inner=PerWorker(collectives.vary(inner.init(own), meeting.axis)),
      meeting=meeting.init(params),
      skipped=PerWorker(zero),
      layout=base.Layout.of(params),
    )

  def meet(params, state):
    with jax.named_scope(f'jaxdist.every.{every}'):
      new, state = meeting.meet(params, state)
    to_dtype = lambda x, p: x.astype(p.dtype)
    return jax.tree.map(to_dtype, new, params), state

  def update_fn(updates, state, params=None, **extra_args):
    if params is None:
      raise ValueError(
        'params must be given where parameters drift: '
        'tx.update(updates, state, params).'
      )
    base.check_updates(updates, state.layout, meeting.axis)
    finite = base.all_finite(updates)
    steps, inner_state = inner.update(
      updates, state.inner.value, params, **extra_args
    )
    moved = base.where(finite, optax.apply_updates(params, steps), params)
    count = state.count + 1
    if every == 1:
      new, meeting_state = meet(moved, state.meeting)
    else:
      new, meeting_state = jax.lax.cond(
        count % every == 0, meet, lambda *args: args, moved, state.meeting
      )
    change = lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32)
    return jax.tree.map(change, new, params), state._replace(
      count=count,
      inner=PerWorker(base.where(finite, inner_state, state.inner.value)),
      meeting=meeting_state,
      skipped=PerWorker(state.skipped.value + jnp.where(finite, 0, 1)),
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class AverageChangesState(NamedTuple):
  """State of :func:`average_changes`.

  Attributes:
    anchor: the parameters that all last agreed on, in float32. The same on all
      workers.
    outer: the outer optimizer's state. The same on all workers.
    residual: what was dropped from the changes sent so far; ``None`` without
      feedback. Each worker's own.
    communicator: the communicator's.
    skipped: meetings dropped for a non-finite change. The same on all workers.
  """

  anchor: optax.Params
  outer: optax.OptState
  residual: PerWorker
  communicator: Any
  skipped: Int32[Array, '']


def average_changes(
  communicator: Communicator,
  outer: optax.GradientTransformation,
  feedback: bool | None,
  decay: float,
) -> Meeting:
  """Moves an anchor by the mean change since the last meeting; all go there.

  If a change is not finite, all workers go back to the anchor together.

  Args:
    communicator: exchanges the changes; its result agrees between workers.
    outer: takes the mean change, negated, as the anchor's gradient.
    feedback: whether to keep what the code drops; ``None``: if it is biased.
    decay: of the residual.

  Returns:
    A :class:`Meeting`.

  Raises:
    ValueError: if feedback cannot work with this communicator.
  """
  if feedback is None:
    feedback = not communicator.unbiased
  if feedback:
    base.check_feedback(communicator, decay)
  elif decay != 1.0:
    raise ValueError(f'decay does nothing without feedback, got {decay}.')
  axis = communicator.axis
  outer = optax.with_extra_args_support(outer)

  def init(params):
    anchor = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    return AverageChangesState(
      anchor,
      outer.init(anchor),
      zero_residual(params, axis) if feedback else PerWorker(None),
      communicator.init(params, feedback=feedback),
      jnp.zeros((), jnp.int32),
    )

  def meet(params, state):
    change = jax.tree.map(
      lambda p, a: p.astype(jnp.float32) - a, params, state.anchor
    )
    if feedback:
      mean, residual, comm_state = exchange_with_feedback(
        communicator, change, state.residual, state.communicator, decay
      )
    else:
      residual = state.residual
      mean, _, comm_state = communicator.exchange(change, state.communicator)
    updates, outer_state = outer.update(
      jax.tree.map(jnp.negative, mean), state.outer, state.anchor
    )
    finite = base.all_finite(mean)
    new = state._replace(
      anchor=optax.apply_updates(state.anchor, updates),
      outer=outer_state,
      residual=residual,
      communicator=comm_state,
    )
    new = base.where(finite, new, state)
    new = new._replace(skipped=state.skipped + jnp.where(finite, 0, 1))
    return collectives.vary(new.anchor, axis), new

  return Meeting(axis, init, meet)


def mix_params(communicator: Communicator) -> Meeting:
  """Mixes each worker's parameters with its neighbours'.

  Args:
    communicator: one whose result differs between workers, such as gossip.

  Returns:
    A :class:`Meeting`.
  """

  def init(params):
    return communicator.init(params)

  def meet(params, state):
    mixed, _, state = communicator.exchange(params, state)
    return mixed, state

  return Meeting(communicator.axis, init, meet)
