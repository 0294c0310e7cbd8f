"""Which leaves of the parameters are synchronised together."""

import math
import re
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdist.communicators.base import is_exchanged

Pattern = Literal['strided', 'sequential']

_UP_TO_NUMBER = re.compile(r'.*?\d+')


class Fragments(NamedTuple):
  """The fragment of each leaf of a tree, in the tree's order.

  Attributes:
    numbers: from 0; one for each leaf.
  """

  numbers: tuple[int, ...]

  def keep(self, tree: Any, fragment: int) -> Any:
    """The tree with the leaves of other fragments emptied: shape (0, ...).

    It has the tree's structure, so labels and specs still fit, and
    communicators let empty leaves pass by.
    """
    return self._fill(
      tree, fragment, lambda x: jnp.zeros((0, *x.shape[1:]), x.dtype)
    )

  def mask(self, tree: Any, fragment: int) -> Any:
    """The tree without the leaves of other fragments, as for optimizers."""
    return self._fill(tree, fragment, lambda _: optax.MaskedNode())

  def put(self, tree: Any, new: Any, fragment: int) -> Any:
    """The tree with the leaves of ``new``, as :meth:`mask` left them."""
    new = iter(jax.tree.leaves(new))
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten(
      next(new) if number == fragment else leaf
      for leaf, number in zip(leaves, self.numbers, strict=True)
    )

  def _fill(self, tree, fragment, other):
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten(
      leaf if number == fragment else other(leaf)
      for leaf, number in zip(leaves, self.numbers, strict=True)
    )


def assign(params: Any, fragments: int, pattern: Pattern | Any) -> Fragments:
  """Divides the leaves of parameters among fragments.

  A layer is what shares a path up to its first number, such as
  ``['blocks'][3]`` or ``['layer_3']``. ``'strided'`` deals layers in turn,
  ``'sequential'`` makes blocks of consecutive ones. Leaves outside of the
  layers go, the largest first, to the fragment that has the fewest numbers.
  With fewer layers than fragments, all leaves are dealt in that way
  (``'strided'``), or consecutive leaves make a block (``'sequential'``).

  A leaf is never cut. Where a model stacks its layers in one array, that array
  is one leaf and has one turn.

  Args:
    params: arrays, or shapes and dtypes.
    fragments: how many, at least 1.
    pattern: one of the above, or a tree of fragment numbers, shaped like the
      params or a prefix of them.

  Returns:
    The fragment of each leaf.

  Raises:
    ValueError: if a number is out of range, or a fragment would have no leaf.
  """
  if fragments == 1:
    return Fragments((0,) * len(jax.tree.leaves(params)))
  if isinstance(pattern, str):
    numbers = _numbers(params, fragments, pattern)
  else:
    numbers = jax.tree.leaves(
      jax.tree.broadcast(pattern, params, is_leaf=lambda x: x is None)
    )
    for number in numbers:
      if not isinstance(number, int) or not 0 <= number < fragments:
        raise ValueError(
          f'pattern must hold fragment numbers from 0 to {fragments - 1}, got '
          f'{number!r}.'
        )
  filled = {
    number
    for leaf, number in zip(jax.tree.leaves(params), numbers, strict=True)
    if is_exchanged(leaf)
  }
  missing = sorted(set(range(fragments)) - filled)
  if missing:
    raise ValueError(
      f'fragments must have at least one leaf each, got none for {missing} of '
      f'{fragments}, from {len(numbers)} leaves and pattern={pattern!r}.'
    )
  return Fragments(tuple(numbers))


def _numbers(params, fragments, pattern):
  named = jax.tree_util.tree_leaves_with_path(params)
  layer_of = [_layer(path) for path, _ in named]
  layers = sorted(
    {layer for layer in layer_of if layer is not None}, key=_natural
  )
  if len(layers) < fragments:
    layers = []
  if pattern == 'sequential' and not layers:
    return [i * fragments // len(named) for i in range(len(named))]
  place = {layer: i for i, layer in enumerate(layers)}
  numbers = [
    (
      place[layer] % fragments
      if pattern == 'strided'
      else place[layer] * fragments // len(layers)
    )
    if layer in place
    else None
    for layer in layer_of
  ]
  sizes = [math.prod(leaf.shape) for _, leaf in named]
  load = [0] * fragments
  for number, size in zip(numbers, sizes, strict=True):
    if number is not None:
      load[number] += size
  for i in sorted(range(len(named)), key=lambda i: -sizes[i]):
    if numbers[i] is None:
      numbers[i] = load.index(min(load))
      load[numbers[i]] += sizes[i]
  return numbers


def _layer(path):
  found = _UP_TO_NUMBER.match(jax.tree_util.keystr(path))
  return found.group() if found else None


def _natural(name):
  """Sorts layer 10 behind layer 9."""
  head, number = re.fullmatch(r'(.*?)(\d+)', name).groups()
  return head, int(number)
