"""One communicator for some leaves, another for the others."""

import collections
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxdist.communicators import base, collectives


def partition(
  communicators: Mapping[str, base.Communicator],
  labels: Any | Callable[[Any], Any],
) -> base.Communicator:
  """Sends each leaf through the communicator that its label names.

  Norms and biases are few numbers that lossy codes hurt: send them whole. Codes
  that draw random numbers draw others for each label, also where seeds are the
  same. **On the wire:** the sum of what the communicators send.

  Args:
    communicators: a communicator for each label.
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
    """The leaves of each label that occurs, and the way back."""
    leaves, treedef = jax.tree.flatten(tree)
    names = base.leaf_labels(tree, labels, communicators)
    parts = collections.defaultdict(list)
    for leaf, name in zip(leaves, names, strict=True):
      parts[name].append(leaf)

    def merge(parts):
      rest = {name: iter(part) for name, part in parts.items()}
      return treedef.unflatten([next(rest[name]) for name in names])

    return dict(sorted(parts.items())), merge

  def init(tree, feedback=False):
    base.exchanged_leaves(tree)
    parts, _ = split(tree)
    return {k: communicators[k].init(v, feedback) for k, v in parts.items()}

  def exchange(tree, state):
    parts, merge = split(tree)
    done = {}
    for label, part in parts.items():
      with collectives.member(sorted(communicators).index(label)):
        done[label] = communicators[label].exchange(part, state[label])
    result, sent, new_state = (
      {k: v[i] for k, v in done.items()} for i in range(3)
    )
    return merge(result), merge(sent), new_state

  def bytes_sent(tree, workers):
    parts, _ = split(tree)
    return sum(
      communicators[k].bytes_sent(v, workers) for k, v in parts.items()
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
  )
