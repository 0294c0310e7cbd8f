"""State that differs between workers, and how it looks from outside.

All transforms are written from one worker's point of view. What differs
between workers sits in :class:`PerWorker`: inside a worker it holds that
worker's value, outside it holds all workers' values, stacked along a leading
axis that is sharded over the workers' mesh axis. All other leaves are the same
on every worker.
"""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int32

Resize = Literal['mean', 'split', 'zero']
Axis = str | tuple[str, ...]  # of the workers: one, or several, outermost first


def axis_names(axis: Axis) -> tuple[str, ...]:
  """The names of the axes that the workers lie along."""
  return (axis,) if isinstance(axis, str) else axis


@dataclasses.dataclass(frozen=True)
class PerWorker:
  """A subtree whose value differs between workers.

  Attributes:
    value: a pytree of arrays. In the worker view, this worker's; outside, all
      workers', with a leading worker axis.
    resize: what becomes of it when the number of workers changes. ``'mean'``
      keeps the mean over the workers, as residuals and drifting parameters
      need (integers, such as step counters, are the same on all workers and
      stay). ``'split'``: the workers hold consecutive rows of one array, which
      is cut anew. ``'zero'``: it is zeros for another number of workers.
      ``None``: it cannot be resized, and restoring it for another number of
      workers is refused.
    parts: how many parts the workers hold in turn, worker i that of number
      ``i % parts``. Only the workers of one part are taken together when their
      number changes; the number of parts cannot.
  """

  value: Any
  resize: Resize | None = 'mean'
  parts: int = 1


jax.tree_util.register_dataclass(
  PerWorker, data_fields=['value'], meta_fields=['resize', 'parts']
)


@dataclasses.dataclass(frozen=True)
class PerShard:
  """A subtree that each device inside a worker has a part of.

  Attributes:
    value: a pytree of arrays with a dimension for the shards: the second, or
      the only one of what is a scalar for each shard.
    axes: the mesh axes inside a worker that this dimension lies over.
  """

  value: Any
  axes: tuple[str, ...]


jax.tree_util.register_dataclass(
  PerShard, data_fields=['value'], meta_fields=['axes']
)


def shard_spec(ndim: int, axes: tuple[str, ...]) -> PartitionSpec:
  """PartitionSpec of a leaf of :class:`PerShard` inside a worker."""
  if not axes:
    return PartitionSpec()
  return PartitionSpec(None, axes) if ndim > 1 else PartitionSpec(axes)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Drifts:
  """A leafless mark in the state of a transform whose parameters drift.

  :func:`jaxdist.init` looks for it and keeps the parameters of such a
  transform one copy for each worker, through any Optax wrapper around it.
  """


@dataclasses.dataclass(frozen=True)
class Clock:
  """The steps of a transform that communicates in few of them.

  In each period there are as many turns, evenly spread, each with an exchange
  of its own. What an exchange of a turn needs may be there before its step
  begins: then :func:`jaxdist.train_step` makes that step a program of its own,
  in which the exchange lies open beside the forward and backward pass, and
  tells the transform its turn (``tx.update(..., turn=...)``). In other loops
  the transform branches on the turn by itself.

  Attributes:
    count: steps so far. The same on all workers.
    every: steps in a period.
    turns: turns in a period; divides ``every``.
    ahead: whether an exchange needs nothing of its own step.
  """

  count: Any
  every: int
  turns: int = 1
  ahead: bool = False

  def turn(self) -> Int32[Array, '']:
    """The turn that the coming step has; ``turns`` if it has none."""
    gap = self.every // self.turns
    count = self.count + 1
    return jnp.where(
      count % gap == 0, (count // gap - 1) % self.turns, self.turns
    )

  def next(self) -> 'Clock':
    """The clock one step later."""
    return dataclasses.replace(self, count=self.count + 1)

  def scope(self, turn: int) -> str:
    """A name that tells :func:`jaxdist.traffic` how often a turn comes."""
    steps = self.every - self.turns if turn == self.turns else 1
    common = math.gcd(self.every, steps)
    scope = f'jaxdist.every.{self.every // common}'
    return scope if steps == common else f'{scope}_{steps // common}'


jax.tree_util.register_dataclass(
  Clock, data_fields=['count'], meta_fields=['every', 'turns', 'ahead']
)


def is_per_worker(node: Any) -> bool:
  """Whether ``node`` is a :class:`PerWorker`: an ``is_leaf`` predicate."""
  return isinstance(node, PerWorker)


def map_per_worker(per_worker, shared, tree: Any) -> Any:
  """Maps leaves inside and outside of :class:`PerWorker` differently.

  Args:
    per_worker: applied to each array inside a :class:`PerWorker`.
    shared: applied to each other array.
    tree: any pytree.

  Returns:
    A tree of the same structure.
  """

  def visit(node):
    if is_per_worker(node):
      return dataclasses.replace(
        node, value=jax.tree.map(per_worker, node.value)
      )
    return shared(node)

  return jax.tree.map(visit, tree, is_leaf=is_per_worker)


def specs(tree: Any, axis: Axis) -> Any:
  """PartitionSpecs of a state, as seen from outside the workers.

  Args:
    tree: a state, or any pytree that may contain :class:`PerWorker`.
    axis: name of the mesh axis that the workers lie along, or of several.

  Returns:
    A tree of the same structure: ``P(axis)`` for per-worker leaves, ``P()`` for
    all others.

  Examples:
    >>> import jaxdist as jd
    >>> specs = jd.specs({'w': 1.0, 'residual': jd.PerWorker(2.0)}, 'data')
    >>> tuple(specs['w']), tuple(specs['residual'].value)
    ((), ('data',))
  """
  return map_per_worker(
    lambda _: PartitionSpec(axis), lambda _: PartitionSpec(), tree
  )


def local(tree: Any) -> Any:
  """The worker view of a state inside ``shard_map``: drops the worker axis.

  Args:
    tree: a state whose per-worker leaves are shards of shape ``(1, ...)``.

  Returns:
    The tree with per-worker leaves of shape ``(...)``.
  """
  return map_per_worker(lambda x: x[0], lambda x: x, tree)


def stacked(tree: Any) -> Any:
  """The inverse of :func:`local`: puts the worker axis back.

  Args:
    tree: a state in the worker view.

  Returns:
    The tree with per-worker leaves of shape ``(1, ...)``, ready to leave
    ``shard_map`` with ``out_specs=jd.specs(tree, axis)``.
  """
  return map_per_worker(lambda x: x[None], lambda x: x, tree)


def drifts(tree: Any) -> bool:
  """Whether a state belongs to a transform whose parameters drift."""
  is_mark = lambda node: isinstance(node, Drifts)
  return any(map(is_mark, jax.tree.leaves(tree, is_leaf=is_mark)))


def clock_ahead(tree: Any) -> Clock | None:
  """The clock whose turns :func:`jaxdist.train_step` gives own programs.

  ``None`` without one, and where there are several: their turns may coincide
  in any way.
  """
  is_clock = lambda node: isinstance(node, Clock)
  clocks = [
    node
    for node in jax.tree.leaves(tree, is_leaf=is_clock)
    if is_clock(node) and node.ahead
  ]
  return clocks[0] if len(clocks) == 1 else None
