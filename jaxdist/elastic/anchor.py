"""The outer parameters: what moves them, and where they are kept."""

import functools
import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from jaxdist.checkpoint import Saver, latest_step, restore
from jaxdist.communicators import checks
from jaxdist.elastic.delta import Change, Wire
from jaxdist.elastic.ledger import Tag
from jaxdist.transforms.base import all_finite, where, zeros


class Anchor:
  """Parameters in float32 and the outer optimizer's state, on one device.

  Args:
    params: to begin with, unless there are checkpoints.
    outer: any optimizer.
    wire: decodes changes.
    directory: for checkpoints; ``None``: none.
    save_every: moves between checkpoints.

  Attributes:
    first: the round to go on with.
  """

  def __init__(
    self,
    params: optax.Params,
    outer: optax.GradientTransformation,
    wire: Wire,
    directory: str | os.PathLike | None,
    save_every: int,
  ):
    self._save_every = checks.integer('save_every', save_every, 1)
    self._wire, self._outer = wire, outer
    start = jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)
    self._state = {'params': start, 'outer': outer.init(start)}
    self.first, self._unsaved, self._saver = 0, 0, None
    if directory is not None:
      # First of all: who was given up saves nothing from here on.
      self._saver = Saver(directory)
      if latest_step(directory) is not None:
        self._state = restore(directory, self._state)
        # An older one, if the newest was damaged.
        self.first = latest_step(directory)

  @property
  def params(self) -> optax.Params:
    """In the dtypes that they were given in."""
    cast = lambda a, x: a.astype(x.dtype)
    return jax.tree.map(cast, self._state['params'], self._wire.agreement.like)

  def pack(self, round: int) -> bytes:
    """The message of a round for the replicas."""
    return self._wire.pack_params(round, self._state['params'])

  def compile(self) -> None:
    """Compiles all that rounds need, and moves nothing."""
    nothing, _ = self._wire.decode(self._wire.nothing, 0, 0)
    total = self._add(zeros(self._state['params']), 1.0, nothing)
    self._follow(self._state, total, 1.0)

  def is_finite(self, tag: Tag, change: Change) -> bool:
    """Whether all numbers of a change are finite."""
    return bool(self._wire.decode(change.words, tag.round, tag.replica)[1])

  def move(
    self, changes: Mapping[Tag, Change], weights: Mapping[Tag, float]
  ) -> bool:
    """Lets the outer optimizer follow the weighted mean of changes.

    Args:
      changes: of finite numbers.
      weights: of each; added up in this order.

    Returns:
      Whether anything was to follow, and the result finite; else nothing moves.
    """
    weight = sum(weights.values())
    if not weight:
      return False
    total = zeros(self._state['params'])
    for tag, each in weights.items():
      words = changes[tag].words
      change, _ = self._wire.decode(words, tag.round, tag.replica)
      total = self._add(total, float(each), change)
    scale = 1 / max(1.0, weight)
    self._state, finite = self._follow(self._state, total, scale)
    self._unsaved += bool(finite)
    return bool(finite)

  def save(self, round: int) -> None:
    """Begins to save, once there were enough moves; ``round`` is the next.

    Raises:
      OSError: if the one before could not be written.
    """
    if self._saver is not None and self._unsaved >= self._save_every:
      self._saver.save(round, self._state)
      self._unsaved = 0

  def wait(self) -> None:
    """Until what was begun to be saved is."""
    if self._saver is not None:
      self._saver.wait()

  @functools.cached_property
  def _add(self):
    def add(total, weight, change):
      return jax.tree.map(lambda t, c: t + weight * c, total, change)

    return jax.jit(add)

  @functools.cached_property
  def _follow(self):
    outer = optax.with_extra_args_support(self._outer)

    def follow(state, total, scale):
      anchor = state['params']
      gradient = optax.tree.scale(-scale, total)
      updates, outer_state = outer.update(gradient, state['outer'], anchor)
      moved = optax.apply_updates(anchor, updates)
      finite = all_finite(moved)
      return where(
        finite, {'params': moved, 'outer': outer_state}, state
      ), finite

    return jax.jit(follow)
