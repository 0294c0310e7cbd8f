"""Each leaf by itself, at a level that may be chosen anew."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax

from jaxdist import state as worker_state
from jaxdist.communicators import base, collectives
from jaxdist.communicators.uncompressed import of_parts


def per_leaf(
  levels: Mapping[Hashable, base.Communicator],
  labels: Any | Callable[[Any], Any],
) -> base.Communicator:
  """Sends each leaf by itself, through the level that its label names.

  Levels are one method at several strengths, such as densities, bits or ranks.
  What a leaf's exchange remembers has the same shapes at all of them, so that
  labels may change during training: make the transform and the step anew with
  other labels, and go on with the same state. Nothing that was held back is
  lost; see :func:`jaxdist.lgreco` for labels worth having. A low-rank level
  keeps as many columns of its last subspace as it has, and draws others anew.

  :func:`jaxdist.partition` exchanges all leaves of a label together: fewer
  collectives, and a state that belongs to its labels. **On the wire:** the sum
  of what the levels send for each leaf, in collectives of its own.

  Args:
    levels: a communicator for each label.
    labels: a tree of labels, shaped like the updates, or a function from the
      updates to such a tree.

  Returns:
    A :class:`Communicator`.

  Raises:
    ValueError: if there are no levels or one is something else, they run along
      different axes, or some agree between workers and some don't; when
      ``init`` runs, if a label is unknown, or levels keep different things back
      for a leaf, which would then be lost in a change.

  Examples:
    >>> import jax.numpy as jnp
    >>> import jaxdist as jd
    >>> levels = {
    ...   density: jd.mean('data', jd.top_k(density), 'two_shot')
    ...   for density in (0.01, 0.02, 0.04)
    ... }
    >>> params = {'body': jnp.zeros((256, 256)), 'head': jnp.zeros((256, 64))}
    >>> def make(labels):
    ...   return jd.error_feedback(jd.per_leaf(levels, labels))
    >>> before = make({'body': 0.02, 'head': 0.02})
    >>> state = jd.init(before, params, axis='data', workers=8)
    >>> after = make({'body': 0.01, 'head': 0.04})  # Goes on with this state.
  """
  base.check_together(levels)
  one = next(iter(levels.values()))

  def leveled(tree):
    """The leaves, the level of each, and the way back."""
    leaves, treedef = jax.tree.flatten(tree)
    names = base.leaf_labels(tree, labels, levels)
    return leaves, [levels[name] for name in names], treedef

  def init(tree, feedback=False):
    base.exchanged_leaves(tree)
    leaves, _, _ = leveled(tree)
    return [_widest(levels, leaf, feedback) for leaf in leaves]

  def exchange(tree, state):
    leaves, chosen, treedef = leveled(tree)
    done = []
    together = zip(leaves, chosen, state, strict=True)
    for index, (leaf, level, kept) in enumerate(together):
      with collectives.member(index):  # Each draws for itself.
        done.append(level.exchange([leaf], kept))
    result, sent = (
      treedef.unflatten([trees[i][0] for trees in done]) for i in range(2)
    )
    return result, sent, [new for _, _, new in done]

  def bytes_sent(tree, workers):
    leaves, chosen, _ = leveled(tree)
    return sum(
      level.bytes_sent([leaf], workers)
      for leaf, level in zip(leaves, chosen, strict=True)
    )

  return base.Communicator(
    f'per_leaf({dict(levels)!r})',
    one.axis,
    init,
    exchange,
    bytes_sent,
    contraction=min(c.contraction for c in levels.values()),
    unbiased=all(c.unbiased for c in levels.values()),
    agrees=one.agrees,
    late=any(c.late for c in levels.values()),
    encodes_twice=any(c.encodes_twice for c in levels.values()),
    uncompressed=of_parts(levels, lambda parts: per_leaf(parts, labels)),
  )


def _widest(levels, leaf, feedback):
  """The state of the level that has most to remember of a leaf."""
  states = [level.init([leaf], feedback) for level in levels.values()]
  kinds = [_kind(state) for state in states]
  if any(kind != kinds[0] for kind in kinds):
    raise ValueError(
      f'levels must keep the same back of a leaf, or it would be lost in a '
      f'change: one method and one block_size for all, as in jd.mean(axis, '
      f'code, "two_shot"). They do not of {leaf.dtype}{list(leaf.shape)}: '
      f'{dict(levels)!r}.'
    )
  return max(states, key=lambda s: sum(x.size for x in jax.tree.leaves(s)))


def _kind(state):
  """What must be equal: the structure, and all that is a worker's own."""
  is_own = worker_state.is_per_worker
  nodes = filter(is_own, jax.tree.leaves(state, is_leaf=is_own))
  own = [(x.shape, x.dtype) for node in nodes for x in jax.tree.leaves(node)]
  return jax.tree.structure(state), own
