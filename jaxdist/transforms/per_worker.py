"""A local transform whose state differs between workers."""

import optax

from jaxdist.state import PerWorker


def per_worker(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Runs a transform on each worker's own updates, before they are exchanged.

  What stands after a communicator in a chain sees the same updates on all
  workers, and its state is shared. What stands before it, and remembers, must
  say that its state is each worker's own: this does. It sends nothing.

  Args:
    tx: any transform that does not communicate.

  Returns:
    A :class:`optax.GradientTransformationExtraArgs` for the worker view, whose
    state is a :class:`jaxdist.PerWorker`.

  Raises:
    ValueError: if ``tx`` is no transform.

  Examples:
    >>> import jaxdist as jd
    >>> tx = optax.chain(  # Momentum is compressed, and added up after.
    ...   jd.per_worker(optax.ema(0.9)),
    ...   jd.error_feedback(jd.mean('data', jd.sign())),
    ...   optax.sgd(0.1),
    ... )
  """
  if not isinstance(tx, optax.GradientTransformation):
    raise ValueError(f'tx must be an optax transform, got {tx!r}.')
  tx = optax.with_extra_args_support(tx)

  def init_fn(params):
    return PerWorker(tx.init(params))

  def update_fn(updates, state, params=None, **extra_args):
    updates, inner = tx.update(updates, state.value, params, **extra_args)
    return updates, PerWorker(inner)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
