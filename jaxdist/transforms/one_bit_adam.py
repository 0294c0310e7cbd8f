"""1-bit Adam: learn the variance whole, then compress the momentum."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from jaxdist.communicators.base import Communicator
from jaxdist.communicators.uncompressed import uncompressed
from jaxdist.state import PerWorker
from jaxdist.transforms import base
from jaxdist.transforms.error_feedback import (
  exchange_with_feedback,
  zero_residual,
)


class CompressedMomentsState(NamedTuple):
  """Adam's moments, of which one is exchanged in two ways.

  Attributes:
    count: steps so far. The same on all workers.
    mu: momentum, in float32, shaped like the params. The same on all workers.
    nu: variance, likewise.
    residual: what was dropped from the momenta sent so far. Each worker's own.
    communicator: the communicator's.
    skipped: exchanges dropped for a non-finite number. The same on all workers.
    layout: what the params looked like at init.
  """

  count: Int32[Array, '']
  mu: optax.Updates
  nu: optax.Updates
  residual: PerWorker
  communicator: Any
  skipped: Int32[Array, '']
  layout: base.Layout


def one_bit_adam(
  learning_rate: optax.ScalarOrSchedule,
  communicator: Communicator,
  warmup_steps: int,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
  r"""Adam that stops to learn the variance and then compresses the momentum.

  For ``warmup_steps`` it is Adam on the mean gradient, without correction of
  the moments' bias. Then the variance :math:`v` stays as it is, and

  .. math::

    x^{(i)} = \beta_1 m + (1 - \beta_1) g^{(i)} + e^{(i)}, \qquad
    m \gets \frac1W \sum_i D(E(x^{(i)})), \qquad
    e^{(i)} \gets x^{(i)} - D(E(x^{(i)}))

  In both phases :math:`\theta \gets \theta - \gamma (m / (\sqrt v + \epsilon) +
  \lambda \theta)`. Compressing the momentum needs a variance that does not
  move: it would learn the noise of the code. Numbers without a gradient during
  the warm-up are left where they are; of their variance nothing is known.

  **On the wire:** a float32 mean in the warm-up, which
  :func:`jaxdist.traffic` lists and does not count; then what the communicator
  sends. With a code that drops nothing it is momentum SGD behind a fixed
  diagonal. If a worker's updates are not finite, all put out zeros together and
  keep their moments.

  Args:
    learning_rate: a number or a schedule.
    communicator: for the momentum, with the same result on all workers. The
      paper's is ``jd.mean(axis, jd.sign(), 'two_shot')`` with one scale a
      tensor that keeps its norm; here it is one a block, of the mean magnitude,
      with which feedback stays bounded for any momentum.
    warmup_steps: steps before the variance stays; the paper takes 15 to 20% of
      the training. At least 1.
    b1: :math:`\beta_1`.
    b2: :math:`\beta_2`. The variance should have come to rest in the warm-up:
      it forgets over about 1 / (1 - b2) steps.
    eps: :math:`\epsilon`. A code gives numbers of almost no variance the
      magnitude of their block: if the loss jumps after the warm-up, raise it.
    weight_decay: :math:`\lambda`.

  Returns:
    A :class:`optax.GradientTransformationExtraArgs` for the worker view: a
    whole optimizer, as :func:`optax.adamw`.

  Raises:
    ValueError: if workers would get different results, the code does not
      contract, or a number is out of range.

  Examples:
    >>> import jaxdist as jd
    >>> tx = jd.one_bit_adam(
    ...   1e-3, jd.mean('data', jd.sign(), 'two_shot'), warmup_steps=2000
    ... )

  References:
    Tang et al, `1-bit Adam <https://arxiv.org/abs/2102.02888>`_, 2021
  """
  base.check_communicator(communicator, agrees=True)
  base.check_feedback(communicator)
  base.check_steps('warmup_steps', warmup_steps, least=1)
  base.check_adam(b1, b2, eps)

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    base.check_updates(updates, state.layout, communicator.axis)
    grads = optax.tree.cast(updates, jnp.float32)
    new = exchange_moments(communicator, warmup_steps, (b1, b2), grads, state)
    direction = precondition(new.mu, new.nu, eps)
    return base.settle(direction, new, state, updates, watched=new.nu)

  return optax.chain(
    optax.GradientTransformationExtraArgs(
      init_moments(communicator), update_fn
    ),
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_learning_rate(learning_rate),
  )


def init_moments(communicator: Communicator):
  """An ``init`` of :class:`CompressedMomentsState`."""

  def init_fn(params):
    return CompressedMomentsState(
      jnp.zeros((), jnp.int32),
      base.zeros(params),
      base.zeros(params),
      zero_residual(params, communicator.axis),
      communicator.init(params, feedback=True),
      jnp.zeros((), jnp.int32),
      base.Layout.of(params),
    )

  return init_fn


def whole_mean(tree: Any, communicator: Communicator) -> Any:
  """The mean over its workers in float32, which needs no state."""
  dense = uncompressed(communicator)
  return dense.exchange(tree, dense.init(tree))[0]


def exchange_moments(
  communicator: Communicator,
  warmup_steps: int,
  betas: tuple[float, float],
  grads: optax.Updates,
  state: Any,
  scales: optax.Updates | None = None,
) -> Any:
  """One step of both moments, by whichever phase it is in.

  Args:
    communicator: of the momentum after the warm-up.
    warmup_steps: how long that is.
    betas: of the momentum and of the variance.
    grads: this worker's, in float32.
    state: before the step: :class:`CompressedMomentsState`, or a NamedTuple
      with its fields and others.
    scales: what to multiply the momentum by where it is encoded, and to divide
      it by where it is decoded, as one number a leaf.

  Returns:
    The state after it.
  """
  b1, b2 = betas

  def warm_up(state):
    with jax.named_scope('jaxdist.warmup.0'):
      mean_grad = whole_mean(grads, communicator)
    mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, mean_grad)
    nu = jax.tree.map(
      lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, mean_grad
    )
    return state._replace(mu=mu, nu=nu)

  def compressed(state):
    own = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
    if scales is not None:
      own = jax.tree.map(jnp.multiply, own, scales)
    with jax.named_scope('jaxdist.every.1'):
      mu, residual, comm_state = exchange_with_feedback(
        communicator, own, state.residual, state.communicator, 1.0
      )
    if scales is not None:
      mu = jax.tree.map(jnp.divide, mu, scales)
    return state._replace(mu=mu, residual=residual, communicator=comm_state)

  new = jax.lax.cond(state.count < warmup_steps, warm_up, compressed, state)
  return new._replace(count=state.count + 1)


def precondition(
  mu: optax.Updates, nu: optax.Updates, eps: float
) -> optax.Updates:
  """Momentum over the root of the variance; zero where that is zero."""
  return jax.tree.map(
    lambda m, v: jnp.where(v > 0, m / (jnp.sqrt(v) + eps), 0.0 * m), mu, nu
  )
