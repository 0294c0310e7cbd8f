"""Noise of each worker's own, before anything is sent."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from jaxdist.communicators import checks, collectives


class WorkerNoiseState(NamedTuple):
  """State of :func:`worker_noise`.

  Attributes:
    count: steps so far; seeds the draws. The same on all workers.
  """

  count: Int32[Array, '']


def worker_noise(
  axis: str, stddev: float, *, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
  r"""Adds Gaussian noise to each worker's updates, other noise on each.

  .. math:: u^{(i)} \gets u^{(i)} + \sigma \xi^{(i)}, \qquad
    \xi^{(i)} \sim \mathcal{N}(0, I)

  Behind a clip and before a communicator, what a worker sends is a Gaussian
  mechanism, and codes that come after it do not change that: the private form
  of sketches. (:func:`optax.add_noise` draws the same noise on all workers,
  which whoever sees two messages takes off.) It sends nothing. What it means in
  :math:`(\epsilon, \delta)` depends on what is clipped, on sampling and on the
  number of steps; an accountant says.

  Args:
    axis: name of the workers' axis.
    stddev: :math:`\sigma`, in units of the updates. 0 leaves them alone, bit
      for bit.
    seed: of the draws, which differ by worker, step and leaf. Whoever knows it
      knows the noise.

  Returns:
    A :class:`optax.GradientTransformationExtraArgs` for the worker view.

  Raises:
    ValueError: if ``stddev`` is negative or not finite, or ``axis`` or ``seed``
      cannot be one.

  Examples:
    >>> import jaxdist as jd
    >>> tx = optax.chain(
    ...   jd.per_worker(optax.clip_by_global_norm(1.0)),
    ...   jd.worker_noise('data', stddev=0.01, seed=17),
    ...   jd.communicate(jd.mean('data', jd.sketch(1 / 8))),
    ...   optax.sgd(0.01),
    ... )

  References:
    Song et al, `Sketching for First Order Method
    <https://arxiv.org/abs/2210.08371>`_, 2023
  """
  checks.check_axis(axis)
  seed = checks.seed(seed)
  if not 0 <= stddev < float('inf'):
    raise ValueError(f'stddev must be finite and not negative, got {stddev}.')

  def init_fn(params):
    del params
    return WorkerNoiseState(jnp.zeros((), jnp.int32))

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    new = WorkerNoiseState(state.count + 1)
    if not stddev:
      return updates, new
    key = collectives.exchange_key(seed, state.count)
    key = jax.random.fold_in(key, jax.lax.axis_index(axis))

    def noisy(index, x):
      own = jax.random.fold_in(key, index)
      own = collectives.shard_key(own, x, axis)
      return x + (stddev * jax.random.normal(own, x.shape)).astype(x.dtype)

    leaves, treedef = jax.tree.flatten(updates)
    return treedef.unflatten(map(noisy, range(len(leaves)), leaves)), new

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
