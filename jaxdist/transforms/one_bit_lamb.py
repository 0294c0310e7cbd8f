"""1-bit LAMB: compressed momenta, and trust ratios that go on adapting."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from jaxdist.communicators import collectives
from jaxdist.communicators.base import Communicator
from jaxdist.state import PerWorker
from jaxdist.transforms import base
from jaxdist.transforms.one_bit_adam import (
  exchange_moments,
  init_moments,
  precondition,
)

# The paper's, and its implementation's.
_RATIO_DECAY = 0.9
_RATIO_LIMITS = (0.01, 10.0)
_FACTOR_LIMITS = (0.5, 4.0)
_FACTOR_CHANGE = 0.1


class OneBitLambState(NamedTuple):
  """State of :func:`one_bit_lamb`.

  Attributes:
    count: as in :class:`CompressedMomentsState`, and so are the next six.
    mu: momentum.
    nu: variance.
    residual: of the momenta.
    communicator: the communicator's.
    skipped: exchanges dropped.
    layout: of the params.
    fresh_nu: a variance that goes on, from the momenta that arrive. The same
      on all workers, and so is all that follows.
    ratio: the moving average of each leaf's trust ratio in the warm-up.
    factor: what each leaf's ratio was last multiplied by.
    scale: what brings each leaf's momentum to the scale of the others.
  """

  count: Int32[Array, '']
  mu: optax.Updates
  nu: optax.Updates
  residual: PerWorker
  communicator: Any
  skipped: Int32[Array, '']
  layout: base.Layout
  fresh_nu: optax.Updates
  ratio: Any
  factor: Any
  scale: Any


def one_bit_lamb(
  learning_rate: optax.ScalarOrSchedule,
  communicator: Communicator,
  warmup_steps: int,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-6,
  weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
  r"""LAMB with the momentum compressed, as :func:`jaxdist.one_bit_adam`.

  The moments are those of 1-bit Adam: two phases, of which the second keeps the
  variance :math:`v`. A leaf's step is its direction :math:`d = m / (\sqrt v +
  \epsilon) + \lambda \theta` times a trust ratio. In the warm-up that is LAMB's

  .. math:: r = \operatorname{clip}(\|\theta\| / \|d\|, 0.01, 10)

  with moving average :math:`\bar r` (decay 0.9). Norms of compressed momenta
  say little; later the ratio is :math:`\bar r f`, with

  .. math::

    f = \operatorname{clip}\Big(\max \frac{\sqrt v + \epsilon}
    {\sqrt{\tilde v} + \epsilon}, 0.5, 4\Big)

  and :math:`\tilde v` a variance that goes on from the gradients that the
  momenta imply, :math:`(m_t - \beta_1 m_{t-1}) / (1 - \beta_1)`; f changes by
  at most a tenth a step. With weight decay only the adaptive part of the
  direction is scaled by it. So that one block of a code may span leaves, each
  leaf's momentum is multiplied where it is encoded by what makes its root mean
  square at the end of the warm-up that of the mean leaf.

  **On the wire:** as :func:`jaxdist.one_bit_adam`; ratios cost nothing, since
  all that they are made of is the same on all workers. (In a ``shard_map`` of
  your own where params count as varying, three numbers a leaf say that their
  norms do not.)

  Args:
    learning_rate: a number or a schedule.
    communicator: for the momentum, with the same result on all workers.
    warmup_steps: steps before the variance stays. At least 1.
    b1: :math:`\beta_1`.
    b2: :math:`\beta_2`.
    eps: :math:`\epsilon`.
    weight_decay: :math:`\lambda`.

  Returns:
    A :class:`optax.GradientTransformationExtraArgs` for the worker view: a
    whole optimizer, as :func:`optax.lamb`.

  Raises:
    ValueError: if workers would get different results, the code does not
      contract, or a number is out of range; from ``update``, without params.

  Examples:
    >>> import jaxdist as jd
    >>> tx = jd.one_bit_lamb(
    ...   1e-2, jd.mean('data', jd.sign(), 'two_shot'), warmup_steps=2000
    ... )

  References:
    Li et al, `1-bit LAMB <https://arxiv.org/abs/2104.06069>`_, 2021
  """
  base.check_communicator(communicator, agrees=True)
  base.check_feedback(communicator)
  base.check_steps('warmup_steps', warmup_steps, least=1)
  base.check_adam(b1, b2, eps)
  init_both = init_moments(communicator)

  def init_fn(params):
    fill = lambda value: jax.tree.map(
      lambda _: jnp.full((), value, jnp.float32), params
    )
    return OneBitLambState(
      *init_both(params), base.zeros(params), fill(0.0), fill(1.0), fill(1.0)
    )

  def update_fn(updates, state, params=None, **extra_args):
    del extra_args
    if params is None:
      raise ValueError(
        'params must be given, whose norms LAMB needs: tx.update(updates, '
        'state, params).'
      )
    base.check_updates(updates, state.layout, communicator.axis)
    grads = optax.tree.cast(updates, jnp.float32)
    params = optax.tree.cast(params, jnp.float32)
    new = exchange_moments(
      communicator, warmup_steps, (b1, b2), grads, state, state.scale
    )
    adaptive, new = base.settle(
      precondition(new.mu, new.nu, eps), new, state, grads, watched=new.nu
    )
    good = new.skipped == state.skipped
    direction = jax.tree.map(
      lambda d, p: d + weight_decay * p, adaptive, params
    )
    norms = _known_to_agree(
      [jax.tree.map(_norm, x) for x in (params, adaptive, direction)],
      communicator.axis,
    )
    warming = state.count < warmup_steps

    # In the warm-up the ratio is fresh, and all else is got ready for its end.
    trust = jax.tree.map(_trust_ratio, norms[0], norms[2])
    ratio = jax.tree.map(
      lambda r, t: jnp.where(
        warming, _RATIO_DECAY * r + (1 - _RATIO_DECAY) * t, r
      ),
      state.ratio,
      trust,
    )
    fresh_nu = base.where(
      warming,
      new.nu,
      jax.tree.map(
        lambda v, old, m: b2 * v + (1 - b2) * ((m - b1 * old) / (1 - b1)) ** 2,
        state.fresh_nu,
        state.mu,
        new.mu,
      ),
    )
    factor = jax.tree.map(
      lambda f, v, fresh, a, d: jnp.where(
        warming, 1.0, _next_factor(f, v, fresh, eps, a, d)
      ),
      state.factor,
      new.nu,
      fresh_nu,
      norms[1],
      norms[2],
    )
    scale = base.where(warming, _equal_scales(new.mu), state.scale)
    steps = jax.tree.map(
      lambda t, r, f, d, u: jnp.where(
        good, jnp.where(warming, t, r * f) * d, 0
      ).astype(u.dtype),
      trust,
      ratio,
      factor,
      direction,
      updates,
    )
    return steps, new._replace(
      fresh_nu=base.where(good, fresh_nu, state.fresh_nu),
      ratio=base.where(good, ratio, state.ratio),
      factor=base.where(good, factor, state.factor),
      scale=base.where(good, scale, state.scale),
    )

  return optax.chain(
    optax.GradientTransformationExtraArgs(init_fn, update_fn),
    optax.scale_by_learning_rate(learning_rate),
  )


def _norm(x):
  return jnp.sqrt(jnp.sum(x * x))


def _known_to_agree(numbers, axis):
  """Numbers that are equal on all workers, as such.

  Params come as varying to who differentiates by them in a ``shard_map`` of
  their own. A small all-reduce says that their norms do not; elsewhere there is
  nothing to say.
  """
  leaves = jax.tree.leaves(numbers)
  if not any(collectives.differs_along(x, axis) for x in leaves):
    return numbers
  return jax.lax.pmean(collectives.vary(numbers, axis), axis)


def _trust_ratio(p, d):
  """LAMB's, from norms; one where there is nothing to compare."""
  ratio = jnp.where((p > 0) & (d > 0), p / d, 1.0)
  return jnp.clip(ratio, *_RATIO_LIMITS)


def _equal_scales(mu):
  """Factors that give all leaves the root mean square of the mean leaf."""
  rms = jax.tree.map(lambda m: _norm(m) / max(1, m.size) ** 0.5, mu)
  filled = [
    r for r, m in zip(*map(jax.tree.leaves, (rms, mu)), strict=True) if m.size
  ]
  typical = sum(filled) / max(1, len(filled))
  return jax.tree.map(lambda r: jnp.where(r > 0, typical / r, 1.0), rms)


def _next_factor(last, nu, fresh_nu, eps, adaptive, direction):
  """By how much a leaf's ratio has changed since the variance stays."""
  ratios = (jnp.sqrt(nu) + eps) / (jnp.sqrt(fresh_nu) + eps)
  factor = jnp.max(jnp.where(nu > 0, ratios, 0.0), initial=0.0)
  # What of the direction is weight decay does not depend on the variance.
  part = jnp.where(direction > 0, jnp.minimum(1, adaptive / direction), 1.0)
  factor = part * factor + (1 - part)
  low, high = (1 - _FACTOR_CHANGE) * last, (1 + _FACTOR_CHANGE) * last
  return jnp.clip(jnp.clip(factor, *_FACTOR_LIMITS), low, high)
