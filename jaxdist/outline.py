"""The shape of a tree without its leaves, and how it is written as bytes."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

_MAX_DEPTH = 64


class Outline(NamedTuple):
  """A node of a tree.

  Attributes:
    kind: ``'leaf'``, ``'None'``, ``'dict'``, ``'list'``, ``'tuple'``, or
      ``'other'`` for a node that only its class can rebuild.
    name: the class of such a node, and what it holds beside its children.
    keys: of a dict.
    children: of all but leaves and None.
  """

  kind: str
  name: str = ''
  keys: tuple[str | int, ...] = ()
  children: tuple['Outline', ...] = ()

  def parts(self) -> Iterator[tuple[str, 'Outline']]:
    """The children and how each is reached from here."""
    for index, child in enumerate(self.children):
      key = self.keys[index] if self.keys else index
      yield f'<{index}>' if self.kind == 'other' else f'[{key!r}]', child

  def leaf_paths(self, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The steps to each leaf, in the order of ``jax.tree.leaves``.

    Not joined: a message may have one long key above many leaves.
    """
    if self.kind == 'leaf':
      yield path
    for step, child in self.parts():
      yield from child.leaf_paths((*path, step))

  def first_other(self) -> str | None:
    """The name of a node that only its class can rebuild, if there is one."""
    if self.kind == 'other':
      return self.name
    names = (child.first_other() for child in self.children)
    return next(filter(None, names), None)

  def build(self, leaves: Iterator[Any]) -> Any:
    """The tree of these leaves; it has no node of kind ``'other'``."""
    if self.kind == 'leaf':
      return next(leaves)
    children = [child.build(leaves) for child in self.children]
    if self.kind == 'dict':
      return dict(zip(self.keys, children, strict=True))
    return {'None': lambda _: None, 'list': list, 'tuple': tuple}[self.kind](
      children
    )

  def __str__(self) -> str:
    if self.kind == 'dict':
      return f'a dict of {", ".join(map(repr, self.keys))}'
    if self.kind in ('list', 'tuple'):
      return f'a {self.kind} of {len(self.children)}'
    return self.name or {'leaf': 'a leaf'}.get(self.kind, self.kind)


_KINDS = ('leaf', 'None', 'dict', 'list', 'tuple', 'other')
_BUILT_IN = {type(None): 'None', dict: 'dict', list: 'list', tuple: 'tuple'}


def outline_of(tree: Any) -> Outline:
  """The outline of a tree.

  Raises:
    ValueError: if it is more than 64 nodes deep, or a dict has a key that is
      neither str nor int.
  """
  return _outline(jax.tree.structure(tree), 0)


def _outline(node, depth):
  if depth > _MAX_DEPTH:
    raise ValueError(f'the tree must be at most {_MAX_DEPTH} nodes deep.')
  if jax.tree_util.treedef_is_leaf(node) and node.num_leaves == 1:
    return Outline('leaf')
  cls, static = node.node_data()
  children = tuple(_outline(child, depth + 1) for child in node.children())
  kind = _BUILT_IN.get(cls, 'other')
  if kind == 'dict':
    for key in static:
      if type(key) not in (str, int):
        raise ValueError(f"a dict's key must be a str or an int, got {key!r}.")
    return Outline(kind, keys=tuple(static), children=children)
  # What such a node holds beside its children: the width of a payload's
  # numbers, the names of a flax.nnx.State.
  name = f'{cls.__name__}{_words(static)}' if kind == 'other' else ''
  return Outline(kind, name, children=children)


def _words(static):
  """The same words in every process: no addresses."""
  if isinstance(static, tuple | list):
    return f'({", ".join(map(_words, static))})'
  if isinstance(static, str | int | float):
    return repr(static)
  return '' if static is None else type(static).__name__


def difference(
  one: Outline, other: Outline, path: str = ''
) -> tuple[str, Outline, Outline] | None:
  """The first node where two trees differ: its path, and both; or None."""
  if one._replace(children=()) != other._replace(children=()):
    return path, one, other
  if len(one.children) != len(other.children):
    return path, one, other
  for (step, child), there in zip(one.parts(), other.children, strict=True):
    found = difference(child, there, path + step)
    if found is not None:
      return found
  return None


class Writer:
  """Writes outlines and small things.

  Attributes:
    data: what has been written.
  """

  def __init__(self):
    self.data = bytearray()

  def byte(self, value: int) -> None:
    """A number below 256."""
    self.data.append(value)

  def number(self, value: int) -> None:
    """A number from 0, seven bits a byte (LEB128)."""
    while value >= 128:
      self.data.append(value % 128 + 128)
      value //= 128
    self.data.append(value)

  def numbers(self, values: Sequence[int]) -> None:
    """Some numbers and how many."""
    self.number(len(values))
    for value in values:
      self.number(value)

  def text(self, value: str) -> None:
    """Some text."""
    encoded = value.encode()
    self.number(len(encoded))
    self.data += encoded

  def outline(self, node: Outline) -> None:
    """A tree's outline, parents first."""
    self.byte(_KINDS.index(node.kind))
    if node.kind in ('leaf', 'None'):
      return
    if node.kind == 'other':
      self.text(node.name)
    self.number(len(node.children))
    for index, child in enumerate(node.children):
      if node.kind == 'dict':
        key = node.keys[index]
        self.byte(isinstance(key, int))
        self.text(str(key))
      self.outline(child)


class Reader:
  """Reads what a :class:`Writer` wrote; raises ValueError if it is not that."""

  def __init__(self, data: memoryview):
    self._data = data

  def _take(self, count):
    if count > len(self._data):
      raise ValueError('the header ends too early.')
    taken, self._data = self._data[:count], self._data[count:]
    return taken

  def byte(self, below: int) -> int:
    """A number below a limit."""
    value = self._take(1)[0]
    if value >= below:
      raise ValueError(f'{value} stands where only less than {below} may be.')
    return value

  def number(self) -> int:
    """A number from 0, below ``2**63``."""
    value = 0
    for shift in range(0, 63, 7):
      byte = self._take(1)[0]
      value |= byte % 128 << shift
      if byte < 128:
        return value
    raise ValueError('a number is too large.')

  def numbers(self, most: int) -> tuple[int, ...]:
    """Some numbers, at most so many."""
    return tuple(self.number() for _ in range(self._count(most)))

  def text(self) -> str:
    """Some text."""
    return str(self._take(self.number()), 'utf-8')

  def end(self) -> None:
    """Raises if there is more."""
    if len(self._data):
      raise ValueError('the header goes on too long.')

  def outline(self, depth: int = 0) -> Outline:
    """A tree's outline."""
    if depth > _MAX_DEPTH:
      raise ValueError(f'the tree is more than {_MAX_DEPTH} nodes deep.')
    kind = _KINDS[self.byte(len(_KINDS))]
    if kind in ('leaf', 'None'):
      return Outline(kind)
    name = self.text() if kind == 'other' else ''
    keys, children = [], []
    # A child is a byte at least.
    for _ in range(self._count(len(self._data))):
      if kind == 'dict':
        is_int = self.byte(2)
        key = self.text()
        keys.append(int(key) if is_int else key)
      children.append(self.outline(depth + 1))
    if len(set(keys)) < len(keys):
      raise ValueError('a key stands twice in a dict.')
    return Outline(kind, name, tuple(keys), tuple(children))

  def _count(self, most):
    count = self.number()
    if count > most:
      raise ValueError(f'{count} stands where at most {most} may be.')
    return count
