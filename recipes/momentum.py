"""Compares where momentum is built up when a thousandth of numbers is sent.

  python recipes/momentum.py

Eight workers train a network of 64, 128 and 10 units on scikit-learn's digits.
Matrices are sent by the largest numbers of each block of 1024, biases whole:
all but the first method send the same bytes. ``gradient dropping`` feeds back
what was not sent and has its momentum behind the mean; DGC builds it up on each
worker. Five seeds, learning rates from one grid for all. On two CPU cores it
takes about 3 minutes. BUILD_NOTES.md has the table. Leaves JSON and plots in
out/momentum.
"""

import dataclasses
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import trials
import tyro
from rich.console import Console
from sklearn.datasets import load_digits
from trials import AXIS, Problem

import jaxdist as jd

WORKERS, EVERY, TAIL = 8, 20, 0.1
RATES = (0.03, 0.1, 0.3)
MOMENTUM = 0.9


@dataclasses.dataclass(frozen=True)
class Config:
  """The command line."""

  densities: tuple[float, ...] = (0.001, 0.002, 0.01)
  """Parts of the numbers that are sent."""
  seeds: int = 5
  """How many."""
  steps: int = 600
  """Of each run."""
  batch: int = 16
  """Images a worker a step."""
  out: Path = Path('out/momentum')
  """Folder for JSON and plots."""


def digits(batch: int) -> Problem:
  """Images divided among the workers at random; the measure is the loss of all.

  Args:
    batch: images in a gradient.

  Returns:
    The problem.
  """
  bunch = load_digits()
  x = jnp.asarray(bunch.data / 16, jnp.float32)
  y = jnp.asarray(bunch.target)
  images = len(x) // WORKERS

  def make(key):
    keys = jax.random.split(key, 3)
    params = {
      'w1': jax.random.normal(keys[0], (64, 128)) / 64**0.5,
      'b1': jnp.zeros(128),
      'w2': jax.random.normal(keys[1], (128, 10)) / 128**0.5,
      'b2': jnp.zeros(10),
    }
    order = jax.random.permutation(keys[2], len(x))[: images * WORKERS]
    return params, jax.tree.map(
      lambda a: a[order].reshape(WORKERS, images, *a.shape[1:]), (x, y)
    )

  def loss(params, data):
    x, y = data
    hidden = jax.nn.relu(x @ params['w1'] + params['b1'])
    logits = hidden @ params['w2'] + params['b2']
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

  def gradient(params, data, key):
    rows = jax.random.randint(key, (batch,), 0, images)
    return jax.grad(loss)(params, jax.tree.map(lambda a: a[rows], data))

  return Problem(
    make, gradient, lambda params, data: jax.lax.pmean(loss(params, data), AXIS)
  )


def methods(density: float) -> dict[str, optax.GradientTransformation]:
  """What is compared; each gives a direction with its momentum in it."""
  sparse = jd.mean(AXIS, jd.top_k(density), 'gather')
  # As DGC does by itself.
  parts = jd.partition(
    {'matrix': sparse, 'whole': jd.mean(AXIS)},
    lambda tree: jax.tree.map(
      lambda x: 'matrix' if x.ndim > 1 else 'whole', tree
    ),
  )
  with warnings.catch_warnings(action='ignore'):  # It says what is shown here.
    no_residual = jd.communicate(parts)
  behind = optax.trace(MOMENTUM)
  return {
    'dense': optax.chain(jd.communicate(jd.mean(AXIS)), behind),
    'DGC': jd.dgc(sparse, momentum=MOMENTUM),
    'DGC, no masking': jd.dgc(sparse, momentum=MOMENTUM, masking=False),
    'gradient dropping': optax.chain(jd.error_feedback(parts), behind),
    'no residual': optax.chain(no_residual, behind),
  }


def compare(
  density: float, config: Config, console: Console
) -> list[trials.Trial]:
  """All methods at one density."""
  return trials.best(
    methods(density),
    digits(config.batch),
    RATES,
    seeds=config.seeds,
    steps=config.steps,
    every=EVERY,
    tail=TAIL,
    console=console,
  )


def main() -> None:
  config = tyro.cli(Config, description=__doc__.partition('\n')[0])
  jax.config.update('jax_platforms', 'cpu')
  console = Console()
  shapes = jax.eval_shape(
    lambda: digits(config.batch).make(jax.random.key(0))[0]
  )
  numbers = sum(np.prod(s.shape) for s in jax.tree.leaves(shapes))
  dense = jd.mean(AXIS).bytes_sent(shapes, WORKERS)
  for density in config.densities:
    matrices = {k: s for k, s in shapes.items() if len(s.shape) > 1}
    vectors = {k: s for k, s in shapes.items() if len(s.shape) == 1}
    sparse = jd.mean(AXIS, jd.top_k(density), 'gather')
    sent = sparse.bytes_sent(matrices, WORKERS)
    sent += jd.mean(AXIS).bytes_sent(vectors, WORKERS)
    found = compare(density, config, console)
    title = (
      f'density {density:g}: loss; {sent:,.0f} bytes a step of {numbers:,} '
      f'numbers, {dense / sent:.1f} times fewer than dense'
    )
    console.print(trials.table(title, found, TAIL))
    trials.write(
      config.out,
      f'density-{density:g}',
      found,
      TAIL,
      {**dataclasses.asdict(config), 'out': None, 'bytes': sent},
      ('steps', EVERY),
      'loss',
    )


if __name__ == '__main__':
  main()
