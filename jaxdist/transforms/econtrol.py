"""EControl: EF21 with as much of the accumulated error as it can bear."""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from jaxdist.communicators.base import Communicator
from jaxdist.state import PerWorker
from jaxdist.transforms import base
from jaxdist.transforms.error_feedback import zero_residual


class EControlState(NamedTuple):
  """State of :func:`econtrol`.

  Attributes:
    estimate: what all workers know of this worker's gradient: the sum of what
      it sent, in float32, shaped like the params. Each worker's own.
    error: the sum of what the estimate missed so far, likewise.
    mean: the mean of the workers' estimates. The same on all workers.
    communicator: the communicator's.
    skipped: exchanges dropped for a non-finite number. The same on all workers.
    layout: what the params looked like at init.
  """

  estimate: PerWorker
  error: PerWorker
  mean: optax.Updates
  communicator: Any
  skipped: Int32[Array, '']
  layout: base.Layout


def econtrol(
  communicator: Communicator, *, control: float | None = None
) -> optax.GradientTransformationExtraArgs:
  r"""Compresses each gradient's change, and feeds a part of past errors back.

  .. math::

    c^{(i)}_t &= D(E(\eta e^{(i)}_t + g^{(i)}_t - h^{(i)}_t)) \\
    e^{(i)}_{t+1} &= e^{(i)}_t + g^{(i)}_t - h^{(i)}_t - c^{(i)}_t \\
    h^{(i)}_{t+1} &= h^{(i)}_t + c^{(i)}_t, \qquad
    \bar h_{t+1} = \bar h_t + \frac1W \sum_i c^{(i)}_t

  and :math:`\bar h_{t+1}` is the update. The changes make workers that differ
  converge, as in :func:`jaxdist.ef21`, which this is with :math:`\eta = 0`; the
  errors make noise average out over steps and workers, as in
  :func:`jaxdist.error_feedback`. **On the wire:** what the communicator sends.
  With a code that drops nothing it is data parallelism. If a worker's updates
  are not finite, all put out zeros together and keep what they know.

  Args:
    communicator: one whose result is the same on all workers and whose code
      contracts.
    control: :math:`\eta`, at least 0. ``None`` takes the contraction of the
      code. Much above it the errors grow without bound: with top-k, three times
      the contraction diverges at every learning rate. Codes whose contraction
      is a worst case that never happens, such as :func:`jaxdist.sign`, bear
      more.

  Returns:
    A :class:`optax.GradientTransformationExtraArgs` for the worker view.

  Raises:
    ValueError: if workers would get different results, the code does not
      contract, or ``control`` is negative, or missing where the contraction is
      not known.

  Examples:
    >>> import jaxdist as jd
    >>> tx = optax.chain(
    ...   jd.econtrol(jd.mean('data', jd.top_k(0.1))), optax.sgd(0.1)
    ... )

  References:
    Gao et al, `EControl <https://arxiv.org/abs/2311.05645>`_, 2024
  """
  base.check_communicator(communicator, agrees=True)
  base.check_feedback(communicator)
  contraction = communicator.contraction
  if control is None and contraction == 0:
    raise ValueError(
      f'control must be given where the contraction is not known, as for '
      f'{communicator!r}.'
    )
  eta = contraction if control is None else control
  if not eta >= 0:
    raise ValueError(f'control must be at least 0, got {control}.')
  if eta > contraction:
    warnings.warn(
      f'control={control} is above the contraction {contraction:.3g} of '
      f'{communicator!r}: errors can grow without bound.',
      stacklevel=2,
    )

  def init_fn(params):
    return EControlState(
      zero_residual(params, communicator.axis),
      zero_residual(params, communicator.axis),
      base.zeros(params),
      communicator.init(params, feedback=True),
      jnp.zeros((), jnp.int32),
      base.Layout.of(params),
    )

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    base.check_updates(updates, state.layout, communicator.axis)
    estimate, error = state.estimate.value, state.error.value
    change = jax.tree.map(
      lambda g, h: g.astype(jnp.float32) - h, updates, estimate
    )
    mean_change, sent, comm_state = communicator.exchange(
      jax.tree.map(lambda c, e: eta * e + c, change, error), state.communicator
    )
    mean = optax.tree.add(state.mean, mean_change)
    new = state._replace(
      estimate=PerWorker(optax.tree.add(estimate, sent)),
      # The whole error is kept, though only a part of it is sent.
      error=PerWorker(
        jax.tree.map(lambda e, c, s: e + (c - s), error, change, sent)
      ),
      mean=mean,
      communicator=comm_state,
    )
    return base.settle(mean, new, state, like=updates)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
