"""Another number of workers: what becomes of the state that each one keeps."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxdist.keys import is_key
from jaxdist.state import Resize, is_per_worker

# How the library's states call what a code dropped.
_RESIDUALS = ('residual', 'error', 'dropped')


def resize(state: Any, like: Any) -> Any:
  r"""Changes the number of workers of a state.

  Each :class:`jaxdist.PerWorker` says by ``resize`` what is kept:

  ``'mean'`` keeps the mean over workers, which is what residuals still owe the
  parameters: workers add :math:`\frac1W \sum_i C(g_i + e_i)`, so what they hold
  back is :math:`\frac1W \sum_i e_i`. If the old number is a multiple of the
  new one, each new worker gets the mean of a block of consecutive workers; if
  the new one is a multiple of the old one, each worker is copied; otherwise
  all get the mean over all. It is computed in float32 or wider. Integers and
  bools, such as step counters, are the same on all workers: all get worker
  0's. Typed PRNG keys stay with their workers, and a new worker's is folded
  from an old one's and its own number, so that no two are equal.

  ``'split'`` takes the workers' arrays of shape ``(workers, rows, ...)`` as the
  rows of one array, padded with zeros at the end, and cuts it anew. What has no
  rows, such as an optimizer's counter for its part, follows ``'mean'``.

  ``'zero'`` keeps nothing: what the workers had was a copy of something else,
  in a form that cannot be averaged.

  Workers that hold several ``parts`` in turn are taken part by part.

  All other leaves pass through. With as many workers as before, nothing
  changes. Runs inside ``jit`` too, where it is the caller's ``out_shardings``
  that place the result, and where rows of ``'split'`` that find no room are
  dropped unseen: values are not known there, so that nothing can be raised.
  Outside of it, what changes goes through host memory, one leaf at a time.

  Args:
    state: as seen from outside the workers: per-worker leaves have a leading
      worker axis.
    like: the state for the new number of workers, of arrays or
      ``jax.ShapeDtypeStruct``: gives shapes, dtypes and shardings.

  Returns:
    The state with the structure, shapes and shardings of ``like``.

  Raises:
    ValueError: if a leaf is only in one of the two, has another dtype or
      another shape behind the worker axis, must not be resized
      (``resize=None``), or, outside of ``jit``, would lose rows that are not
      zero. Names the leaf.

  Examples:
    >>> import jaxdist as jd
    >>> state = {'residual': jd.PerWorker(jnp.array([1.0, 3.0, 5.0, 7.0]))}
    >>> like = {'residual': jd.PerWorker(jnp.zeros(2))}
    >>> jd.resize(state, like)['residual'].value
    Array([2., 6.], dtype=float32)
  """
  old = named_leaves(state)
  new = named_leaves(like)
  check_leaves({leaf.name: leaf.spec() for leaf in old}, new, '`state`')
  values = {leaf.name: leaf.value for leaf in old}
  return jax.tree.unflatten(
    jax.tree.structure(like),
    [_resize_and_place(values[leaf.name], leaf) for leaf in new],
  )


class LeafSpec(NamedTuple):
  """What must agree between a state and the one that is asked for.

  Attributes:
    shape: of all workers' values, if per worker.
    dtype: its name.
    per_worker: whether the leaf sits in a :class:`jaxdist.PerWorker`.
    parts: that node's ``parts``.
  """

  shape: tuple[int, ...]
  dtype: str
  per_worker: bool
  parts: int = 1


class NamedLeaf(NamedTuple):
  """A leaf with its path and the node that it sits in.

  Attributes:
    name: its path, as ``jax.tree_util.keystr`` writes it.
    value: an array or ``jax.ShapeDtypeStruct``.
    per_worker: whether it sits in a :class:`jaxdist.PerWorker`.
    rule: that node's ``resize``.
    parts: that node's ``parts``.
    is_residual: whether it is what a code dropped, to be sent later.
  """

  name: str
  value: Any
  per_worker: bool
  rule: Resize | None
  parts: int = 1
  is_residual: bool = False

  def spec(self) -> LeafSpec:
    """Shape, dtype and place of the leaf."""
    value = self.value
    if not hasattr(value, 'dtype'):
      value = np.asarray(value)
    shape = tuple(value.shape)
    if self.per_worker and not shape:
      raise ValueError(
        f'{self.name or "the state"} is per worker and has no worker axis: '
        f"give the state as seen from outside, not one worker's view."
      )
    return LeafSpec(shape, str(value.dtype), self.per_worker, self.parts)


def named_leaves(tree: Any) -> list[NamedLeaf]:
  """The leaves of a state, in the order of ``jax.tree.leaves``."""
  leaves = []
  for path, node in jax.tree.leaves_with_path(tree, is_leaf=is_per_worker):
    per_worker = is_per_worker(node)
    rule, parts = (node.resize, node.parts) if per_worker else (None, 1)
    field = getattr(path[-1], 'name', None) if path else None
    is_residual = per_worker and field in _RESIDUALS
    for inner_path, value in jax.tree.leaves_with_path(node):
      name = jax.tree_util.keystr((*path, *inner_path))
      leaves.append(
        NamedLeaf(name, value, per_worker, rule, parts, is_residual)
      )
  return leaves


def check_leaves(
  have: Mapping[str, LeafSpec], like: Iterable[NamedLeaf], where: str
) -> None:
  """Raises ValueError naming the first leaf of ``have`` that can't be ``like``.

  Args:
    have: the leaves that there are, by name.
    like: the leaves that are asked for.
    where: what to call the owner of ``have`` in the error.
  """
  names = set()
  for leaf in like:
    name = leaf.name or 'the state'
    names.add(leaf.name)
    if leaf.name not in have:
      raise ValueError(f'{name} is in `like` but not in {where}.')
    there = have[leaf.name]
    asked = leaf.spec()
    if there.per_worker != asked.per_worker:
      raise ValueError(
        f'{name} is {_place(there)} in {where} and {_place(asked)} in `like`.'
      )
    if there.dtype != asked.dtype:
      raise ValueError(
        f'{name} has dtype {there.dtype} in {where} and {asked.dtype} in '
        f'`like`.'
      )
    if there.parts != asked.parts:
      raise ValueError(
        f'{name} is held in {there.parts} parts in {where} and in '
        f'{asked.parts} in `like`: the number of devices inside a slice cannot '
        f'change.'
      )
    if there.shape == asked.shape:
      continue
    resized = asked.per_worker and there.shape[0] != asked.shape[0]
    kept = _num_resized_axes(leaf.rule, asked.shape) if resized else 0
    if (
      len(there.shape) != len(asked.shape)
      or there.shape[kept:] != asked.shape[kept:]
    ):
      raise ValueError(
        f'{name} has shape {there.shape} in {where} and {asked.shape} in '
        f'`like`.'
      )
    if leaf.rule is None:
      raise ValueError(
        f'{name} is of {there.shape[0]} workers in {where} and of '
        f'{asked.shape[0]} in `like`, and cannot be resized: its PerWorker has '
        f'resize=None.'
      )
  for name in have:
    if name not in names:
      raise ValueError(
        f'{name or "the state"} is in {where} but not in `like`.'
      )


def resized(x: Any, like: NamedLeaf) -> Any:
  """One leaf for as many workers as ``like`` has.

  Args:
    x: a NumPy or JAX array, all workers' values.
    like: gives the shape and the rule.

  Returns:
    An array of the same kind as ``x``.
  """
  shape = np.shape(like.value)
  if x.shape == shape:
    return x
  if like.rule == 'zero':
    return np.zeros(shape, x.dtype)
  if like.parts > 1:
    one = (shape[0] // like.parts, *shape[1:])
    one = like._replace(value=jax.ShapeDtypeStruct(one, x.dtype), parts=1)
    each = [resized(x[part :: like.parts], one) for part in range(like.parts)]
    xp = np if isinstance(x, np.ndarray) else jnp
    return xp.stack(each, axis=1).reshape(shape)
  if _num_resized_axes(like.rule, shape) == 2:
    return _split(x, shape, like.name)
  if is_key(x):
    return _resize_keys(x, shape[0])
  return _keep_mean(x, shape[0])


def placed(x: Any, like: Any) -> Any:
  """Host values as the kind of array that ``like`` is, placed as it is.

  Args:
    x: a NumPy array, or a key array on this process's default device.
    like: an array, a Python number, or ``jax.ShapeDtypeStruct``.

  Returns:
    A Python number or NumPy array where ``like`` is one. Else a JAX array: with
    the sharding of ``like``, or uncommitted where that has none.
  """
  if isinstance(like, bool | int | float | complex):
    return x.item()
  if isinstance(like, np.ndarray | np.generic):
    return x if isinstance(like, np.ndarray) else x[()]
  data = np.asarray(jax.random.key_data(x) if is_key(x) else x)
  sharding = sharding_of(like)
  if sharding is None:
    data = jnp.asarray(data)
  else:
    data = jax.make_array_from_callback(data.shape, sharding, data.__getitem__)
  if is_key(x):
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
  return data


def sharding_of(like: Any) -> jax.sharding.Sharding | None:
  """Where an array is committed to, or None where JAX may move it."""
  return like.sharding if getattr(like, 'committed', True) else None


def _resize_and_place(x, like):
  if isinstance(x, jax.core.Tracer):
    return resized(x, like)
  is_array = isinstance(like.value, jax.Array | jax.ShapeDtypeStruct)
  if isinstance(x, jax.Array) and is_array and x.shape == like.value.shape:
    sharding = sharding_of(like.value)
    return x if sharding is None else jax.device_put(x, sharding)
  return placed(resized(on_host(x), like), like.value)


def on_host(x: Any) -> Any:
  """All of an array, also where other processes hold parts of it."""
  if not isinstance(x, jax.Array):
    return np.asarray(x)
  if is_key(x):
    data = on_host(jax.random.key_data(x))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
  if x.is_fully_addressable or x.is_fully_replicated:
    return np.asarray(x)
  return multihost_utils.process_allgather(x, tiled=True)


def _keep_mean(x, workers):
  old = x.shape[0]
  if not jnp.issubdtype(x.dtype, jnp.inexact):
    return x[:1].repeat(workers, axis=0)
  if workers % old == 0:
    return x.repeat(workers // old, axis=0)
  wide = x.astype(np.promote_types(x.dtype, np.float32))
  blocks = workers if old % workers == 0 else 1
  with np.errstate(over='ignore', invalid='ignore'):  # As under jit.
    mean = wide.reshape(blocks, old // blocks, *x.shape[1:]).mean(axis=1)
  return mean.astype(x.dtype).repeat(workers // blocks, axis=0)


def _resize_keys(keys, workers):
  old = keys.shape[0]
  worker = jnp.arange(workers)
  donor = keys[worker % old]
  fold = jax.random.fold_in
  for _ in keys.shape[1:]:
    fold = jax.vmap(fold, (0, None))
  fresh = jax.vmap(fold)(donor, worker)
  return jnp.concatenate([donor[:old], fresh[old:]])


def _split(x, shape, name):
  flat = x.reshape(-1, *x.shape[2:])
  rows = shape[0] * shape[1]
  if isinstance(x, np.ndarray) and np.any(flat[rows:] != 0):
    raise ValueError(
      f'{name} has {flat.shape[0]} rows over {x.shape[0]} workers, and those '
      f'behind the {rows} that `like` has room for are not all zero.'
    )
  padding = [(0, max(0, rows - flat.shape[0]))] + [(0, 0)] * (flat.ndim - 1)
  xp = np if isinstance(x, np.ndarray) else jnp
  return xp.pad(flat[:rows], padding).reshape(shape)


def _num_resized_axes(rule, shape):
  """How many leading axes may change with the number of workers."""
  if rule == 'zero':
    return len(shape)
  return 2 if rule == 'split' and len(shape) > 1 else 1


def _place(spec):
  return 'per worker' if spec.per_worker else 'the same on all workers'
