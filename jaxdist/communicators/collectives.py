"""Collectives with replication types, in whichever context the caller runs.

``shard_map`` tracks which arrays differ between workers (``check_vma``); under
``vmap`` and ``pmap`` there is nothing to track, and the arguments that steer
it are refused. These wrappers choose by context, so that the code above them
is the same everywhere.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxdist import compat
from jaxdist.state import Axis, axis_names

_parts_along: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar(
  'axes over which a worker is cut', default=frozenset()
)

_members: contextvars.ContextVar[tuple[int, ...]] = contextvars.ContextVar(
  'which parts of a tree an exchange is for', default=()
)


def axis_size(axis: Axis) -> int:
  """The number of workers along an axis, or several.

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


def is_tracked(axis: Axis) -> bool:
  """Whether array types here say if they vary along ``axis``."""
  try:
    index = jax.lax.axis_index(axis)
  except NameError:  # Not bound: an init outside of the workers.
    return False
  return compat.varying_axes(index) >= set(axis_names(axis))


def agrees_along(x: Any, axis: Axis) -> list[str]:
  """The axes of the workers along which ``x`` is known to be the same."""
  varying = compat.varying_axes(x)
  names = axis_names(axis) if is_tracked(axis) else ()
  return [name for name in names if name not in varying]


def differs_along(x: Any, axis: Axis) -> list[str]:
  """The axes of the workers along which ``x`` is not known to be the same."""
  varying = compat.varying_axes(x)
  return [name for name in axis_names(axis) if name in varying]


def exchange_key(seed: int, count: jax.Array) -> jax.Array:
  """The key that all workers share in an exchange, and in no other.

  Args:
    seed: the communicator's.
    count: its exchanges so far.
  """
  key = jax.random.fold_in(jax.random.key(seed), count)
  for index in _members.get():
    key = jax.random.fold_in(key, index)
  return key


@contextlib.contextmanager
def member(index: int) -> Iterator[None]:
  """Gives one of several exchanges of equal seed and count a key of its own.

  Args:
    index: of the part of a tree that what is traced inside exchanges.
  """
  token = _members.set((*_members.get(), index))
  try:
    yield
  finally:
    _members.reset(token)


def shard_key(key: jax.Array, x: jax.Array, axis: str) -> jax.Array:
  """A key for this device's part of ``x``, where a worker is many devices.

  It differs along the other axes that ``x`` is cut over, and not along
  ``axis``.
  """
  others = compat.varying_axes(x) | _parts_along.get()
  for other in sorted(others - {axis}):
    key = jax.random.fold_in(key, jax.lax.axis_index(other))
  return key


@contextlib.contextmanager
def cut_along(axis: str) -> Iterator[None]:
  """Lets :func:`shard_key` know, where types don't say it.

  What is traced inside works on one of the parts that the devices along
  ``axis`` have of the same arrays.
  """
  token = _parts_along.set(_parts_along.get() | {axis})
  try:
    yield
  finally:
    _parts_along.reset(token)


def vary(tree: Any, axis: Axis) -> Any:
  """Marks arrays as possibly different on each worker; moves nothing."""

  def marked(x):
    missing = tuple(agrees_along(x, axis))
    return jax.lax.pcast(x, missing, to='varying') if missing else x

  return jax.tree.map(marked, tree)


def psum(tree: Any, axis: Axis) -> Any:
  """The sum over workers; the same on every worker, and known to be.

  Over one worker, where ``shard_map`` does not track types, it is no operation
  at all: XLA fails on a sum over one device beside axes that the partitioner
  manages.
  """
  manual = jax.sharding.get_abstract_mesh().manual_axes
  is_manual = set(axis_names(axis)) <= set(manual)
  if axis_size(axis) == 1 and is_manual and not is_tracked(axis):
    return tree
  return jax.lax.psum(tree, axis)


def all_gather(x: jax.Array, axis: str) -> jax.Array:
  """All workers' ``x``, stacked; the same on every worker, and known to be.

  It travels flat: TPUs send whole tiles, and rows that do not fill theirs would
  send up to a fifth more.
  """
  if axis_size(axis) == 1:
    return psum(x, axis)[None]
  if _is_pair_over_gloo(axis) and jnp.issubdtype(x.dtype, jnp.integer):
    both = _with_other(x, _swapped(x, axis), axis)
    # Each has put its own and the other's in the same order.
    return compat.agreed(both, axis) if is_tracked(axis) else both
  flat = x.reshape(-1)
  if axis in compat.varying_axes(x):
    gathered = jax.lax.all_gather(flat, axis, to='invarying')
  else:
    gathered = jax.lax.all_gather(flat, axis)
  return gathered.reshape(-1, *x.shape)


def reduce_scatter(x: jax.Array, axis: str) -> jax.Array:
  """Worker i gets the sum over workers of their rows i.

  Of vectors, and of a matrix by its few rows, TPUs would send the whole sum to
  all: rows are of a multiple of 128 numbers, to be cut into many.
  """
  if axis_size(axis) == 1:
    return x[0]
  lanes = x.reshape(-1, 128)
  return jax.lax.psum_scatter(lanes, axis, tiled=True).reshape(x.shape[1:])


def all_to_all(words: jax.Array, axis: str) -> jax.Array:
  """Row i goes to worker i; returns the rows that were sent here.

  ``words`` are integers. Under ``vmap`` JAX gives what is the same for all
  workers a wrong shape here, so they are made to look like this worker's own;
  the compiler removes it.
  """
  if _is_pair_over_gloo(axis):
    index = jax.lax.axis_index(axis)
    return _with_other(words[index], _swapped(words[1 - index], axis), axis)
  own = words + (0 * jax.lax.axis_index(axis)).astype(words.dtype)
  flat = own.reshape(own.shape[0], -1)  # As in all_gather.
  return jax.lax.all_to_all(flat, axis, 0, 0).reshape(words.shape)


def _is_pair_over_gloo(axis):
  """Whether two workers meet over gloo, which is slow to move data between two.

  Who comes later to an all-gather, all-to-all or permutation sends first, and
  tells the other behind it that it may send too, so that the link carries data
  one way at a time. In a sum of the same bytes both send at once.
  """
  manual = jax.sharding.get_abstract_mesh().manual_axes
  return (
    axis_size(axis) == 2
    and axis in manual
    and jax.process_count() > 1
    and jax.default_backend() == 'cpu'
  )


def _swapped(x, axis):
  """The other's integers, of two workers: each adds zeros to them."""
  index = jax.lax.axis_index(axis)
  rows = jnp.zeros((2, x.size), x.dtype).at[1 - index].set(x.reshape(-1))
  return jax.lax.psum_scatter(rows, axis).reshape(x.shape)


def _with_other(own, other, axis):
  """Both workers' arrays in the order of the workers."""
  is_first = jax.lax.axis_index(axis) == 0
  return jnp.stack(
    [jnp.where(is_first, own, other), jnp.where(is_first, other, own)]
  )


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
