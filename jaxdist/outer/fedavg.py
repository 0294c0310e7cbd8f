"""Federated averaging: some clients at a time, of unequal weight."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from jaxdist.communicators import collectives
from jaxdist.communicators.base import Communicator
from jaxdist.outer.averaging import average_changes
from jaxdist.outer.local_steps import local_steps
from jaxdist.outer.participation import check_participation, drawn_weight
from jaxdist.transforms import base


def fedavg(
  inner: optax.GradientTransformation,
  outer: optax.GradientTransformation,
  communicator: Communicator,
  every: int | Sequence[int],
  *,
  participation: float = 1.0,
  weights: Sequence[float] | None = None,
  feedback: bool | None = None,
  decay: float = 1.0,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Some workers take steps locally; a server follows their weighted change.

  .. math::

    \theta^{(i)} &\gets \theta^{(i)} + \text{inner}(g^{(i)}), \quad i \in S \\
    \text{every H steps:}\quad
    a &\gets a + \text{outer}\Big(\frac{W}{m} \sum_{i \in S} p_i\,
      (a - \theta^{(i)})\Big), \qquad \theta^{(i)} \gets a

  with :math:`S` the m of W workers that take part in this round, drawn without
  replacement from a seed that all share, and :math:`p_i` the weights, whose sum
  is 1. In the mean over draws the server sees the weighted mean of all, which
  no one has to know: each worker scales its own change before it is encoded.
  With all workers and equal weights it is :func:`jaxdist.diloco`.

  The server is the outer optimizer: ``optax.sgd(1.0)`` is FedAvg,
  ``optax.sgd(1.0, momentum=0.9)`` FedAvgM, and ``optax.adagrad``,
  ``optax.adam`` and ``optax.yogi`` are FedAdagrad, FedAdam and FedYogi (whose
  paper has no bias correction, and an ``eps`` of about 1e-3).

  **On the wire:** what the communicator sends, every ``every`` steps, also from
  workers that do not take part: they send zeros. They take no steps, and keep
  their inner state and residual.

  Args:
    inner: any optimizer; its state stays with its worker.
    outer: any optimizer; its state is the same on all workers.
    communicator: what exchanges the changes; its result agrees.
    every: steps in a round, at least 1; or the steps after which rounds end.
    participation: the share of workers that take part in a round, in (0, 1]; m
      is rounded, and at least 1.
    weights: one positive number for each worker, such as its number of
      examples; ``None`` for equal ones.
    feedback: whether to keep what the code drops and send it next time.
      ``None``: if the code is biased.
    decay: of the residual, in (0, 1].
    seed: of the draws of participants.

  Returns:
    A :class:`optax.GradientTransformationExtraArgs` for the worker view. Its
    parameters drift: :func:`jaxdist.init` keeps one copy for each worker.

  Raises:
    ValueError: if an option is out of range, workers would get different
      results, or (when ``init`` runs) ``weights`` are not one for each worker.

  Examples:
    >>> import jaxdist as jd
    >>> tx = jd.fedavg(
    ...   optax.sgd(0.1), optax.adam(1e-2, eps=1e-3), jd.mean('data'), every=20,
    ...   participation=0.5, weights=[100.0, 50.0, 50.0, 200.0],
    ... )

  References:
    McMahan et al, `Communication-Efficient Learning of Deep Networks from
    Decentralized Data <https://arxiv.org/abs/1602.05629>`_, 2017 (algorithm 1);
    Reddi et al, `Adaptive Federated Optimization
    <https://arxiv.org/abs/2003.00295>`_, 2021 (algorithm 2)
  """
  base.check_communicator(communicator, agrees=True)
  check_participation(participation)
  if weights is not None and not all(weight > 0 for weight in weights):
    raise ValueError(f'weights must be positive, got {list(weights)}.')
  drawn = drawn_weight(communicator.axis, participation, seed)

  def share(count):
    """This worker's weight in a round, of mean 1 over workers and draws."""
    if weights is None:
      return drawn(count)
    workers = collectives.axis_size(communicator.axis)
    if len(weights) != workers:
      raise ValueError(
        f'weights must have one entry for each of {workers} workers, got '
        f'{len(weights)}.'
      )
    shares = jnp.array(weights, jnp.float32) * (workers / sum(weights))
    return drawn(count) * shares[jax.lax.axis_index(communicator.axis)]

  is_plain = participation == 1 and weights is None
  meeting = average_changes(
    communicator,
    outer,
    feedback=feedback,
    decay=decay,
    share=None if is_plain else share,
  )

  def init(params):
    if not is_plain:
      share(0)  # Refuses weights that do not fit the number of workers.
    return meeting.init(params)

  return local_steps(inner, meeting._replace(init=init), every)
