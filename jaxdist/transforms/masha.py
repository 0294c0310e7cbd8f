"""MASHA1 and MASHA2: saddle points, with changes of the operator compressed."""

import fractions
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int32

from jaxdist.communicators import checks
from jaxdist.communicators.base import Communicator, cast
from jaxdist.communicators.uncompressed import uncompressed
from jaxdist.state import PerWorker
from jaxdist.transforms import base
from jaxdist.transforms.error_feedback import (
  exchange_with_feedback,
  zero_residual,
)


class MashaState(NamedTuple):
  """State of :func:`masha1` and :func:`masha2`.

  Attributes:
    point: z, in float32. The same on all workers.
    reference: w, in float32. The same on all workers.
    mean: F(w), the mean of the workers' operators there. The same on all.
    own: :math:`F_m(w)`. Each worker's own.
    residual: what was dropped from the changes sent so far; ``None`` for
      MASHA1. Each worker's own.
    told_whole: whether the next values are those at ``reference``, to be sent
      whole. The same on all workers.
    communicator: the communicator's.
    count: steps of ``point`` so far. The same on all workers.
    skipped: values dropped for a number that is not finite. The same on all.
    layout: what the params looked like at init.
  """

  point: optax.Params
  reference: optax.Params
  mean: optax.Updates
  own: PerWorker
  residual: PerWorker
  told_whole: Bool[Array, '']
  communicator: Any
  count: Int32[Array, '']
  skipped: Int32[Array, '']
  layout: base.Layout


def masha1(
  learning_rate: optax.ScalarOrSchedule,
  communicator: Communicator,
  *,
  keep: float = 0.9,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  r"""Extragradient steps from compressed changes of the operator.

  For :math:`F(z) = \frac1W \sum_m F_m(z) = 0`, such as a saddle point, where
  :math:`z = (x, y)` and :math:`F = (\nabla_x f, -\nabla_y f)`. With a reference
  point w at which all know F,

  .. math::

    z_{1/2} &= \tau z + (1 - \tau) w - \gamma F(w) \\
    z &\gets z_{1/2}
      - \frac1W \sum_m D\big(E(\gamma (F_m(z_{1/2}) - F_m(w)))\big) \\
    w &\gets z, \quad F(w) \text{ sent whole}, \qquad
      \text{with chance } 1 - \tau

  What is compressed vanishes at the solution, where :math:`F_m` itself does
  not; compressed gradient descent and ascent stall or diverge there. With
  ``keep=0`` and a code that drops nothing it is the extragradient method.

  Each update takes one value of the operator, at the params that the update
  before led to: these are :math:`z_{1/2}`, or w where it is new, and where
  training ends they are the result. The players' gradients come with both
  signs from ``optax``, as below.

  **On the wire:** what the communicator sends, in one of :math:`2 - \tau`
  updates on average, and a float32 mean in the others. :math:`1 - \tau` equal
  to the communicator's bytes over those of float32 makes both cost the same. It
  costs each worker four float32 copies of the parameters, five with feedback.

  Args:
    learning_rate: :math:`\gamma`, a number or a schedule over steps of z.
      Compressing wants a smaller one than the extragradient method.
    communicator: one whose result is the same on all workers and whose code is
      unbiased.
    keep: :math:`\tau` in [0, 1), the chance that w stays.
    seed: of the draws, which all workers share.

  Returns:
    A :class:`optax.GradientTransformationExtraArgs` for the worker view.

  Raises:
    ValueError: if an option is out of range, workers would get different
      results or late ones, or the code is biased.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> import jaxdist as jd
    >>> code = jd.quantize(bits=8, stochastic=True)
    >>> tx = optax.chain(
    ...   optax.partition(
    ...     {'min': optax.identity(), 'max': optax.scale(-1.0)},
    ...     {'x': 'min', 'y': 'max'},
    ...   ),
    ...   jd.masha1(0.3, jd.mean('data', code)),
    ... )
    >>> where = {'workers': 2, 'axis': 'data'}
    >>> f = lambda z, a: jnp.mean(z['x'] * z['y'] + a * (z['x'] - z['y']))
    >>> state = jd.init(tx, {'x': jnp.ones(1), 'y': jnp.ones(1)}, **where)
    >>> step = jd.train_step(f, tx, **where)
    >>> for _ in range(200):  # To x = 2 and y = -2.
    ...   state, _ = step(state, jnp.array([[1.0], [3.0]]))
    >>> bool(abs(state.params['x'] - 2) < 1e-2)
    True

  References:
    Beznosikov et al, `Distributed Methods with Compressed Communication for
    Solving Variational Inequalities <https://arxiv.org/abs/2110.03313>`_, 2022
    (algorithm 1, without constraints)
  """
  if isinstance(communicator, Communicator) and not communicator.unbiased:
    raise ValueError(
      f'communicator must have an unbiased code, and {communicator!r} has '
      f'not. Use jd.masha2.'
    )
  return _masha(learning_rate, communicator, keep, seed, feedback=False)


def masha2(
  learning_rate: optax.ScalarOrSchedule,
  communicator: Communicator,
  *,
  keep: float = 0.9,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  r""":func:`masha1` with feedback, for biased codes that contract.

  .. math::

    p_m &= \gamma (F_m(z_{1/2}) - F_m(w)) + e_m, \qquad
    z \gets z_{1/2} - \frac1W \sum_m D(E(p_m)) \\
    e_m &\gets p_m - D(E(p_m))

  and the rest as there. The residual stays when w changes. With ``two_shot``
  what the server encodes has feedback too: compression both ways.

  **On the wire:** as :func:`masha1`.

  Args:
    learning_rate: as of :func:`masha1`.
    communicator: one whose result is the same on all workers and whose code
      contracts.
    keep: as of :func:`masha1`.
    seed: as of :func:`masha1`.

  Returns:
    A :class:`optax.GradientTransformationExtraArgs` for the worker view.

  Raises:
    ValueError: if an option is out of range, workers would get different
      results or late ones, or the code does not contract.

  Examples:
    >>> import jaxdist as jd
    >>> tx = jd.masha2(0.01, jd.mean('data', jd.top_k(0.05)), keep=0.9)

  References:
    Beznosikov et al, 2022, as above (algorithm 2)
  """
  base.check_communicator(communicator, agrees=True)
  base.check_feedback(communicator)
  return _masha(learning_rate, communicator, keep, seed, feedback=True)


def _masha(learning_rate, communicator, keep, seed, feedback):
  base.check_communicator(communicator, agrees=True)
  base.check_prompt(communicator)
  if not 0 <= keep < 1:
    raise ValueError(f'keep must be in [0, 1), got {keep}.')
  seed = checks.seed(seed)
  axis = communicator.axis
  whole = uncompressed(communicator)
  rate = learning_rate
  if not callable(learning_rate):
    rate = lambda count: learning_rate
  # Of the updates, as jd.traffic wants it: one for each w, among all.
  share = fractions.Fraction((1 - keep) / (2 - keep)).limit_denominator(10_000)
  often = lambda x: f'jaxdist.every.{x.denominator}_{x.numerator}'

  def init_fn(params):
    start = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    zeros = zero_residual(params, axis)
    return MashaState(
      start,
      start,
      base.zeros(params),
      zeros,
      zeros if feedback else PerWorker(None),
      jnp.array(True),
      communicator.init(params, feedback=feedback),
      jnp.zeros((), jnp.int32),
      jnp.zeros((), jnp.int32),
      base.Layout.of(params),
    )

  def half(state):
    step = rate(state.count)
    return jax.tree.map(
      lambda z, w, f: keep * z + (1 - keep) * w - step * f,
      state.point,
      state.reference,
      state.mean,
    )

  def tell_whole(values, state):
    with jax.named_scope(often(share)):
      total, _, _ = whole.exchange(values, whole.init(values))
    told = state._replace(
      mean=total, own=PerWorker(values), told_whole=jnp.array(False)
    )
    return told, total

  def advance(values, state):
    step = rate(state.count)
    change = jax.tree.map(
      lambda f, own: step * (f - own), values, state.own.value
    )
    with jax.named_scope(often(1 - share)):
      if feedback:
        change, residual, comm_state = exchange_with_feedback(
          communicator, change, state.residual, state.communicator, 1.0
        )
      else:
        residual = state.residual
        change, _, comm_state = communicator.exchange(
          change, state.communicator
        )
    point = optax.tree.sub(half(state), change)
    moves = refreshes(seed, state.count, keep)
    moved = state._replace(
      point=point,
      reference=base.where(moves, point, state.reference),
      residual=residual,
      told_whole=moves,
      communicator=comm_state,
      count=state.count + 1,
    )
    return moved, change

  def update_fn(updates, state, params=None, **extra_args):
    del extra_args
    if params is None:
      raise ValueError(
        'params must be given, as updates lead from where the operator was '
        'evaluated: tx.update(updates, state, params).'
      )
    base.check_updates(updates, state.layout, axis)
    values = jax.tree.map(lambda x: x.astype(jnp.float32), updates)
    new, heard = jax.lax.cond(
      state.told_whole, tell_whole, advance, values, state
    )
    # What was heard is the same on all workers, so that all decide alike.
    finite = base.all_finite(heard)
    new = base.where(finite, new, state)._replace(
      skipped=state.skipped + jnp.where(finite, 0, 1)
    )
    there = base.where(new.told_whole, new.reference, half(new))

    def move(there, at, like):
      step = there - at.astype(jnp.float32)
      return cast(jnp.where(finite, step, 0), like.dtype)

    return jax.tree.map(move, there, params, updates), new

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def refreshes(seed: int, count: jax.Array, keep: float) -> Bool[Array, '']:
  """Whether the reference moves after a step of the point."""
  key = jax.random.fold_in(jax.random.key(seed), count)
  return jax.random.bernoulli(key, 1 - keep)
