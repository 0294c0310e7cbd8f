"""Collectives with replication types, in whichever context the caller runs.

``shard_map`` tracks which arrays differ between workers (``check_vma``); under
``vmap`` and ``pmap`` there is nothing to track, and the arguments that steer
it are refused. These wrappers choose by context, so that the code above them
is the same everywhere.
"""

from collections.abc import Callable
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


def shard_key(key: jax.Array, x: jax.Array, axis: str) -> jax.Array:
  """A key for this device's part of ``x``, where a worker is many devices.

  It differs along the other axes that ``x`` is cut over, and not along
  ``axis``.
  """
  for other in sorted(compat.varying_axes(x) - {axis}):
    key = jax.random.fold_in(key, jax.lax.axis_index(other))
  return key


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


def psum(tree: Any, axis: str) -> Any:
  """The sum over workers; the same on every worker, and known to be.

  Over one worker, where ``shard_map`` does not track types, it is no operation
  at all: XLA fails on a sum over one device beside axes that the partitioner
  manages.
  """
  is_manual = axis in jax.sharding.get_abstract_mesh().manual_axes
  if axis_size(axis) == 1 and is_manual and not is_tracked(axis):
    return tree
  return jax.lax.psum(tree, axis)


def all_gather(x: jax.Array, axis: str) -> jax.Array:
  """All workers' ``x``, stacked; the same on every worker, and known to be.

  It travels flat: TPUs send whole tiles, and rows that do not fill theirs would
  send up to a fifth more.
  """
  flat = x.reshape(-1)
  if axis in compat.varying_axes(x):
    gathered = jax.lax.all_gather(flat, axis, to='invarying')
  else:
    gathered = jax.lax.all_gather(flat, axis)
  return gathered.reshape(-1, *x.shape)


def all_to_all(words: jax.Array, axis: str) -> jax.Array:
  """Row i goes to worker i; returns the rows that were sent here.

  ``words`` are integers. Under ``vmap`` JAX gives what is the same for all
  workers a wrong shape here, so they are made to look like this worker's own;
  the compiler removes it.
  """
  own = words + (0 * jax.lax.axis_index(axis)).astype(words.dtype)
  flat = own.reshape(own.shape[0], -1)  # As in all_gather.
  return jax.lax.all_to_all(flat, axis, 0, 0).reshape(words.shape)


def shapes_inside(
  fn: Callable[[Any], Any], in_specs: Any, arg: Any, **kwargs: Any
) -> Any:
  """Shapes of what ``fn(arg)`` returns inside ``jax.shard_map``.

  ``shard_map`` wants the specs of a result whose structure only running it
  tells.

  Args:
    fn: a function for the inside.
    in_specs: of its argument.
    arg: arrays or shapes, as seen from outside.
    **kwargs: for ``jax.shard_map``.

  Returns:
    The result, with ``jax.ShapeDtypeStruct`` as leaves.
  """
  found = []

  def probe(arg):
    found.append(
      jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), fn(arg))
    )
    return ()

  mapped = jax.shard_map(probe, in_specs=(in_specs,), out_specs=(), **kwargs)
  jax.eval_shape(mapped, arg)
  return found[0]
