"""Solves least squares from sketches of gradients an eighth as long.

  python recipes/sketch.py

Iterated sketching, by three families: a rotation with random signs, and as many
of the rotated numbers as the sketch is long (SRHT); count sketches; Gaussian
matrices; drawn anew each round from a seed that all workers share. They are
linear, so one all-reduce adds the workers' sketches up, and unbiased, so they
need no feedback; but their noise makes steps of 1 / L diverge, and steps
shorter by 1 + alpha take as many more rounds: what is saved is bytes a round,
not bytes in all. Shown beside a sketch that stays the same, which moves in few
directions only, random_k, and noise of each worker's own before it sends (the
private form).

Eight workers, 256 unknowns, five seeds; in a minute on two CPU cores.
BUILD_NOTES.md has the table.

Song et al, `Sketching for First Order Method
<https://arxiv.org/abs/2210.08371>`_, 2023.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import trials
import tyro
from rich.console import Console
from rich.table import Table
from trials import AXIS, Problem

import jaxdist as jd

SIZE, WORKERS, ROWS, DENSITY = 256, 8, 64, 1 / 8
NOISE = 1e-3  # Of each number; first gradients are of length 10.
CODE = jd.rotated(jd.random_k(DENSITY, block_size=SIZE, unbiased=True))


@dataclasses.dataclass(frozen=True)
class Config:
  """The command line."""

  seeds: int = 5
  """How many."""
  rounds: int = 400
  """Of dense steps; sketches take as many more as they are shorter."""


def least_squares() -> Problem:
  """Each worker has some equations, scaled so that L is one.

  Returns:
    The problem; its measure is the distance to the solution, relative to that
    of the start.
  """

  def make(key):
    a_key, x_key = jax.random.split(key)
    a = jax.random.normal(a_key, (WORKERS, ROWS, SIZE))
    total = jnp.einsum('wri,wrj->ij', a, a) / WORKERS
    a = a / jnp.sqrt(jnp.linalg.norm(total, 2))
    x = jax.random.normal(x_key, (SIZE,))
    solution = jnp.broadcast_to(x, (WORKERS, SIZE))
    return jnp.zeros(SIZE), (a, a @ x, solution)

  def gradient(x, data, key):
    del key
    a, b, _ = data
    return a.T @ (a @ x - b)

  def measure(x, data):
    return jnp.linalg.norm(x - data[2]) / jnp.linalg.norm(data[2])

  return Problem(make, gradient, measure)


def sketched(code: jd.Compressor | None, noise: float = 0.0) -> trials.Method:
  """Gradient descent on the mean of sketches, of gradients with noise."""
  return trials.scaled(
    optax.chain(
      jd.worker_noise(AXIS, noise), jd.communicate(jd.mean(AXIS, code))
    )
  )


def ways() -> dict[str, tuple[trials.Method, float, int]]:
  """By name: a method, its learning rate, and its rounds for one dense one."""
  same = CODE.at(jax.random.key(0))
  fixed = dataclasses.replace(CODE, seeded=lambda key: same)
  options = {'density': DENSITY, 'block_size': SIZE}
  random_k = jd.random_k(unbiased=True, **options)
  times = round(1 / DENSITY)

  def way(code, noise=0.0):
    # 2 - contraction is 1 + alpha.
    return sketched(code, noise), 1 / (2 - code.contraction), times

  return {
    'dense': (sketched(None), 1.0, 1),
    'SRHT': way(CODE),
    'count sketch': way(jd.sketch(**options)),
    'Gaussian sketch': way(jd.sketch(family='gaussian', **options)),
    'random_k': way(random_k),
    'SRHT, fixed': way(fixed),
    'SRHT, rate 1 / L': (sketched(CODE), 1.0, times),
    f'SRHT, noise {NOISE}': way(CODE, NOISE),
  }


def ends(name: str, seeds: int, rounds: int) -> np.ndarray:
  """How far each seed is from the solution at the end.

  Args:
    name: in :func:`ways`.
    seeds: how many.
    rounds: dense ones, of which others take a multiple.

  Returns:
    Relative distances.
  """
  method, rate, times = ways()[name]
  steps = rounds * times
  curves = trials.run(method, least_squares(), [rate], seeds, steps, steps)
  return curves[:, 0, -1]


def main() -> None:
  config = tyro.cli(Config, description=__doc__.partition('\n')[0])
  jax.config.update('jax_platforms', 'cpu')
  table = Table('way', 'rounds', 'bytes', 'mean', 'least', 'most')
  for name, (_, _, times) in ways().items():
    found = ends(name, config.seeds, config.rounds)
    rounds = config.rounds * times
    code = jd.mean(AXIS, None if name == 'dense' else CODE)
    sent = rounds * code.bytes_sent(jnp.zeros(SIZE), WORKERS)
    numbers = [f'{x:.3g}' for x in (found.mean(), found.min(), found.max())]
    table.add_row(name, str(rounds), f'{sent:,.0f}', *numbers)
  Console().print(table)


if __name__ == '__main__':
  main()
