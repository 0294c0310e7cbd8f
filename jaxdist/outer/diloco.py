"""DiLoCo: local steps, and an outer optimizer on their mean change.

Streaming DiLoCo: a part of the model at a time, while computing goes on.
"""

from collections.abc import Sequence
from typing import Any

import optax

from jaxdist.communicators.base import Communicator
from jaxdist.outer.averaging import average_changes
from jaxdist.outer.fragments import Pattern
from jaxdist.outer.local_steps import local_steps
from jaxdist.transforms import base


def diloco(
  inner: optax.GradientTransformation,
  outer: optax.GradientTransformation,
  communicator: Communicator,
  every: int | Sequence[int],
  *,
  fragments: int = 1,
  delay: int = 0,
  mix: float = 0.0,
  pattern: Pattern | Any = 'strided',
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

  **Streaming.** With P ``fragments``, each has its own turn in a period: part p
  after steps :math:`(p + 1) H / P`, and every H steps from there. With a
  ``delay`` of :math:`\tau` steps, what is exchanged in a turn at step t is the
  change as it was after step :math:`t - \tau`:

  .. math::

    \Delta_p^{(i)} = a_p - \theta_{p, t - \tau}^{(i)}, \qquad
    \theta_p^{(i)} \gets \alpha \theta_p^{(i)} + (1 - \alpha) a_p

  with ``mix`` for :math:`\alpha`. It is there when the step of the turn begins:
  in the step that :func:`jaxdist.train_step` makes, its transfer lies open
  across the whole forward and backward pass. One step is also as long as a
  transfer can lie open, since a program ends with it: a larger delay only makes
  it staler, as if the link were slower. It costs each worker one more float32
  copy of the parameters, and compiling ``fragments + 1`` steps.

  **On the wire:** what the communicator sends for all parameters, in every
  ``every`` steps; nothing in between. The most in one step is what it sends for
  the largest fragment.

  Args:
    inner: any optimizer; its state stays with its worker and is never reset.
    outer: any optimizer; its state is the same on all workers. The paper's is
      ``optax.sgd(0.7, momentum=0.9, nesterov=True)``, for some hundred rounds
      and more; a handful of rounds wants less momentum.
    communicator: what exchanges the changes; its result agrees.
    every: steps between exchanges of the same parameters, at least 1; or,
      without fragments and delay, the steps after which workers exchange, such
      as :func:`jaxdist.late_meetings` gives.
    fragments: how many parts the parameters have; divides ``every``. Each has
      its own state of the outer optimizer. Leaves are never cut: layers that
      are stacked in one array have one turn.
    delay: steps from looking at the changes to their effect, less than
      ``every / fragments``.
    mix: :math:`\alpha`, the share of its own value that a worker keeps in a
      turn, in [0, 1]. With a delay, 0 drops the steps taken meanwhile; 0.5 is
      the paper's. 1 ignores the others.
    pattern: which leaves are in which fragment. ``'strided'``: layers in turn;
      ``'sequential'``: blocks of consecutive layers; leaves outside of the
      layers fill up the smallest fragments. Or a tree of fragment numbers,
      shaped like the params or a prefix of them.
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

    A quarter of the model at a time, in 4 bits, hidden behind one step:

    >>> tx = jd.diloco(
    ...   inner=optax.adamw(4e-4),
    ...   outer=optax.sgd(0.4, momentum=0.9, nesterov=True),
    ...   communicator=jd.mean('data', jd.float4()),
    ...   every=100, fragments=4, delay=1, mix=0.5,
    ... )

    SparseLoCo (sparse changes in 2 bits, with feedback), and Muon inside and
    outside:

    >>> tx = jd.diloco(
    ...   optax.adamw(4e-4), optax.sgd(1.0),
    ...   jd.mean('data', jd.chained(jd.top_k(0.05), jd.quantize(bits=2))),
    ...   every=30, decay=0.95,
    ... )
    >>> tx = jd.diloco(
    ...   optax.contrib.muon(2e-2), optax.contrib.muon(0.1), jd.mean('data'),
    ...   every=30,
    ... )

  References:
    Douillard et al, `DiLoCo <https://arxiv.org/abs/2311.08105>`_, 2023
    (algorithm 1); Douillard et al, `Streaming DiLoCo with overlapping
    communication <https://arxiv.org/abs/2501.18512>`_, 2025 (algorithm 2)
  """
  base.check_communicator(communicator, agrees=True)
  meeting = average_changes(
    communicator,
    outer,
    feedback=feedback,
    decay=decay,
    fragments=fragments,
    delay=delay,
    mix=mix,
    pattern=pattern,
  )
  return local_steps(inner, meeting, every)
