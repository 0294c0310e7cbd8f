"""Local steps: workers drift apart, and meet every few steps."""

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


class LocalSgdState(NamedTuple):
  """State of :func:`local_sgd`.

  Attributes:
    drifts: marks that parameters differ between workers.
    count: steps so far. The same on all workers.
    anchor: the parameters that all last agreed on, in float32; ``None`` where
      the communicator's results do not agree. The same on all workers.
    inner: the inner optimizer's state. Each worker's own.
    residual: what was dropped from the changes sent so far; ``None`` without
      feedback. Each worker's own.
    communicator: the communicator's.
    skipped: this worker's steps dropped for a non-finite gradient.
    layout: what the params looked like at init.
  """

  drifts: Drifts
  count: Int32[Array, '']
  anchor: optax.Params | None
  inner: PerWorker
  residual: PerWorker
  communicator: Any
  skipped: PerWorker
  layout: base.Layout


def local_sgd(
  inner: optax.GradientTransformation,
  communicator: Communicator,
  every: int,
  *,
  feedback: bool | None = None,
  decay: float = 1.0,
) -> optax.GradientTransformation:
  r"""Takes steps locally and exchanges the change of every few steps.

  .. math::

    \theta^{(i)} &\gets \theta^{(i)} + \text{inner}(g^{(i)}) \\
    \text{every H steps:}\quad
    x^{(i)} &= \theta^{(i)} - a + \beta e^{(i)}, \qquad
    a \gets a + \frac1W \sum_j D(E(x^{(j)})), \\
    e^{(i)} &\gets x^{(i)} - D(E(x^{(i)})), \qquad \theta^{(i)} \gets a

  where the anchor :math:`a` holds the parameters that all last agreed on. With
  ``every=1``, an identity code and SGD inside it is data parallelism. With
  :func:`jaxdist.gossip`, whose results do not agree, there is no anchor: the
  parameters themselves are mixed with the neighbours'.

  **On the wire:** what the communicator sends, every ``every`` steps; nothing
  in between. A worker whose gradient is not finite leaves out that local step;
  if a change is not finite, all workers go back to the anchor together.

  Args:
    inner: any optimizer; its state stays with its worker.
    communicator: what exchanges the changes.
    every: steps between exchanges, at least 1.
    feedback: whether to keep what the code drops and send it next time.
      ``None``: if the code is biased and the communicator agrees.
    decay: :math:`\beta` in (0, 1]; below 1 forgets old residuals.

  Returns:
    A :class:`optax.GradientTransformationExtraArgs` for the worker view. Its
    parameters drift: :func:`jaxdist.init` keeps one copy for each worker.

  Raises:
    ValueError: if an option is out of range, or feedback cannot work with this
      communicator.

  Examples:
    >>> import jaxdist as jd
    >>> tx = jd.local_sgd(optax.sgd(1.0), jd.mean('data'), every=2)
    >>> def two_steps(grad):
    ...   params, path = jnp.zeros(1), []
    ...   state = tx.init(params)
    ...   for _ in range(2):
    ...     updates, state = tx.update(grad, state, params)
    ...     params = optax.apply_updates(params, updates)
    ...     path.append(params)
    ...   return jnp.concatenate(path)
    >>> jax.vmap(two_steps, axis_name='data')(jnp.array([[-1.0], [-3.0]]))
    Array([[1., 4.],
           [3., 4.]], dtype=float32)

  References:
    Stich, `Local SGD Converges Fast and Communicates Little
    <https://arxiv.org/abs/1805.09767>`_, 2019; Basu et al, `Qsparse-local-SGD
    <https://arxiv.org/abs/1906.02367>`_, 2019 (algorithm 1, with feedback)
  """
  base.check_communicator(communicator, agrees=False)
  if not isinstance(every, int) or every < 1:
    raise ValueError(f'every must be an integer of at least 1, got {every!r}.')
  if feedback is None:
    feedback = communicator.agrees and not communicator.unbiased
  if feedback and not communicator.agrees:
    raise ValueError(
      f'feedback needs a communicator with the same result on all workers; '
      f'{communicator!r} has its own memory of what it dropped.'
    )
  if feedback:
    base.check_feedback(communicator, decay)
  elif decay != 1.0:
    raise ValueError(f'decay without feedback does nothing, got {decay}.')
  inner = optax.with_extra_args_support(inner)
  axis = communicator.axis

  def init_fn(params):
    own = collectives.vary(params, axis)
    to_float32 = lambda x: x.astype(jnp.float32)
    return LocalSgdState(
      drifts=Drifts(),
      count=jnp.zeros((), jnp.int32),
      anchor=jax.tree.map(to_float32, params) if communicator.agrees else None,
      inner=PerWorker(inner.init(own)),
      residual=(zero_residual(params, axis) if feedback else PerWorker(None)),
      communicator=communicator.init(params, feedback=feedback),
      skipped=PerWorker(
        collectives.vary(jnp.zeros((), jnp.int32), axis), 'mean'
      ),
      layout=base.Layout.of(params),
    )

  def exchange_changes(params, state):
    """All workers go to the anchor plus the mean of their changes."""
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
    new = state._replace(
      anchor=jax.tree.map(jnp.add, state.anchor, mean),
      residual=residual,
      communicator=comm_state,
    )
    new = base.where(base.all_finite(mean), new, state)
    return collectives.vary(new.anchor, axis), new

  def exchange_params(params, state):
    """Each worker mixes its parameters with its neighbours'."""
    mixed, _, comm_state = communicator.exchange(params, state.communicator)
    return mixed, state._replace(communicator=comm_state)

  def update_fn(updates, state, params=None, **extra_args):
    if params is None:
      raise ValueError(
        'params must be given to local_sgd.update, which exchanges their '
        'change: tx.update(updates, state, params).'
      )
    state.layout.check(updates)
    finite = base.all_finite(updates)
    steps, inner_state = inner.update(
      updates, state.inner.value, params, **extra_args
    )
    moved = optax.apply_updates(params, steps)
    moved = base.where(finite, moved, params)
    state = state._replace(
      count=state.count + 1,
      inner=PerWorker(base.where(finite, inner_state, state.inner.value)),
      skipped=PerWorker(state.skipped.value + jnp.where(finite, 0, 1)),
    )

    def meet(moved, state):
      with jax.named_scope(f'jaxdist.every.{every}'):
        exchange = exchange_changes if communicator.agrees else exchange_params
        new, state = exchange(moved, state)
      to_dtype = lambda x, p: x.astype(p.dtype)
      return jax.tree.map(to_dtype, new, moved), state

    if every == 1:
      new, state = meet(moved, state)
    else:
      new, state = jax.lax.cond(
        state.count % every == 0,
        meet,
        lambda moved, state: (moved, state),
        moved,
        state,
      )
    # In float32, so that params + change is the new value in low precision too.
    change = jax.tree.map(
      lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32), new, params
    )
    return change, state

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
