"""DiLoCo: local steps, and an outer optimizer on their mean change."""

import optax

from jaxdist.communicators.base import Communicator
from jaxdist.outer.local_steps import average_changes, local_steps
from jaxdist.transforms import base


def diloco(
  inner: optax.GradientTransformation,
  outer: optax.GradientTransformation,
  communicator: Communicator,
  every: int,
  *,
  feedback: bool | None = None,
  decay: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
  r"""Takes steps locally; an outer optimizer follows the mean change.

  .. math::

    \theta^{(i)} &\gets \theta^{(i)} + \text{inner}(g^{(i)}) \\
    \text{every H steps:}\quad
    \Delta^{(i)} &= a - \theta^{(i)} + \beta e^{(i)}, \qquad
    a \gets a + \text{outer}\Big(\frac1W \sum_j D(E(\Delta^{(j)}))\Big),
    \qquad \theta^{(i)} \gets a

  with :math:`e^{(i)}` what the code dropped from :math:`\Delta^{(i)}`. With
  ``outer=optax.sgd(1.0)`` it is :func:`jaxdist.local_sgd`; with ``every=1`` and
  SGD inside too, data parallelism.

  **On the wire:** what the communicator sends, every ``every`` steps; nothing
  in between.

  Args:
    inner: any optimizer; its state stays with its worker and is never reset.
    outer: any optimizer; its state is the same on all workers. The paper's is
      ``optax.sgd(0.7, momentum=0.9, nesterov=True)``, for some hundred rounds
      and more; a handful of rounds wants less momentum.
    communicator: what exchanges the changes; its result agrees.
    every: steps between exchanges, at least 1.
    feedback: whether to keep what the code drops and send it next time.
      ``None``: if the code is biased.
    decay: :math:`\beta` in (0, 1]; below 1 forgets old residuals.

  Returns:
    A :class:`optax.GradientTransformationExtraArgs` for the worker view. Its
    parameters drift: :func:`jaxdist.init` keeps one copy for each worker.

  Raises:
    ValueError: if an option is out of range, or workers would get different
      results.

  Examples:
    >>> import jaxdist as jd
    >>> tx = jd.diloco(
    ...   inner=optax.adamw(4e-4),
    ...   outer=optax.sgd(0.7, momentum=0.9, nesterov=True),
    ...   communicator=jd.mean('data', jd.quantize(bits=4)),
    ...   every=100,
    ... )

  References:
    Douillard et al, `DiLoCo <https://arxiv.org/abs/2311.08105>`_, 2023
    (algorithm 1)
  """
  base.check_communicator(communicator, agrees=True)
  meeting = average_changes(communicator, outer, feedback, decay)
  return local_steps(inner, meeting, every)
