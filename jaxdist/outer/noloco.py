"""NoLoCo: an outer step with one partner at a time, and no all-reduce."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdist.communicators import collectives
from jaxdist.communicators.base import Communicator
from jaxdist.outer.local_steps import Meeting, local_steps
from jaxdist.state import PerWorker
from jaxdist.transforms import base


class NoLoCoState(NamedTuple):
  """State of the outer step of :func:`noloco`.

  Attributes:
    slow: the parameters after the last outer step, in float32. Each worker's
      own.
    momentum: the last outer step, in float32. Each worker's own.
    pairing: the communicator's state for each tree that it exchanges.
  """

  slow: PerWorker
  momentum: PerWorker
  pairing: tuple[Any, ...]


def noloco(
  inner: optax.GradientTransformation,
  every: int | Sequence[int],
  *,
  pairing: Communicator,
  learning_rate: float = 0.7,
  momentum: float = 0.5,
  consensus: float | None = None,
) -> optax.GradientTransformationExtraArgs:
  r"""Takes steps locally; an outer step follows the mean of a pair.

  .. math::

    \theta_i &\gets \theta_i + \text{inner}(g_i) \\
    \text{every H steps:}\quad
    \delta_i &\gets \alpha \delta_i
      + \beta\, \overline{(\theta - \phi)} + \gamma (\bar\phi - \phi_i), \qquad
    \phi_i \gets \phi_i + \delta_i, \qquad \theta_i \gets \phi_i

  with means over worker i and its partner of this round. There is no anchor
  that all share: what pulls the workers' slow parameters :math:`\phi_i`
  together is the last term. The mean over all workers moves as if all had
  exchanged with all. With the mean of all for ``pairing`` the last term
  vanishes, and it is DiLoCo with heavy-ball momentum; with ``momentum=0`` and
  ``learning_rate=1``, pairs average their parameters.

  **On the wire:** what ``pairing`` sends for the parameters once in ``every``
  steps, or twice if ``consensus`` is not the learning rate. With
  ``jd.gossip(axis, 'random_pairs')`` that is one ppermute; no all-reduce
  anywhere.

  Args:
    inner: any optimizer; its state stays with its worker.
    every: steps between outer steps, at least 1; or the steps after which they
      are taken, such as :func:`jaxdist.late_meetings` gives.
    pairing: who meets whom; the paper's is
      ``jd.gossip(axis, 'random_pairs')``.
    learning_rate: :math:`\beta`.
    momentum: :math:`\alpha` in [0, 1).
    consensus: :math:`\gamma`; ``None`` for the learning rate, where only
      :math:`\theta` must be sent.

  Returns:
    A :class:`optax.GradientTransformationExtraArgs` for the worker view. Its
    parameters drift: :func:`jaxdist.init` keeps one copy for each worker.

  Raises:
    ValueError: if an option is out of range, or the differences between
      workers would grow.

  Examples:
    >>> import jaxdist as jd
    >>> tx = jd.noloco(
    ...   optax.adamw(4e-4), every=50,
    ...   pairing=jd.gossip('data', 'random_pairs'),
    ... )

  References:
    Kolehmainen et al, `NoLoCo <https://arxiv.org/abs/2506.10911>`_, 2025
    (the applied step has no look-ahead, as in its authors' code)
  """
  base.check_communicator(pairing, agrees=False)
  gamma = learning_rate if consensus is None else consensus
  _check(learning_rate, momentum, gamma, pairing)
  is_short = gamma == learning_rate
  axis = pairing.axis

  def init(params):
    slow = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    slow = collectives.vary(slow, axis)
    zeros = optax.tree.zeros_like(slow)
    return NoLoCoState(
      PerWorker(slow),
      PerWorker(zeros),
      tuple(pairing.init(slow) for _ in range(1 if is_short else 2)),
    )

  def exchange(tree, state):
    mean, _, state = pairing.exchange(tree, state)
    return collectives.vary(mean, axis), state

  def meet(params, state, turn):
    del turn
    slow = state.slow.value
    fast = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    if is_short:
      mean, pairing_state = exchange(fast, state.pairing[0])
      pull = jax.tree.map(lambda m, s: gamma * (m - s), mean, slow)
      pairing_states = (pairing_state,)
    else:
      change = jax.tree.map(jnp.subtract, fast, slow)
      change, first = exchange(change, state.pairing[0])
      mean, second = exchange(slow, state.pairing[1])
      pull = jax.tree.map(
        lambda d, m, s: learning_rate * d + gamma * (m - s), change, mean, slow
      )
      pairing_states = (first, second)
    step = jax.tree.map(
      lambda d, p: momentum * d + p, state.momentum.value, pull
    )
    slow = jax.tree.map(jnp.add, slow, step)
    return slow, NoLoCoState(PerWorker(slow), PerWorker(step), pairing_states)

  return local_steps(inner, Meeting(axis, init, meet), every)


def spread_factor(momentum: float, consensus: float) -> float:
  r"""By how much the spread between workers grows in a round of random pairs.

  The largest eigenvalue of the map of :math:`E e^2, E \delta^2, E e \delta`,
  for deviations :math:`e` of slow parameters from their mean, where half of a
  deviation is left in the mean of a pair.
  """
  pull = consensus / 2
  # Rows: what becomes of each moment, as a combination of the three.
  step = np.array(
    [consensus * pull, momentum**2, -2 * momentum * pull],
  )
  cross = np.array([-pull, 0, momentum]) + step
  spread = np.array([1 - 2 * pull, 0, 2 * momentum]) + step
  return float(max(abs(np.linalg.eigvals(np.stack([spread, step, cross])))))


def _check(learning_rate, momentum, gamma, pairing):
  for name, value in (('learning_rate', learning_rate), ('consensus', gamma)):
    if value < 0:
      raise ValueError(f'{name} must be at least 0, got {value}.')
  if not 0 <= momentum < 1:
    raise ValueError(f'momentum must be in [0, 1), got {momentum}.')
  if pairing.agrees or gamma == 0:
    return
  factor = spread_factor(momentum, gamma)
  if factor >= 1:
    raise ValueError(
      f'consensus (the learning rate, if it is not given) is too large for '
      f'this momentum: differences between workers would grow '
      f'{factor:.3g}-fold in a round. Got consensus={gamma} and '
      f'momentum={momentum}.'
    )
