"""Local SGD: take steps alone, then average the changes."""

from collections.abc import Sequence

import optax

from jaxdist.communicators.base import Communicator
from jaxdist.outer.averaging import average_changes, mix_params
from jaxdist.outer.local_steps import local_steps
from jaxdist.transforms import base


def local_sgd(
  inner: optax.GradientTransformation,
  communicator: Communicator,
  every: int | Sequence[int],
  *,
  feedback: bool | None = None,
  decay: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
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
    inner: any optimizer; its state stays with its worker. Gradients of one
      worker are noisier than their mean, so adaptive optimizers take smaller
      steps in the mean: expect to want a larger learning rate, or an outer
      optimizer (:func:`jaxdist.diloco`).
    communicator: what exchanges the changes.
    every: steps between exchanges, at least 1; or the steps after which workers
      exchange, such as :func:`jaxdist.late_meetings` gives.
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
    >>> import jax, jax.numpy as jnp
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
  if communicator.agrees:
    meeting = average_changes(
      communicator, optax.sgd(1.0), feedback=feedback, decay=decay
    )
  elif feedback or decay != 1.0:
    raise ValueError(
      f'feedback and decay need a communicator with the same result on all '
      f'workers; {communicator!r} remembers by itself what it dropped. Got '
      f'feedback={feedback!r}, decay={decay!r}.'
    )
  else:
    meeting = mix_params(communicator)
  return local_steps(inner, meeting, every)
