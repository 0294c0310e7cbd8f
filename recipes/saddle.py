"""Saddle points: what compressing operators does, and changes of them don't.

  python recipes/saddle.py bilinear
  python recipes/saddle.py adversary --messages 500

``bilinear``: eight workers' games x A y + a x + b y with a curved bottom, 25
numbers a player; a tenth of the numbers is sent. The measure is the distance to
the saddle point over that of the start. ``adversary``: softmax regression on
scikit-learn's digits, split by label, against a player who adds one image,
whose size costs him, to all images of a class; the measure is the norm of the
mean operator.

All methods have the same budget: bytes of so many float32 messages a worker.
Five seeds, the best of one grid of learning rates for each. BUILD_NOTES.md has
the tables. Leaves JSON in out/saddle.
"""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import trials
import tyro
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from trials import AXIS, Problem

import jaxdist as jd

WORKERS = 8
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1)
DENSITY, KEEP = 0.1, 0.9


@dataclasses.dataclass(frozen=True)
class Config:
  """The command line."""

  experiment: tyro.conf.Positional[Literal['bilinear', 'adversary']]
  """What to run."""
  messages: int = 2000
  """Float32 messages that a worker may send."""
  seeds: int = 5
  """How many."""
  out: Path = Path('out/saddle')
  """Folder for JSON."""


def bilinear(size: int = 25) -> Problem:
  """Games of which only the mean has nice singular values."""

  def make(key):
    keys = jax.random.split(key, 5)
    left, right = (jax.random.orthogonal(k, size) for k in keys[:2])
    mean = left @ jnp.diag(jnp.linspace(1.0, 10.0, size)) @ right
    apart = 2 * jax.random.normal(keys[2], (WORKERS, size, size))
    games = mean + apart - apart.mean(0)
    a, b = (10 * jax.random.normal(k, (WORKERS, size)) for k in keys[3:])
    curved = 0.5 * jnp.eye(size)
    block = jnp.block([[curved, mean], [-mean.T, curved]])
    there = jnp.linalg.solve(block, -jnp.concatenate([a.mean(0), -b.mean(0)]))
    there = jnp.broadcast_to(there, (WORKERS, 2 * size))
    return jnp.zeros(2 * size), (games, a, b, there)

  def operator(z, data, key):
    del key
    game, a, b, _ = data
    x, y = jnp.split(z, 2)
    return jnp.concatenate(
      [game @ y + a + 0.5 * x, -(game.T @ x + b - 0.5 * y)]
    )

  def measure(z, data):
    there = data[-1]
    return jnp.linalg.norm(z - there) / jnp.linalg.norm(there)

  return Problem(make, operator, measure)


def adversary(cost: float = 1.0, images: int = 50) -> Problem:
  """A linear model, and an image to add to each class; few images a worker."""
  bunch = load_digits()
  order = np.argsort(bunch.target[: images * WORKERS], kind='stable')
  order = order.reshape(WORKERS, images)
  x = jnp.asarray(bunch.data / 16, jnp.float32)[order]
  y = jnp.asarray(bunch.target)[order]

  def payoff(z, data):
    x, y = data
    logits = (x + z['image'][y]) @ z['w']
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    own = 0.01 * jnp.sum(z['w'] ** 2) - cost / 2 * jnp.sum(z['image'] ** 2)
    return losses.mean() + own

  def make(key):
    return {
      'w': jax.random.normal(key, (64, 10)) / 64**0.5,
      'image': jnp.zeros((10, 64)),
    }, (x, y)

  def operator(z, data, key):
    del key
    grads = jax.grad(payoff)(z, data)
    return {'w': grads['w'], 'image': -grads['image']}

  def measure(z, data):
    return optax.tree.norm(jax.lax.pmean(operator(z, data, None), AXIS))

  return Problem(make, operator, measure)


class ExtragradientState(NamedTuple):
  """Where a step began, and whether it is half done."""

  start: optax.Params
  half: jax.Array
  inner: optax.OptState


def extragradient(
  exchange: optax.GradientTransformation, rate: float
) -> optax.GradientTransformation:
  """Each step takes two updates, both exchanged."""

  def init_fn(params):
    return ExtragradientState(params, jnp.array(False), exchange.init(params))

  def update_fn(updates, state, params):
    mean, inner = exchange.update(updates, state.inner, params)
    there = jax.tree.map(lambda z, f: z - rate * f, state.start, mean)
    start = jax.tree.map(
      lambda z, t: jnp.where(state.half, t, z), state.start, there
    )
    moves = optax.tree.sub(there, params)
    return moves, ExtragradientState(start, ~state.half, inner)

  return optax.GradientTransformation(init_fn, update_fn)


def methods() -> dict[str, tuple[trials.Method, float]]:
  """What is compared, with the float32 messages that an update costs."""
  dense, few = jd.mean(AXIS), DENSITY
  # Numbers' places count as 32 bits each.
  sparse = 2 * DENSITY
  largest = jd.mean(AXIS, jd.global_top_k(DENSITY), 'gather')
  drawn = jd.mean(AXIS, jd.random_k(DENSITY, block_size=128, unbiased=True))
  with warnings.catch_warnings(action='ignore'):  # Shown here.
    told, told_largest = jd.communicate(drawn), jd.communicate(largest)
  # One update in 2 - KEEP is an exchange of changes, the others are whole.
  mixed = lambda cost: (cost + (1 - KEEP)) / (2 - KEEP)
  return {
    'extragradient': (
      lambda rate: extragradient(jd.communicate(dense), rate),
      1.0,
    ),
    'MASHA1, random': (
      lambda rate: jd.masha1(rate, drawn, keep=KEEP),
      mixed(few),
    ),
    'MASHA2, largest': (
      lambda rate: jd.masha2(rate, largest, keep=KEEP),
      mixed(sparse),
    ),
    'descent-ascent, random': (trials.scaled(told), few),
    'descent-ascent, largest, feedback': (
      trials.scaled(jd.error_feedback(largest)),
      sparse,
    ),
    'extragradient, random': (lambda rate: extragradient(told, rate), few),
    'extragradient, largest': (
      lambda rate: extragradient(told_largest, rate),
      sparse,
    ),
  }


def ends(
  name: str, problem: Problem, rates, messages: int, seeds: int
) -> np.ndarray:
  """Median of the measure at the end of a budget, ``(seeds, rates)``."""
  method, cost = methods()[name]
  every = 50
  steps = every * max(20, round(messages / cost / every))
  curves = trials.run(method, problem, rates, seeds, steps, every)
  return np.median(curves[:, :, -10:], axis=2)


def main() -> None:
  config = tyro.cli(Config, description=__doc__.partition('\n')[0])
  problem = {'bilinear': bilinear, 'adversary': adversary}[config.experiment]()
  console, rows = Console(), []
  table = Table('method', 'rate', 'mean', 'least', 'most')
  for name in methods():
    with console.status(name):
      found = ends(name, problem, RATES, config.messages, config.seeds)
    # NaN, from a rate at which it diverged, must not win.
    score = np.nan_to_num(np.median(found, axis=0), nan=np.inf)
    best = int(np.argmin(score))
    last = found[:, best]
    numbers = [f'{x:.3g}' for x in (last.mean(), last.min(), last.max())]
    table.add_row(name, f'{RATES[best]:g}', *numbers)
    rows.append({'method': name, 'rate': RATES[best], 'ends': last.tolist()})
  console.print(table)
  config.out.mkdir(parents=True, exist_ok=True)
  path = config.out / f'{config.experiment}.json'
  settings = {**dataclasses.asdict(config), 'out': None}
  path.write_text(
    json.dumps({'settings': settings, 'methods': rows}, indent=2) + '\n'
  )


if __name__ == '__main__':
  main()
