"""Trains a small network on digits by methods that keep momentum.

  python recipes/digits.py momentum
  python recipes/digits.py adam

Eight workers train a network of 64, 128 and 10 units on scikit-learn's digits;
each has some of the images, at random. ``momentum``: the largest numbers of
each block of 1024 of the matrices are sent, biases whole; all but the first
method send the same bytes. Gradient dropping feeds back what was not sent and
has its momentum behind the mean; DGC builds it up on each worker. ``adam``: one
bit a number, by 1-bit Adam and its siblings, and by feedback in front of Adam.

Five seeds, learning rates from one grid for all. On two CPU cores they take
about 3 minutes each. BUILD_NOTES.md has the tables. Leaves JSON and plots in
out/digits.
"""

import dataclasses
import warnings
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import optax
import trials
import tyro
from rich.console import Console
from sklearn.datasets import load_digits
from trials import AXIS, Problem

import jaxdist as jd

WORKERS, EVERY, TAIL = 8, 20, 0.1
RATES = {'momentum': (0.03, 0.1, 0.3), 'adam': (3e-4, 1e-3, 3e-3)}
MOMENTUM = 0.9
# Adam's variance is to come to rest in a fifth of the steps.
BETAS = {'b1': 0.9, 'b2': 0.99}


@dataclasses.dataclass(frozen=True)
class Config:
  """The command line."""

  experiment: tyro.conf.Positional[Literal['momentum', 'adam']]
  """What to run."""
  densities: tuple[float, ...] = (0.001, 0.01)
  """Parts of the numbers that are sent, for ``momentum``."""
  seeds: int = 5
  """How many."""
  steps: int = 300
  """Of each run."""
  batch: int = 16
  """Images a worker a step."""
  out: Path = Path('out/digits')
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


def in_parts(communicator: jd.Communicator) -> jd.Communicator:
  """Matrices through a communicator and biases whole, as DGC does by itself."""
  return jd.partition(
    {'matrix': communicator, 'whole': jd.mean(AXIS)},
    lambda tree: jax.tree.map(
      lambda x: 'matrix' if x.ndim > 1 else 'whole', tree
    ),
  )


def momentum_methods(density: float) -> dict[str, trials.Method]:
  """Momentum SGD, with what is sent so sparse."""
  sparse = jd.mean(AXIS, jd.top_k(density), 'gather')
  with warnings.catch_warnings(action='ignore'):  # It says what is shown here.
    no_residual = jd.communicate(in_parts(sparse))
  behind = optax.trace(MOMENTUM)
  directions = {
    'dense': optax.chain(jd.communicate(jd.mean(AXIS)), behind),
    'DGC': jd.dgc(sparse, momentum=MOMENTUM),
    'DGC, no masking': jd.dgc(sparse, momentum=MOMENTUM, masking=False),
    'gradient dropping': optax.chain(
      jd.error_feedback(in_parts(sparse)), behind
    ),
    'no residual': optax.chain(no_residual, behind),
  }
  return {name: trials.scaled(tx) for name, tx in directions.items()}


def adam_methods(steps: int) -> dict[str, trials.Method]:
  """Adam, and with one bit a number after warm-ups of some steps."""
  dense, sign = jd.mean(AXIS), jd.mean(AXIS, jd.sign(), 'two_shot')
  fifth, twentieth = steps // 5, steps // 20

  def one_bit(warmup, communicator=sign, make=jd.one_bit_adam, **options):
    return lambda rate: make(rate, communicator, warmup, **BETAS, **options)

  return {
    'Adam': one_bit(steps, dense),
    '1-bit Adam, 20%': one_bit(fifth),
    '1-bit Adam, 5%': one_bit(twentieth),
    '1-bit Adam, 1 step': one_bit(1),
    '0/1 Adam': one_bit(
      fifth, make=jd.zero_one_adam, double_every=steps // 10, max_local=4
    ),
    'LAMB': one_bit(steps, dense, jd.one_bit_lamb),
    '1-bit LAMB, 20%': one_bit(fifth, make=jd.one_bit_lamb),
    'feedback, then Adam': lambda rate: optax.chain(
      jd.error_feedback(sign), optax.adam(rate, **BETAS)
    ),
  }


def compare(
  title: str,
  methods: dict[str, trials.Method],
  config: Config,
  console: Console,
) -> list[trials.Trial]:
  """Runs methods, prints a table and leaves files.

  Args:
    title: what is compared.
    methods: by name.
    config: the command line.
    console: to print on.

  Returns:
    A trial for each method.
  """
  found = trials.best(
    methods,
    digits(config.batch),
    RATES[config.experiment],
    seeds=config.seeds,
    steps=config.steps,
    every=EVERY,
    tail=TAIL,
    console=console,
  )
  console.print(trials.table(f'{title}: loss', found, TAIL))
  settings = {**dataclasses.asdict(config), 'out': None}
  name = title.replace(' ', '-')
  trials.write(
    config.out, name, found, TAIL, settings, ('steps', EVERY), 'loss'
  )
  return found


def main() -> None:
  config = tyro.cli(Config, description=__doc__.partition('\n')[0])
  jax.config.update('jax_platforms', 'cpu')
  console = Console()
  shapes = jax.eval_shape(
    lambda: digits(config.batch).make(jax.random.key(0))[0]
  )
  if config.experiment == 'adam':
    compare('adam', adam_methods(config.steps), config, console)
    return
  dense = jd.mean(AXIS).bytes_sent(shapes, WORKERS)
  for density in config.densities:
    sparse = in_parts(jd.mean(AXIS, jd.top_k(density), 'gather'))
    sent = sparse.bytes_sent(shapes, WORKERS)
    methods = momentum_methods(density)
    compare(f'density {density:g}', methods, config, console)
    console.print(
      f'A worker sends {sent:,.0f} bytes a step, dense {dense:,.0f}.',
      highlight=False,
    )


if __name__ == '__main__':
  main()
