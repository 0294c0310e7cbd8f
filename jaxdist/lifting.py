"""Optax wrappers around a communicator: what they hold is each worker's own."""

from typing import Any

import jax
import optax

from jaxdist.communicators import collectives
from jaxdist.state import Axis, PerWorker, is_per_worker
from jaxdist.transforms.base import Layout


def lifted(
  tx: optax.GradientTransformation, axis: Axis
) -> optax.GradientTransformationExtraArgs:
  """A transform whose wrappers say which of their state differs by worker.

  What :class:`optax.MultiSteps` around a communicator accumulates are
  gradients before the exchange: they go into a :class:`jaxdist.PerWorker`.
  Behind a communicator it sees the same on all workers, and stays as it is.

  Args:
    tx: any transform.
    axis: name of the axis that the workers lie along.

  Returns:
    The transform; ``init`` raises ValueError for a wrapper that cannot work.
  """
  tx = optax.with_extra_args_support(tx)

  def init_fn(params):
    return _mark(tx.init(params), axis)

  def update_fn(updates, state, params=None, **extra_args):
    updates, state = tx.update(updates, _unmark(state), params, **extra_args)
    return updates, _mark(state, axis)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_wrapper(node: Any) -> bool:
  return isinstance(node, optax.MultiStepsState | optax.ApplyIfFiniteState)


def _communicates(state: Any) -> bool:
  """Whether a transform that owns a communicator left its mark in a state."""
  is_mark = lambda node: isinstance(node, Layout)
  return any(map(is_mark, jax.tree.leaves(state, is_leaf=is_mark)))


def _mark(state, axis):
  def visit(node):
    if isinstance(node, optax.ApplyIfFiniteState):
      if _communicates(node.inner_state):
        raise ValueError(
          'optax.apply_if_finite must not stand around a communicator: a '
          'worker whose gradient is not finite would leave the exchange that '
          'the others wait in. Put it behind, as in optax.chain('
          'jd.error_feedback(...), optax.apply_if_finite(...)).'
        )
      return node._replace(inner_state=_mark(node.inner_state, axis))
    if isinstance(node, optax.MultiStepsState):
      inner = node.inner_opt_state
      if _communicates(inner):
        own = PerWorker(collectives.vary(node.acc_grads, axis))
        node = node._replace(acc_grads=own)
      return node._replace(inner_opt_state=_mark(inner, axis))
    return node

  return jax.tree.map(visit, state, is_leaf=_is_opaque)


def _unmark(state):
  def visit(node):
    if isinstance(node, optax.ApplyIfFiniteState):
      return node._replace(inner_state=_unmark(node.inner_state))
    if isinstance(node, optax.MultiStepsState):
      if is_per_worker(node.acc_grads):
        node = node._replace(acc_grads=node.acc_grads.value)
      return node._replace(inner_opt_state=_unmark(node.inner_opt_state))
    return node

  return jax.tree.map(visit, state, is_leaf=_is_opaque)


def _is_opaque(node: Any) -> bool:
  """What is not looked into: wrappers, and what is each worker's own already.

  Inside a local optimizer everything is.
  """
  return _is_wrapper(node) or is_per_worker(node)
