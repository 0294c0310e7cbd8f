"""One communicator for some leaves, another for the others."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxdist.communicators import base, collectives
from jaxdist.communicators.uncompressed import of_parts


def partition(
  communicators: Mapping[str, base.Communicator],
  labels: Any | Callable[[Any], Any],
) -> base.Communicator:
  """Sends each leaf through the communicator that its label names.

  Norms and biases are few numbers that lossy codes hurt: send them whole. Codes
  that draw random numbers draw others for each label, also where seeds are the
  same. **On the wire:** the sum of what the communicators send.

  Args:
    communicators: a communicator for each label. It sees the whole tree, with
      None in place of the other leaves.
    labels: a tree of labels, shaped like the updates, or a function from the
      updates to such a tree, as for :func:`optax.partition`.

  Returns:
    A :class:`Communicator`.

  Raises:
    ValueError: if there are no communicators or one is something else, they run
      along different axes, some agree between workers and some don't, or a
      label is unknown (when ``init`` runs).

  Examples:
    >>> import jax.numpy as jnp
    >>> import jaxdist as jd
    >>> communicator = jd.partition(
    ...   {'matrix': jd.mean('data', jd.sign()), 'vector': jd.mean('data')},
    ...   lambda tree: jax.tree.map(
    ...     lambda x: 'matrix' if x.ndim > 1 else 'vector', tree
    ...   ),
    ... )
    >>> params = {'w': jnp.zeros((128, 256)), 'b': jnp.zeros(256)}
    >>> communicator.bytes_sent(params, workers=2)
    5248.0
  """
  base.check_together(communicators)
  one = next(iter(communicators.values()))

  def split(tree):
    """The tree of each label that occurs: None in place of other leaves."""
    leaves, treedef = jax.tree.flatten(tree)
    names = base.leaf_labels(tree, labels, communicators)
    return {
      label: treedef.unflatten(
        [
          leaf if name == label else None
          for leaf, name in zip(leaves, names, strict=True)
        ]
      )
      for label in sorted(set(names))
    }

  def merge(parts):
    is_none = lambda x: x is None
    pick = lambda *leaves: next((x for x in leaves if x is not None), None)
    return jax.tree.map(pick, *parts, is_leaf=is_none)

  def init(tree, feedback=False):
    base.exchanged_leaves(tree)
    return {
      k: communicators[k].init(part, feedback)
      for k, part in split(tree).items()
    }

  def exchange(tree, state):
    done = {}
    for label, part in split(tree).items():
      with collectives.member(sorted(communicators).index(label)):
        done[label] = communicators[label].exchange(part, state[label])
    results, sents, states = (
      {label: out[i] for label, out in done.items()} for i in range(3)
    )
    return merge(results.values()), merge(sents.values()), states

  def bytes_sent(tree, workers):
    return sum(
      communicators[k].bytes_sent(part, workers)
      for k, part in split(tree).items()
    )

  return base.Communicator(
    f'partition({dict(communicators)!r})',
    one.axis,
    init,
    exchange,
    bytes_sent,
    contraction=min(c.contraction for c in communicators.values()),
    unbiased=all(c.unbiased for c in communicators.values()),
    agrees=one.agrees,
    late=any(c.late for c in communicators.values()),
    encodes_twice=any(c.encodes_twice for c in communicators.values()),
    uncompressed=of_parts(
      communicators, lambda parts: partition(parts, labels)
    ),
  )
