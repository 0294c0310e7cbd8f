"""What a communicator is, and what every one of them checks."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdist import placement
from jaxdist.communicators import collectives
from jaxdist.state import Axis, axis_names

Leaves = list[Float[Array, '...']]


@dataclasses.dataclass(frozen=True)
class Communicator:
  """How one tree a worker becomes the tree that each worker goes on with.

  ``init`` and ``exchange`` run in the worker view, where ``axis`` is bound.
  ``exchange`` is collective: all workers call it together.

  Attributes:
    name: how it was made, for reports.
    axis: the axis that it sends along; the axes, from the slowest link to the
      fastest, of :func:`jaxdist.hierarchical`.
    init: ``(tree, feedback) -> state``. ``tree`` gives shapes. With
      ``feedback`` the state also holds what a second encoding drops.
    exchange: ``(tree, state) -> (result, sent, state)``. ``result`` is what the
      worker goes on with; ``sent`` (float32) is what this worker's own
      contribution decoded to, which feedback needs.
    bytes_sent: ``(tree, workers) -> bytes`` that a worker sends in one exchange
      along a ring; the compiled program sends the same. ``workers`` are as many
      numbers as there are axes.
    contraction: the smallest contraction of the codes in it.
    unbiased: whether every code in it is unbiased.
    agrees: whether ``result`` is the same on all workers.
    late: whether ``result`` is of what was handed in one exchange ago.
    encodes_twice: whether, for some number of workers, a mean is encoded again
      before it reaches all.
    uncompressed: makes what sends float32 in its place, between the same
      workers and by the same ways; None where that is ``jd.mean(axis)``.
  """

  name: str
  axis: Axis
  init: Callable[..., Any]
  exchange: Callable[[Any, Any], tuple[Any, Any, Any]]
  bytes_sent: Callable[[Any, Any], float]
  contraction: float = 1.0
  unbiased: bool = True
  agrees: bool = True
  late: bool = False
  encodes_twice: bool = False
  uncompressed: 'Callable[[], Communicator] | None' = None

  def __repr__(self) -> str:
    return self.name


def check_communicator(communicator: Any) -> None:
  """Raises if an argument is no communicator."""
  if not isinstance(communicator, Communicator):
    raise ValueError(
      f'communicator must be a jd.Communicator such as jd.mean(axis, code), '
      f'got {communicator!r}.'
    )


def check_together(communicators: Mapping[Any, Any] | Sequence[Any]) -> None:
  """Raises unless these are communicators that can be parts of one."""
  parts = communicators
  if isinstance(parts, Mapping):
    parts = list(parts.values())
  if not parts:
    raise ValueError('communicators must have at least one entry, got none.')
  for part in parts:
    check_communicator(part)
  axes = sorted({part.axis for part in parts}, key=repr)
  if len(axes) > 1:
    raise ValueError(f'communicators must share one axis, got {axes}.')
  if len({part.agrees for part in parts}) > 1:
    raise ValueError(
      'communicators must all agree between workers or all not; gossip does '
      f'not: got {communicators!r}.'
    )


def leaf_labels(
  tree: Any, labels: Any | Callable[[Any], Any], known: Collection[Any]
) -> list[Any]:
  """The label of each leaf of a tree.

  Args:
    tree: arrays, or shapes and dtypes.
    labels: a tree of labels shaped like it, or a function to such a tree. The
      tree may have None in place of leaves that are not asked for.
    known: labels that there are.

  Returns:
    Labels in the order of the leaves.

  Raises:
    ValueError: for a label that is not known.
  """
  named = labels(tree) if callable(labels) else labels
  names = placement.leaves_beside(tree, named)
  for name in names:
    if name not in known:
      raise ValueError(
        f'labels must be among {sorted(known, key=str)}, got {name!r}.'
      )
  return names


def is_exchanged(leaf: Any) -> bool:
  """Whether a leaf holds numbers at all: empty leaves pass by."""
  return leaf.size > 0


def exchanged_leaves(tree: Any, what: str = 'updates') -> list[Any]:
  """The leaves of a tree that are exchanged, in order.

  Args:
    tree: arrays, or shapes and dtypes.
    what: how to call the tree in an error.

  Returns:
    Leaves that are not empty.

  Raises:
    ValueError: if there are no leaves at all.
    TypeError: if a leaf is not real floating point.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  if not leaves:
    raise ValueError(f'{what} must have at least one leaf, got {tree!r}.')
  for path, leaf in leaves:
    if is_exchanged(leaf) and not jnp.issubdtype(leaf.dtype, jnp.floating):
      raise TypeError(
        f'{what} must be real floating point to be averaged; '
        f'{what}{jax.tree_util.keystr(path)} is {leaf.dtype}.'
      )
  return [leaf for _, leaf in leaves if is_exchanged(leaf)]


def all_finite(tree: Any) -> jax.Array:
  """Whether all numbers of a tree are finite."""
  finite = [jnp.all(jnp.isfinite(x)) for x in exchanged_leaves(tree)]
  return jnp.all(jnp.stack(finite)) if finite else jnp.array(True)


def where(condition: jax.Array, new: Any, old: Any) -> Any:
  """``new`` if a scalar condition holds, else ``old``, leaf by leaf."""
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def cast(x: jax.Array, dtype: Any) -> jax.Array:
  """Finite numbers in another dtype, cut to the range that it has."""
  top = min(float(jnp.finfo(t).max) for t in (x.dtype, dtype))
  return jnp.clip(x, -top, top).astype(dtype)


def check_not_reduced(tree: Any, axis: Axis) -> None:
  """Raises if a leaf is known to be the same on all workers already."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    for name in collectives.agrees_along(leaf, axis):
      if not is_exchanged(leaf):
        continue
      raise ValueError(
        f'updates must differ between the workers of axis {name!r}, but '
        f'updates{jax.tree_util.keystr(path)} is already the same on all: it '
        f'was reduced before, and compressing it would save nothing. Inside '
        f'jax.shard_map, jax.grad with respect to replicated parameters '
        f'reduces; differentiate with respect to '
        f"jax.lax.pcast(params, {axis!r}, to='varying')."
      )


def over_leaves(
  name: str,
  axis: Axis,
  init: Callable[[list[jax.ShapeDtypeStruct], bool], Any],
  exchange: Callable[[Leaves, Any], tuple[Leaves, Leaves, Any]],
  bytes_sent: Callable[[list[jax.ShapeDtypeStruct], Any], float],
  alone: Callable[[Leaves, Any], tuple[Leaves, Any]] = lambda *args: args,
  *,
  contraction: float,
  unbiased: bool,
  agrees: bool = True,
  late: bool = False,
  encodes_twice: bool = False,
  uncompressed: Callable[[], Communicator] | None = None,
) -> Communicator:
  """Makes a communicator from functions on a list of float32 leaves.

  Adds what all communicators share: the checks, one worker (nothing is sent and
  nothing is lost), leaves without numbers (they pass by), and the way from and
  to the tree and its dtypes.

  Args:
    name: see :class:`Communicator`.
    axis: see :class:`Communicator`.
    init: ``(shapes, feedback) -> state``.
    exchange: ``(leaves, state) -> (results, sents, state)``.
    bytes_sent: ``(shapes, workers) -> bytes``, for at least two workers.
    alone: ``(leaves, state) -> (results, state)`` of one worker, whose state
      may come from more; by default nothing is owed.
    contraction: see :class:`Communicator`.
    unbiased: see :class:`Communicator`.
    agrees: see :class:`Communicator`.
    late: see :class:`Communicator`; a result that a narrow dtype has no room
      for would be so each time, and is cut to its range.
    encodes_twice: see :class:`Communicator`.
    uncompressed: see :class:`Communicator`.

  Returns:
    The communicator.
  """

  def shapes_of(tree):
    return [
      jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
      for leaf in exchanged_leaves(tree)
    ]

  def init_fn(tree, feedback=False):
    collectives.axis_size(axis)  # Raises here if the axis is not bound.
    return init(shapes_of(tree), feedback)

  def exchange_fn(tree, state):
    leaves = exchanged_leaves(tree)

    def put(new, dtype=None):
      """The tree with new numbers."""
      new = iter(new)
      # Empty leaves are fresh where all is to agree: their type then says so.
      passed = lambda leaf: jnp.zeros(leaf.shape) if agrees else leaf
      fit = cast if late else (lambda x, dtype: x.astype(dtype))
      return jax.tree.map(
        lambda leaf: fit(
          next(new) if is_exchanged(leaf) else passed(leaf), dtype or leaf.dtype
        ),
        tree,
      )

    if collectives.axis_size(axis) == 1:
      results, state = alone(leaves, state)
      if agrees:
        # A sum over one worker moves nothing; it marks the result as agreed.
        results = collectives.psum(results, axis)
      return put(results), put(leaves, jnp.float32), state
    if not leaves:
      return put([]), put([], jnp.float32), state
    results, sents, state = exchange(
      [leaf.astype(jnp.float32) for leaf in leaves], state
    )
    return put(results), put(sents, jnp.float32), state

  def bytes_fn(tree, workers):
    if np.size(workers) != len(axis_names(axis)):
      raise ValueError(
        f'workers must say how many there are along {axis!r}, got {workers!r}.'
      )
    shapes = shapes_of(tree)
    is_alone = np.prod(workers) == 1
    return bytes_sent(shapes, workers) if shapes and not is_alone else 0.0

  return Communicator(
    name,
    axis,
    init_fn,
    exchange_fn,
    bytes_fn,
    contraction=contraction,
    unbiased=unbiased,
    agrees=agrees,
    late=late,
    encodes_twice=encodes_twice,
    uncompressed=uncompressed,
  )
