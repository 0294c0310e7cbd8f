"""Collectives with replication types, in whichever context the caller runs.

``shard_map`` tracks which arrays differ between workers (``check_vma``); under
``vmap`` and ``pmap`` there is nothing to track, and the arguments that steer
it are refused. These wrappers choose by context, so that the code above them
is the same everywhere.
"""

from typing import Any

import jax

from jaxdist import compat


def axis_size(axis: str) -> int:
  """The number of workers along an axis.

  Raises:
    ValueError: if no such axis is bound here.
  """
  try:
    return jax.lax.axis_size(axis)
  except NameError:
    raise ValueError(
      f'axis must name an axis of the workers, bound by jax.shard_map, '
      f'jax.pmap or jax.vmap(axis_name=...); {axis!r} is not bound here. '
      f'jd.init and jd.train_step bind theirs; outside of them, call init and '
      f'update where the axis is known.'
    ) from None


def is_tracked(axis: str) -> bool:
  """Whether array types here say if they vary along ``axis``."""
  try:
    return axis in compat.varying_axes(jax.lax.axis_index(axis))
  except NameError:  # Not bound: an init outside of the workers.
    return False


def varies(x: Any, axis: str) -> bool:
  """Whether ``x`` may differ between workers; True where it isn't tracked."""
  return not is_tracked(axis) or axis in compat.varying_axes(x)


def vary(tree: Any, axis: str) -> Any:
  """Marks arrays as possibly different on each worker; moves nothing."""
  if not is_tracked(axis):
    return tree
  return jax.tree.map(
    lambda x: (
      x
      if axis in compat.varying_axes(x)
      else jax.lax.pcast(x, axis, to='varying')
    ),
    tree,
  )


def all_gather(x: jax.Array, axis: str) -> jax.Array:
  """All workers' ``x``, stacked; the same on every worker, and known to be."""
  if axis in compat.varying_axes(x):
    return jax.lax.all_gather(x, axis, to='invarying')
  return jax.lax.all_gather(x, axis)


def all_to_all(words: jax.Array, axis: str) -> jax.Array:
  """Row i goes to worker i; returns the rows that were sent here.

  ``words`` are integers. Under ``vmap`` JAX gives what is the same for all
  workers a wrong shape here, so they are made to look like this worker's own;
  the compiler removes it.
  """
  own = words + (0 * jax.lax.axis_index(axis)).astype(words.dtype)
  return jax.lax.all_to_all(own, axis, 0, 0)
