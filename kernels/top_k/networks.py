"""Sorting networks across registers: each place in a register is by itself.

A comparison is two instructions, as nothing is carried along. A network is
thousands of them: it is under ``jit``, to be traced once for each length.
"""

from collections.abc import Callable, Sequence

import jax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from jaxdist.kernels.tpu import SUBLANES


def _exchange(items, i, j):
  a, b = items[i], items[j]
  items[i], items[j] = jax.lax.max(a, b), jax.lax.min(a, b)


@jax.jit
def in_order(items: Sequence[Array]) -> list[Array]:
  """Descending, by Batcher's merges of odd and even places."""
  items, n = list(items), len(items)
  p = 1
  while p < n:
    step = p
    while step:
      for low in range(step % p, n - step, 2 * step):
        for i in range(low, min(low + step, n - step)):
          if i // (2 * p) == (i + step) // (2 * p):
            _exchange(items, i, i + step)
      step //= 2
    p *= 2
  return items


@jax.jit
def merged(a: Sequence[Array], b: Sequence[Array]) -> list[Array]:
  """The larger half of two sorted lists, sorted."""
  n = len(a)
  items = [jax.lax.max(a[i], b[n - 1 - i]) for i in range(n)]
  step = n // 2
  while step:
    for i in range(n):
      if not i & step:
        _exchange(items, i, i + step)
    step //= 2
  return items


def largest(
  count: int, length: int, lists: int, load: Callable[[Array], Array]
) -> list[Array]:
  """The ``length`` largest of each list, sorted.

  Args:
    count: of registers.
    length: a power of two.
    lists: how many lie side by side in the sublanes of each lane; a list's
      parts are ``lists`` sublanes apart, and all get the result.
    load: a register.
  """

  def group(i):
    return in_order([load(i * length + j) for j in range(length)])

  best = jax.lax.fori_loop(
    1, count // length, lambda i, best: merged(best, group(i)), group(0)
  )
  shift = SUBLANES // 2
  while shift >= lists:
    best = merged(best, [pltpu.roll(item, shift, 0) for item in best])
    shift //= 2
  return best
