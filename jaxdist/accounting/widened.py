"""Finds numbers that a backend sends wider than they were asked for."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from jaxdist.accounting.collective import Collective

_ASKING = re.compile(
  r'(psum|all_gather|reduce_scatter|all_to_all|ppermute|pmax|pmin)'
  r'(_invariant)?'
)


def notes(jaxpr: Any, rows: Iterable[Collective]) -> tuple[str, ...]:
  """Compares the collectives of a traced function with those that are sent.

  Args:
    jaxpr: the traced function. Collectives that the partitioner inserts are
      not in it, and nothing is said of them.
    rows: what its program sends.

  Returns:
    A sentence for each type that is sent as a wider one, and nothing else of
    the same size as itself.
  """
  sent: dict[int, set[str]] = {}
  for row in rows:
    sent.setdefault(int(np.prod(row.shape)), set()).add(row.dtype)
  found = {
    (asked, by)
    for size, asked in asked_for(jaxpr)
    if asked not in sent.get(size, {asked})
    for by in sent[size]
    if _bits(by) > _bits(asked)
  }
  return tuple(
    f'{asked} is sent as {by}: this backend has no narrower form.'
    for asked, by in sorted(found)
  )


def asked_for(jaxpr: Any) -> Iterator[tuple[int, str]]:
  """Number of elements and type of all that a function gives to collectives."""
  for equation in jaxpr.eqns:
    if _ASKING.fullmatch(equation.primitive.name):
      for value in equation.invars:
        if hasattr(value.aval, 'dtype'):
          yield value.aval.size, value.aval.dtype.name
    for inner in _jaxprs(equation.params.values()):
      yield from asked_for(inner)


def _jaxprs(values: Iterable[Any]) -> Iterator[Any]:
  for value in values:
    if hasattr(value, 'eqns'):
      yield value
    elif isinstance(value, tuple | list):
      yield from _jaxprs(value)


def _bits(dtype: str) -> int:
  found = re.search(r'\d+', dtype)
  return int(found.group()) if found else 8
