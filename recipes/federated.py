"""Clients that differ, few at a time: averaging against controls.

  python recipes/federated.py quadratic
  python recipes/federated.py quadratic --noise 1
  python recipes/federated.py digits

``quadratic``: least squares of 16 clients with minima and curvatures of their
own, 8 in a round of 10 local steps; a tenth of the numbers is sent, chosen by
size or at random. ``digits``: softmax regression on scikit-learn's digits,
sorted by label, so that each of 20 clients has one or two digits; 5 in a round,
a twentieth of the numbers is sent.

Federated averaging, with and without feedback (Fed-EF), beside SCAFFOLD,
SCALLION and SCAFCOM; learning rates of local steps from one grid for all,
server learning rates that suit each. Five seeds; BUILD_NOTES.md has the tables.
Leaves JSON and a plot in out/federated.
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

LOCAL, TAIL = 10, 0.05
RATES = {
  'quadratic': (0.003, 0.01, 0.03),
  'digits': (0.01, 0.03, 0.1, 0.3),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """The command line."""

  experiment: tyro.conf.Positional[Literal['quadratic', 'digits']]
  """What to run."""
  noise: float = 0.0
  """Of the gradients of ``quadratic``, for each number."""
  batch: int = 30
  """Images a client a step in ``digits``."""
  rounds: int = 1000
  """Of 10 local steps."""
  seeds: int = 5
  """How many."""
  out: Path = Path('out/federated')
  """Folder for JSON and the plot."""


def quadratic(noise: float, clients: int = 16, size: int = 40) -> Problem:
  """Least squares; the measure is the norm of the mean gradient.

  Args:
    noise: standard deviation of each number of a gradient.
    clients: how many.
    size: unknowns.

  Returns:
    The problem.
  """

  def make(key):
    keys = jax.random.split(key, 3)
    axes = jax.random.orthogonal(keys[0], size, (clients,))
    curvature = jnp.exp(
      jax.random.uniform(keys[1], (clients, size), minval=-1.2, maxval=1.2)
    )
    hessians = jnp.einsum('cij,cj,ckj->cik', axes, curvature, axes)
    minima = 3 * jax.random.normal(keys[2], (clients, size))
    return jnp.zeros(size), (hessians, minima)

  def exact(params, data):
    hessian, minimum = data
    return hessian @ (params - minimum)

  def gradient(params, data, key):
    return exact(params, data) + noise * jax.random.normal(key, params.shape)

  return Problem(
    make,
    gradient,
    lambda params, data: jnp.linalg.norm(
      jax.lax.pmean(exact(params, data), AXIS)
    ),
  )


def digits(batch: int, clients: int = 20) -> Problem:
  """Softmax regression on images split by label; the measure is the loss.

  Args:
    batch: images in a gradient.
    clients: how many.

  Returns:
    The problem.
  """
  bunch = load_digits()
  order = jnp.argsort(jnp.asarray(bunch.target))
  images = len(order) // clients
  order = order[: images * clients].reshape(clients, images)
  data = (
    jnp.asarray(bunch.data / 16, jnp.float32)[order],
    jnp.asarray(bunch.target)[order],
  )

  def loss(params, data):
    x, y = data
    logits = x @ params['w'] + params['b']
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return losses.mean() + 1e-3 * jnp.sum(params['w'] ** 2)

  def make(key):
    weights = jax.random.normal(key, (64, 10)) / 64**0.5
    return {'w': weights, 'b': jnp.zeros(10)}, data

  def gradient(params, data, key):
    rows = jax.random.choice(key, images, (batch,), replace=False)
    return jax.grad(loss)(params, jax.tree.map(lambda a: a[rows], data))

  return Problem(
    make, gradient, lambda params, data: jax.lax.pmean(loss(params, data), AXIS)
  )


def methods(
  density: float, participation: float, server: float
) -> dict[str, trials.Method]:
  """What is compared; all but the first two send ``density`` of the numbers.

  Args:
    density: the part of the numbers.
    participation: the share of clients in a round.
    server: learning rate of averaging's server.

  Returns:
    Methods by name.
  """
  dense = jd.mean(AXIS)
  largest = jd.mean(AXIS, jd.global_top_k(density), 'gather')
  drawn = jd.mean(AXIS, jd.random_k(density, block_size=128, unbiased=True))
  options = {'every': LOCAL, 'participation': participation}

  def average(communicator, feedback=False):
    def method(rate):
      with warnings.catch_warnings(action='ignore'):  # Shown here.
        return jd.fedavg(
          optax.scale(-rate),
          optax.sgd(server),
          communicator,
          feedback=feedback,
          **options,
        )

    return method

  def control(communicator, server, make=jd.scallion, **given):
    return lambda rate: make(
      rate, communicator, server_learning_rate=server, **given, **options
    )

  return {
    'FedAvg': average(dense),
    'SCAFFOLD': control(dense, 0.3, scale=1.0),
    'FedAvg, random': average(drawn),
    'SCALLION, random': control(drawn, 1.0, scale=density),
    'SCALLION, random, scale 1': control(drawn, 1.0, scale=1.0),
    'FedAvg, largest': average(largest),
    'Fed-EF, largest': average(largest, feedback=True),
    'SCAFCOM, largest': control(largest, 1.0, jd.scafcom),
  }


def main() -> None:
  config = tyro.cli(Config, description=__doc__.partition('\n')[0])
  if config.experiment == 'quadratic':
    problem, compared = quadratic(config.noise), methods(0.1, 0.5, 0.1)
    what, name = 'gradient norm', f'quadratic-{config.noise:g}'
  else:
    problem, compared = digits(config.batch), methods(0.05, 0.25, 1.0)
    what, name = 'loss', 'digits'
  console = Console()
  found = trials.best(
    compared,
    problem,
    RATES[config.experiment],
    seeds=config.seeds,
    steps=LOCAL * config.rounds,
    every=LOCAL * 10,
    tail=TAIL,
    console=console,
  )
  console.print(trials.table(f'{name}: {what}', found, TAIL))
  settings = {**dataclasses.asdict(config), 'out': None}
  trials.write(config.out, name, found, TAIL, settings, ('rounds', 10), what)


if __name__ == '__main__':
  main()
