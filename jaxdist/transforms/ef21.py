"""EF21: each worker sends how its gradient differs from what all know of it."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from jaxdist.communicators.base import Communicator
from jaxdist.state import PerWorker
from jaxdist.transforms import base
from jaxdist.transforms.error_feedback import zero_residual


class EF21State(NamedTuple):
  """State of :func:`ef21`.

  Attributes:
    estimate: what all workers know of this worker's gradient: the sum of what
      it sent, in float32, shaped like the params. Each worker's own.
    mean: the mean of the workers' estimates. The same on all workers.
    communicator: the communicator's.
    skipped: exchanges dropped for a non-finite number. The same on all workers.
    layout: what the params looked like at init.
  """

  estimate: PerWorker
  mean: optax.Updates
  communicator: Any
  skipped: Int32[Array, '']
  layout: base.Layout


def ef21(
  communicator: Communicator,
) -> optax.GradientTransformationExtraArgs:
  r"""Compresses the change of each worker's gradient, and adds the changes up.

  .. math::

    c^{(i)}_t = D(E(g^{(i)}_t - h^{(i)}_t)), \qquad
    h^{(i)}_{t+1} = h^{(i)}_t + c^{(i)}_t, \qquad
    \bar h_{t+1} = \bar h_t + \frac1W \sum_i c^{(i)}_t

  and :math:`\bar h_{t+1}` is the update. As the workers' gradients come to
  rest, what is left to send vanishes, however much the workers differ; the
  residual of :func:`jaxdist.error_feedback` does not. **On the wire:** what the
  communicator sends. With a code that drops nothing it is data parallelism. If
  a worker's updates are not finite, all put out zeros together and keep their
  estimates.

  Gradients that are noisy at rest too are never told whole: average each
  worker's over time before they are compressed, which is EF21-SGDM (below), or
  use :func:`jaxdist.econtrol`.

  EF21-W, which weights worker i by :math:`w_i` and compresses :math:`g^{(i)} /
  (W w_i) - h^{(i)}`, takes the same steps for every code that commutes with a
  positive factor, as those of this library do: the weights cancel. What its
  theory gives is the larger safe step of :func:`jaxdist.ef21_stepsize`.

  Args:
    communicator: one whose result is the same on all workers and whose code
      contracts.

  Returns:
    A :class:`optax.GradientTransformationExtraArgs` for the worker view.

  Raises:
    ValueError: if workers would get different results, or the code does not
      contract.

  Examples:
    >>> import jaxdist as jd
    >>> code = jd.top_k(1 / 128, block_size=128)  # One number of 128.
    >>> tx = jd.ef21(jd.mean('data', code))
    >>> def two_steps(g):  # The same gradient twice: it arrives in two parts.
    ...   first, state = tx.update(g, tx.init(g))
    ...   second, state = tx.update(g, state)
    ...   return first, second
    >>> jax.vmap(two_steps, axis_name='data')(jnp.array([[3., 1.], [3., 1.]]))
    (Array([[3., 0.], [3., 0.]], dtype=float32),
     Array([[3., 1.], [3., 1.]], dtype=float32))

    EF21-SGDM:

    >>> tx = optax.chain(
    ...   jd.per_worker(optax.ema(0.9, debias=False)),
    ...   jd.ef21(jd.mean('data', jd.top_k(0.01))),
    ...   optax.sgd(0.1),
    ... )

  References:
    Richtarik et al, `EF21 <https://arxiv.org/abs/2106.05203>`_, 2021; Richtarik
    et al, `Error Feedback Reloaded <https://arxiv.org/abs/2402.10774>`_, 2024
    (EF21-W); Fatkhullin et al, `Momentum Provably Improves Error Feedback!
    <https://arxiv.org/abs/2305.15155>`_, 2023 (EF21-SGDM)
  """
  base.check_communicator(communicator, agrees=True)
  base.check_feedback(communicator)

  def init_fn(params):
    return EF21State(
      zero_residual(params, communicator.axis),
      base.zeros(params),
      communicator.init(params, feedback=True),
      jnp.zeros((), jnp.int32),
      base.Layout.of(params),
    )

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    base.check_updates(updates, state.layout, communicator.axis)
    estimate = state.estimate.value
    change = jax.tree.map(
      lambda g, h: g.astype(jnp.float32) - h, updates, estimate
    )
    mean_change, sent, comm_state = communicator.exchange(
      change, state.communicator
    )
    mean = optax.tree.add(state.mean, mean_change)
    new = state._replace(
      estimate=PerWorker(optax.tree.add(estimate, sent)),
      mean=mean,
      communicator=comm_state,
    )
    return base.settle(mean, new, state, like=updates)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def ef21_stepsize(
  smoothness: float,
  worker_smoothness: Sequence[float],
  contraction: float,
  *,
  mean: Literal['arithmetic', 'quadratic'] = 'arithmetic',
) -> float:
  r"""The learning rate for which EF21 with full gradients provably converges.

  .. math::

    \gamma = \frac{1}{L + \tilde L \, \xi(\delta)}, \qquad
    \xi(\delta) = \frac{1 + \sqrt{1 - \delta}}{\delta} - 1

  with :math:`\tilde L` a mean of the workers' :math:`L_i`: the quadratic one in
  EF21's first analysis; the arithmetic one, at most :math:`\sqrt W` times
  smaller, in EF21-W's, which holds for EF21 too.

  Args:
    smoothness: L, of the mean of the workers' losses.
    worker_smoothness: the workers' own; see
      :func:`jaxdist.estimate_smoothness`.
    contraction: :math:`\delta` of the code, in (0, 1]:
      ``communicator.contraction``.
    mean: ``'arithmetic'`` or ``'quadratic'``.

  Returns:
    The learning rate.

  Raises:
    ValueError: if a number is out of range.

  Examples:
    >>> import jaxdist as jd
    >>> workers = [1.0, 1.0, 1.0, 100.0]
    >>> new = jd.ef21_stepsize(25.75, workers, 0.01)
    >>> old = jd.ef21_stepsize(25.75, workers, 0.01, mean='quadratic')
    >>> round(new / old, 2)
    1.94
  """
  if not 0 < contraction <= 1:
    raise ValueError(f'contraction must be in (0, 1], got {contraction}.')
  if not smoothness > 0:
    raise ValueError(f'smoothness must be positive, got {smoothness}.')
  if not worker_smoothness or not min(worker_smoothness) > 0:
    raise ValueError(
      f'worker_smoothness must be positive for each worker, got '
      f'{worker_smoothness}.'
    )
  count = len(worker_smoothness)
  if mean == 'arithmetic':
    typical = math.fsum(worker_smoothness) / count
  elif mean == 'quadratic':
    typical = math.sqrt(math.fsum(x * x for x in worker_smoothness) / count)
  else:
    raise ValueError(f"mean must be 'arithmetic' or 'quadratic', got {mean!r}.")
  xi = (1 + math.sqrt(1 - contraction)) / contraction - 1
  return 1 / (smoothness + typical * xi)
