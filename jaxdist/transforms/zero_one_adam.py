"""0/1 Adam: 1-bit gradients from the start, then local steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int32

from jaxdist.communicators import collectives
from jaxdist.communicators.base import Communicator
from jaxdist.state import Drifts, PerWorker
from jaxdist.transforms import base
from jaxdist.transforms.error_feedback import (
  exchange_with_feedback,
  zero_residual,
)
from jaxdist.transforms.one_bit_adam import precondition, whole_mean


class ZeroOneAdamState(NamedTuple):
  """State of :func:`zero_one_adam`.

  Attributes:
    drifts: marks that parameters differ between workers.
    count: steps so far. The same on all workers.
    next_refresh: the step at which the variance is refreshed next, likewise.
    refreshes: how often it was, likewise.
    nu: variance, in float32, shaped like the params, likewise.
    rate_sum: learning rates of the steps since workers last agreed, likewise.
    mu: momentum. Each worker's own.
    anchor: the parameters that all last agreed on.
    residual: what was dropped from what this worker sent so far.
    communicator: the communicator's.
    skipped: this worker's steps left out for a non-finite number.
    layout: what the params looked like at init.
  """

  drifts: Drifts
  count: Int32[Array, '']
  next_refresh: Int32[Array, '']
  refreshes: Int32[Array, '']
  nu: optax.Updates
  rate_sum: Float32[Array, '']
  mu: PerWorker
  anchor: PerWorker
  residual: PerWorker
  communicator: Any
  skipped: PerWorker
  layout: base.Layout


def zero_one_adam(
  learning_rate: optax.ScalarOrSchedule,
  communicator: Communicator,
  freeze_step: int,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  refreshes: int = 16,
  double_every: int = 1000,
  max_local: int = 16,
) -> optax.GradientTransformationExtraArgs:
  r"""Adam with compressed gradients, and later with compressed local steps.

  Steps before ``freeze_step`` exchange gradients, :math:`m \gets \beta_1 m + (1
  - \beta_1) \bar g`. Most of them are compressed, with feedback, and leave the
  variance :math:`v` alone; it is refreshed, from whole gradients, at the first
  steps and then ever more rarely: the distance doubles after each ``refreshes``
  of them. From ``freeze_step`` on the variance stays, each worker
  steps by its own momentum, and what is exchanged every H steps is the change
  since the last exchange, in the units of a momentum:

  .. math::

    x^{(i)} = (\theta^{(i)} - a) (\sqrt v + \epsilon) + e^{(i)}, \qquad
    \bar u = \frac1W \sum_i D(E(x^{(i)})), \qquad
    e^{(i)} \gets x^{(i)} - D(E(x^{(i)}))

  .. math::

    a \gets a + \frac{\bar u}{\sqrt v + \epsilon}, \qquad \theta^{(i)} \gets a,
    \qquad m^{(i)} \gets -\bar u \Big/ \sum_h \gamma_h

  with H = 1, doubled every ``double_every`` steps up to ``max_local``. Feedback
  starts anew there, as gradients and changes have other units. Moments' bias is
  not corrected.

  **On the wire:** until ``freeze_step`` what the communicator sends, or at a
  refresh a float32 mean; both are listed by :func:`jaxdist.traffic` and not
  counted. Then what the communicator sends, in the end every ``max_local``
  steps. With ``max_local=1`` and a code that drops nothing, all after
  ``freeze_step`` is momentum SGD behind a fixed diagonal. A non-finite gradient
  is left out, by all workers together until ``freeze_step``, then by its own.

  Args:
    learning_rate: a number or a schedule.
    communicator: with the same result on all workers.
    freeze_step: when the variance stays and workers begin to step alone. At
      least 1.
    b1: :math:`\beta_1`.
    b2: :math:`\beta_2`; it counts refreshes, not steps.
    eps: :math:`\epsilon`.
    refreshes: of the variance before their distance doubles. At least 1.
    double_every: steps before H doubles. At least 1.
    max_local: the largest H, a power of two.

  Returns:
    A :class:`optax.GradientTransformationExtraArgs` for the worker view: a
    whole optimizer. Its parameters drift: :func:`jaxdist.init` keeps one copy
    for each worker.

  Raises:
    ValueError: if workers would get different results, the code does not
      contract, or a number is out of range; from ``update``, without params.

  Examples:
    >>> import jaxdist as jd
    >>> tx = jd.zero_one_adam(
    ...   1e-3, jd.mean('data', jd.sign(), 'two_shot'), freeze_step=10_000
    ... )

  References:
    Lu et al, `0/1 Adam <https://arxiv.org/abs/2202.06009>`_, 2022
  """
  base.check_communicator(communicator, agrees=True)
  base.check_feedback(communicator)
  base.check_steps('freeze_step', freeze_step, least=1)
  base.check_steps('refreshes', refreshes, least=1)
  base.check_steps('double_every', double_every, least=1)
  base.check_steps('max_local', max_local, least=1)
  if max_local & (max_local - 1):
    raise ValueError(f'max_local must be a power of two, got {max_local}.')
  base.check_adam(b1, b2, eps)
  axis = communicator.axis

  def init_fn(params):
    zero = jnp.zeros((), jnp.int32)
    anchor = optax.tree.cast(params, jnp.float32)
    return ZeroOneAdamState(
      drifts=Drifts(),
      count=zero,
      next_refresh=zero,
      refreshes=zero,
      nu=base.zeros(params),
      rate_sum=jnp.zeros(()),
      mu=zero_residual(params, axis),
      anchor=PerWorker(collectives.vary(anchor, axis)),
      residual=zero_residual(params, axis),
      communicator=communicator.init(params, feedback=True),
      skipped=PerWorker(collectives.vary(zero, axis)),
      layout=base.Layout.of(params),
    )

  def stepped(params, mu, nu, rate):
    """Parameters after a step, in float32."""
    steps = precondition(mu, nu, eps)
    return jax.tree.map(lambda p, s: p - rate * s, params, steps)

  def momentum(mu, grads):
    return jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, mu, grads)

  def agree(finite, mean_grads, new, params, rate, old):
    """A step by gradients that all know, if they are finite."""
    mu = momentum(old.mu.value, mean_grads)
    moved = stepped(params, mu, new.nu, rate)
    new = new._replace(mu=PerWorker(mu), anchor=PerWorker(moved))
    skipped = PerWorker(old.skipped.value + jnp.where(finite, 0, 1))
    new = base.where(finite, new, old)._replace(skipped=skipped)
    return base.where(finite, moved, params), new

  def refresh(grads, params, rate, state):
    with jax.named_scope('jaxdist.warmup.0'):
      mean_grads = whole_mean(grads, communicator)
    nu = jax.tree.map(
      lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, mean_grads
    )
    finite = base.all_finite((mean_grads, nu))
    done = state.refreshes + 1
    new = state._replace(
      nu=nu,
      refreshes=done,
      next_refresh=state.count + 2 ** (done // refreshes),
    )
    return agree(finite, mean_grads, new, params, rate, state)

  def compressed(grads, params, rate, state):
    with jax.named_scope('jaxdist.warmup.1'):
      mean_grads, residual, comm_state = exchange_with_feedback(
        communicator, grads, state.residual, state.communicator, 1.0
      )
    finite = base.all_finite(mean_grads)
    new = state._replace(residual=residual, communicator=comm_state)
    return agree(finite, mean_grads, new, params, rate, state)

  def alone(grads, params, rate, state):
    finite = base.all_finite(grads)
    mu = momentum(state.mu.value, grads)
    moved = stepped(params, mu, state.nu, rate)
    return base.where(finite, moved, params), state._replace(
      rate_sum=state.rate_sum + rate,
      mu=PerWorker(base.where(finite, mu, state.mu.value)),
      skipped=PerWorker(state.skipped.value + jnp.where(finite, 0, 1)),
    )

  def together(grads, params, rate, state):
    moved, state = alone(grads, params, rate, state)
    anchor = state.anchor.value
    root = jax.tree.map(lambda v: jnp.sqrt(v) + eps, state.nu)
    change = jax.tree.map(lambda p, a, r: (p - a) * r, moved, anchor, root)
    with jax.named_scope(f'jaxdist.every.{max_local}'):
      mean_change, residual, comm_state = exchange_with_feedback(
        communicator, change, state.residual, state.communicator, 1.0
      )
    finite = base.all_finite(mean_change)
    # A schedule may have been at zero: then nothing is known of the momentum.
    inverse = jnp.where(state.rate_sum > 0, 1 / state.rate_sum, 0.0)
    new = state._replace(
      mu=PerWorker(
        collectives.vary(
          jax.tree.map(lambda u: -u * inverse, mean_change), axis
        )
      ),
      anchor=PerWorker(stepped(anchor, mean_change, state.nu, -1.0)),
      residual=residual,
      communicator=comm_state,
    )
    # If it is not finite, all go back to the anchor and begin again.
    state = state._replace(mu=zero_residual(params, axis))
    new = base.where(finite, new, state)._replace(
      rate_sum=jnp.zeros_like(state.rate_sum)
    )
    return new.anchor.value, new

  def update_fn(updates, state, params=None, **extra_args):
    del extra_args
    if params is None:
      raise ValueError(
        'params must be given where parameters drift: '
        'tx.update(updates, state, params).'
      )
    base.check_updates(updates, state.layout, axis)
    count = state.count
    rate = learning_rate(count) if callable(learning_rate) else learning_rate
    rate = jnp.asarray(rate, jnp.float32)
    fresh = (
      zero_residual(params, axis),
      communicator.init(params, feedback=True),
    )
    residual, comm_state = base.where(
      count == freeze_step, fresh, (state.residual, state.communicator)
    )
    state = state._replace(residual=residual, communicator=comm_state)

    since = jnp.maximum(count - freeze_step, 0)
    doublings = jnp.minimum(since // double_every, max_local.bit_length() - 1)
    meet = (since + 1) % 2**doublings == 0
    branch = jnp.where(
      count < freeze_step,
      jnp.where(count >= state.next_refresh, 0, 1),
      jnp.where(meet, 3, 2),
    )
    own = optax.tree.cast(params, jnp.float32)
    new, state = jax.lax.switch(
      branch,
      [refresh, compressed, alone, together],
      optax.tree.cast(updates, jnp.float32),
      collectives.vary(own, axis),
      rate,
      state,
    )
    new = jax.tree.map(lambda x, p: x.astype(p.dtype), new, params)
    return jax.tree.map(
      lambda x, p: x.astype(jnp.float32) - p, new, own
    ), state._replace(count=count + 1)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
