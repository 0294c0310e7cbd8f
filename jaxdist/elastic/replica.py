"""One replica: inner steps from the parameters it is given, a change back."""

import os
import socket
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdist.elastic.delta import Wire
from jaxdist.elastic.ledger import Tag
from jaxdist.elastic.settings import Agreement
from jaxdist.transforms.base import all_finite, where


class Program(NamedTuple):
  """What a replica does between two rounds, in a JAX world of its own.

  Parameters come as the coordinator has them: whole, in the dtypes that it was
  given, on the default device. What ``step`` returns may lie on any devices.

  Attributes:
    init: ``(params, step) -> state``: all else that a step changes, such as the
      inner optimizer's. Called when a replica begins, at any step.
    step: ``(params, state, step) -> (params, state, loss)``: one inner step,
      compiled, on as many devices as you like. ``step`` counts from 0 over all
      rounds and says what data to take, so that a replica which comes back goes
      on where the others are.
  """

  init: Callable[[optax.Params, int], Any]
  step: Callable[[optax.Params, Any, int], tuple[optax.Params, Any, jax.Array]]


def program(
  loss_fn: Callable[[optax.Params, Any], jax.Array],
  inner: optax.GradientTransformation,
  batches: Callable[[int], Any],
) -> Program:
  """Steps of any Optax optimizer, as :func:`jaxdist.diloco` takes them.

  A step whose gradient, or what it would lead to, is not finite is left out. A
  replica that comes back begins with a new state of the optimizer, but for its
  schedules, which go on at the step where the others are.

  Args:
    loss_fn: ``(params, batch) -> loss``.
    inner: the optimizer.
    batches: from the number of the step to this replica's batch.

  Returns:
    A :class:`Program`.
  """
  inner = optax.with_extra_args_support(inner)

  @jax.jit
  def one(params, state, batch):
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    updates, new_state = inner.update(grads, state, params)
    moved = optax.apply_updates(params, updates)
    finite = all_finite((grads, moved))
    return (*where(finite, (moved, new_state), (params, state)), loss)

  return Program(
    lambda params, step: at_step(inner.init(params), step),
    lambda params, state, step: one(params, state, batches(step)),
  )


# Optax's states that count all steps; not all of them are public.
_SCHEDULES = (
  'ScaleByScheduleState',
  'InjectStatefulHyperparamsState',
  'WrappedScheduleState',
)


def at_step(state: optax.OptState, step: int) -> optax.OptState:
  """Sets the schedules in an optimizer's state to a step.

  What corrects the bias of new moments still counts from 0.
  """
  inside = lambda x: at_step(x, step)
  if isinstance(state, dict):
    return {key: inside(x) for key, x in state.items()}
  if isinstance(state, tuple) and hasattr(state, '_fields'):
    state = type(state)(*map(inside, state))
    if type(state).__name__ in _SCHEDULES:
      state = state._replace(count=jnp.int32(step))
    return state
  return tuple(map(inside, state)) if isinstance(state, tuple) else state


class Replica:
  """Runs a program for rounds; what the actors are.

  Args:
    build: ``replica -> Program``.
    agreement: see :class:`Agreement`.
    replica: its number.
    incarnation: which of the processes that have been this replica it is.
  """

  def __init__(
    self,
    build: Callable[[int], Program],
    agreement: Agreement,
    replica: int,
    incarnation: int,
  ):
    self._build, self._program = build, None
    self._wire = Wire(agreement)
    self._replica, self._incarnation = replica, incarnation
    self._state = None
    self._residual = None
    self._start_over()

  def begin(self, message: bytes) -> dict[str, Any]:
    """Builds the program and compiles all that a round needs.

    Args:
      message: of parameters.

    Returns:
      Where it runs, and the digest of what it agrees to.
    """
    self._program = self._build(self._replica)
    round, anchor = self._wire.unpack_params(message)
    params = self._given(anchor)
    state = self._program.init(params, 0)
    params, *_ = self._program.step(params, state, 0)
    self._encode(anchor, params, round)
    self._start_over()
    return {
      'pid': os.getpid(),
      'host': socket.gethostname(),
      'program': self._wire.digest,
    }

  def work(self, message: bytes) -> bytes:
    """One round.

    If the change is not finite, it is sent all the same, for others to refuse;
    the residual stays, and the next round begins with a new state.

    Args:
      message: of parameters.

    Returns:
      The message of the change.
    """
    round, anchor = self._wire.unpack_params(message)
    every = self._wire.agreement.every
    params, losses = self._given(anchor), []
    first = round * every
    if self._state is None:
      self._state = self._program.init(params, first)
    for step in range(first, first + every):
      params, self._state, loss = self._program.step(params, self._state, step)
      losses.append(loss)
    words, owed, finite = self._encode(anchor, params, round)
    if not finite:
      self._state = None
    tag = Tag(self._replica, self._incarnation, round)
    loss = float(np.mean(jax.device_get(losses)))
    return self._wire.pack_change(tag, words, loss, float(owed))

  def _start_over(self):
    agreement = self._wire.agreement
    self._state = None
    if agreement.feedback:
      self._residual = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.float32), agreement.like
      )

  def _given(self, anchor):
    """The parameters to begin a round with, apart from the anchor."""
    like = self._wire.agreement.like
    return jax.tree.map(lambda a, x: jnp.array(a, x.dtype), anchor, like)

  def _encode(self, anchor, params, round):
    """What is sent of a change; what is dropped of it stays here."""
    params = whole(params)
    beside = lambda x, p: jax.device_put(x, p.sharding)
    anchor = jax.tree.map(beside, anchor, params)
    residual = self._residual
    if residual is not None:
      residual = jax.tree.map(beside, residual, params)
    words, self._residual, owed, finite = self._wire.encode(
      anchor, params, residual, round, self._replica
    )
    return words, owed, finite


def whole(params: optax.Params) -> optax.Params:
  """Parameters on one device; the host's, if they lie on several."""
  params = jax.tree.map(jnp.asarray, params)
  if all(len(p.sharding.device_set) == 1 for p in jax.tree.leaves(params)):
    return params
  return jax.device_put(jax.device_get(params), jax.devices('cpu')[0])
