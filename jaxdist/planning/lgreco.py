"""L-GreCo: how exactly to send each leaf, under a bound on the error of all."""

import collections
import functools
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float32

from jaxdist.communicators import base, checks

# Exchanges of the same numbers; a low-rank level finds its subspace in a few.
_EXCHANGES = 4


def level_errors(
  levels: Mapping[Hashable, base.Communicator], tree: Any
) -> Float32[Array, 'leaves levels']:
  r"""How much each level drops of each leaf: :math:`|x - D(E(x))|_2`.

  Sends nothing. To have the mean over workers, vmap it over their gradients.

  Args:
    levels: communicators, as for :func:`jaxdist.per_leaf`.
    tree: what would be sent, such as a gradient over many examples.

  Returns:
    A row for each leaf, in the order of ``jax.tree.leaves``.

  Raises:
    ValueError: if ``levels`` are not communicators that work together.

  Examples:
    >>> import jaxdist as jd
    >>> levels = {
    ...   k: jd.mean('data', jd.top_k(k / 128, block_size=128)) for k in (1, 2)
    ... }
    >>> jd.level_errors(levels, jnp.array([3.0, 2.0, 1.0])).round(2)
    Array([[2.24, 1.  ]], dtype=float32)
  """
  base.check_together(levels)
  leaves = base.exchanged_leaves(tree, 'tree')

  def error(level, leaf):
    def worker(x):
      def again(state, _):
        _, [sent], state = level.exchange([x], state)
        return state, jnp.linalg.norm(jnp.ravel(x.astype(jnp.float32) - sent))

      return jax.lax.scan(again, level.init([x]), length=_EXCHANGES)[1][-1]

    # One worker would drop nothing: two that have the same.
    same = jnp.broadcast_to(leaf, (2, *leaf.shape))
    return jax.vmap(worker, axis_name=level.axis)(same)[0]

  # Leaves of one shape are measured by one program, one after another.
  alike = collections.defaultdict(list)
  for place, leaf in enumerate(leaves):
    alike[leaf.shape, leaf.dtype].append(place)
  found = jnp.zeros((len(leaves), len(levels)), jnp.float32)
  for places in alike.values():
    stacked = jnp.stack([leaves[place] for place in places])
    for column, level in enumerate(levels.values()):
      errors = jax.lax.map(functools.partial(error, level), stacked)
      found = found.at[np.array(places), column].set(errors)
  return found


def lgreco(
  levels: Mapping[Hashable, base.Communicator],
  errors: ArrayLike,
  tree: Any,
  *,
  uniform: Hashable,
  workers: int,
  tolerance: float = 1.0,
) -> Any:
  r"""Labels for :func:`jaxdist.per_leaf` that send the fewest bytes.

  .. math::

    \min_c \sum_l \text{bytes}_{l, c_l} \quad \text{with} \quad
    \sum_l \text{error}_{l, c_l} \le \alpha \sum_l \text{error}_{l, u}

  with u the level that one would take for all leaves. Solved on the host by
  dynamic programming over the leaves, errors rounded up to a ten-thousandth of
  the bound, so that it always holds. Choose anew every few hundred steps::

    errors = level_errors(levels, gradient)
    labels = jd.lgreco(levels, errors, params, uniform=0.01, workers=8)
    tx = make(jd.per_leaf(levels, labels))  # The state goes on with it.
    step = jd.train_step(loss, tx, ...)

  and save the labels with the state (``jd.save(..., metadata=...)``).

  Args:
    levels: communicators, from cheap to dear or in any order.
    errors: a row for each leaf that is not empty, a column for each level, as
      from :func:`jaxdist.level_errors`. Sums of errors are bounded: give their
      squares to bound the error of all leaves together.
    tree: the params, or their shapes and dtypes.
    uniform: u, a label of ``levels``.
    workers: how many there will be.
    tolerance: :math:`\alpha`; more than 1 sends less than u would bear.

  Returns:
    A tree of labels, shaped like ``tree``. They never send more than u, with a
    tolerance of at least 1.

  Raises:
    ValueError: if ``uniform`` is no label, ``errors`` do not fit, or the bound
      is below what the most exact levels drop.

  Examples:
    >>> import jaxdist as jd
    >>> levels = {k: jd.mean('data', jd.top_k(k / 1024)) for k in (5, 10, 20)}
    >>> params = {'a': jnp.zeros((256, 256)), 'b': jnp.zeros((64, 64))}
    >>> errors = jnp.array([[1.2, 1.0, 0.7], [9.0, 7.0, 5.0]])  # Of a, of b.
    >>> jd.lgreco(levels, errors, params, uniform=10, workers=8)
    {'a': 5, 'b': 20}

  References:
    Alimohammadi et al, `L-GreCo <https://arxiv.org/abs/2210.17357>`_, 2024
    (algorithm 1)
  """
  base.check_together(levels)
  names = list(levels)
  if uniform not in levels:
    raise ValueError(f'uniform must be among {names}, got {uniform!r}.')
  if not tolerance > 0:
    raise ValueError(f'tolerance must be positive, got {tolerance}.')
  workers = checks.integer('workers', workers, 1)
  errors = np.asarray(errors, np.float64)
  leaves = base.exchanged_leaves(tree, 'tree')
  if errors.shape != (len(leaves), len(names)):
    raise ValueError(
      f'errors must have a row for each of {len(leaves)} leaves and a column '
      f'for each of {len(names)} levels, got shape {errors.shape}.'
    )
  costs = np.array(
    [
      [c.bytes_sent([leaf], workers) for c in levels.values()]
      for leaf in leaves
    ]
  )
  bound = tolerance * errors[:, names.index(uniform)].sum()
  chosen = iter(choose_levels(errors, costs, bound))
  return jax.tree.map(
    lambda leaf: names[next(chosen)] if base.is_exchanged(leaf) else uniform,
    tree,
  )


def choose_levels(
  errors: ArrayLike, costs: ArrayLike, bound: float, resolution: int = 10_000
) -> list[int]:
  """The cheapest choice of a column in each row with errors below a bound.

  Args:
    errors: not negative, ``(rows, columns)``.
    costs: of the same shape.
    bound: of the sum of the chosen errors.
    resolution: parts of the bound that errors are rounded up to. The choice
      costs no more than the best one under a bound smaller by a part a row, nor
      than one column for all rows, if that keeps the bound.

  Returns:
    A column for each row.

  Raises:
    ValueError: if a number is not finite or negative, or nothing keeps the
      bound.
  """
  errors, costs = (np.asarray(x, np.float64) for x in (errors, costs))
  for name, x in (('errors', errors), ('costs', costs), ('bound', bound)):
    if not np.all(np.isfinite(x) & (np.asarray(x) >= 0)):
      raise ValueError(f'{name} must be finite and not negative, got {x}.')
  if errors.shape != costs.shape or errors.ndim != 2:
    raise ValueError(
      f'errors and costs must be of one shape (rows, columns), got '
      f'{errors.shape} and {costs.shape}.'
    )
  rows, columns = errors.shape
  total = lambda x, choice: x[np.arange(rows), choice].sum()

  # The least errors, with the cheapest of equals; the same for all; and:
  exact = np.lexsort((costs, errors))[:, 0]
  choices = [exact, *(np.full(rows, j) for j in range(columns))]
  choices += _by_dynamic_programming(errors, costs, bound, resolution)
  # Sums in another order may differ in their last digits.
  within = [c for c in choices if total(errors, c) <= bound * (1 + 1e-12)]
  if not within:
    raise ValueError(
      f'bound must be at least the sum of the least errors, '
      f'{total(errors, exact):g}, got {bound:g}.'
    )
  best = min(within, key=lambda c: (total(costs, c), total(errors, c)))
  return best.tolist()


def _by_dynamic_programming(errors, costs, bound, resolution):
  """The cheapest choice by errors rounded up, in a list; empty if none is."""
  if bound == 0:
    return []
  units = np.ceil(np.minimum(errors / bound, 2) * resolution).astype(int)
  cheapest = np.zeros(resolution + 1)  # With at most so many units so far.
  taken = []
  for row_units, row_costs in zip(units, costs, strict=True):
    table = np.full((len(row_costs), resolution + 1), np.inf)
    for column, (unit, cost) in enumerate(
      zip(row_units, row_costs, strict=True)
    ):
      table[column, unit:] = cheapest[: max(0, resolution + 1 - unit)] + cost
    taken.append(table.argmin(axis=0))
    cheapest = table.min(axis=0)
  if np.isinf(cheapest[-1]):
    return []
  left = int(np.argmax(cheapest == cheapest[-1]))  # No more units than needed.
  choice = []
  for row_units, columns in zip(units[::-1], taken[::-1], strict=True):
    choice.append(columns[left])
    left -= row_units[columns[left]]
  return [np.array(choice[::-1], int)]
