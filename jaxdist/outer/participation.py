"""Rounds in which some of the workers take part."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxdist.communicators import collectives
from jaxdist.state import Axis


def check_participation(participation: float) -> None:
  """Raises unless it is a share of workers."""
  if not 0 < participation <= 1:
    raise ValueError(f'participation must be in (0, 1], got {participation}.')


def num_drawn(participation: float, workers: int) -> int:
  """How many workers take part in a round: at least one."""
  return max(1, round(participation * workers))


def drawn_weight(
  axis: Axis, participation: float, seed: int
) -> Callable[[jax.Array], jax.Array]:
  """Draws m of W workers in each round, without replacement.

  Args:
    axis: that the workers lie along, or several.
    participation: their share; m is rounded, and at least 1.
    seed: of the draws, the same on all workers.

  Returns:
    From the number of rounds so far to W / m on a worker that is drawn, and 0
    on others: the mean over workers is 1 in every round.
  """

  def weight(count):
    workers = collectives.axis_size(axis)
    participants = num_drawn(participation, workers)
    if participants == workers:
      return jnp.ones(())
    key = jax.random.fold_in(jax.random.key(seed), count)
    place = jax.random.permutation(key, workers)
    drawn = jnp.where(place < participants, workers / participants, 0.0)
    return drawn[jax.lax.axis_index(axis)]

  return weight
