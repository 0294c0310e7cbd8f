"""Kinds of compression at several levels, and feedback through one a matrix."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax
from place import AXIS

import jaxdist as jd

Levels = Mapping[Any, jd.Communicator]


class Kind(NamedTuple):
  """One way to compress, at several levels.

  Attributes:
    levels: communicators by label, from cheap to dear.
    cheaper: a label that one would take for all where bytes are dear.
    usual: the next one; what it drops bounds what a choice may drop.
    dearer: the next one.
  """

  levels: Levels
  cheaper: Any
  usual: Any
  dearer: Any


def kinds() -> dict[str, Kind]:
  """All, by name."""
  sparse = lambda k: jd.mean(AXIS, jd.top_k(k / 512, block_size=512), 'gather')
  dense = lambda code: jd.mean(AXIS, code, 'two_shot')
  codes = {
    'sign': jd.sign(block_size=128),
    **{f'{b} bits': jd.quantize(bits=b, block_size=128) for b in (2, 4, 8)},
  }
  return {
    'top-k of 512': Kind({k: sparse(k) for k in (1, 2, 4, 8, 16)}, 2, 4, 8),
    'bits': Kind(
      {k: dense(code) for k, code in codes.items()}, 'sign', '2 bits', '4 bits'
    ),
    'rank': Kind(
      {r: jd.low_rank_mean(AXIS, r) for r in (1, 2, 3, 4, 6, 8)}, 1, 2, 4
    ),
  }


def matrices(tree: Any) -> list:
  """What has levels: the leaves of more than one dimension."""
  return [x for x in jax.tree.leaves(tree) if x.ndim > 1]


def in_order(labels: list) -> Callable[[Any], Any]:
  """Labels of the leaves of a tree, whatever its structure."""
  return lambda tree: jax.tree.unflatten(jax.tree.structure(tree), labels)


def feedback(communicator: jd.Communicator) -> optax.GradientTransformation:
  """Feedback for matrices through a communicator; vectors whole."""
  parts = {'matrix': communicator, 'vector': jd.mean(AXIS)}
  kind = lambda x: 'matrix' if x.ndim > 1 else 'vector'
  return jd.error_feedback(
    jd.partition(parts, lambda tree: jax.tree.map(kind, tree))
  )
