"""Trains the language model by Adam, and by Adam with one bit a number.

  python recipes/one_bit.py

The model and text of lm.py, 8 workers. 1-bit Adam warms up for a quarter of the
steps, then sends the momentum of matrices as signs, both ways, and vectors
whole; beside it Adam, and Adam behind gradients sent in the same way. Three
seeds; on two CPU cores it takes about 10 minutes. BUILD_NOTES.md has the table.
"""

import dataclasses

import jax
import lm
import methods
import numpy as np
import optax
import report
import text
import tyro
from place import AXIS, prepare_devices
from rich.console import Console
from rich.table import Table

import jaxdist as jd

# The variance is to come to rest in the warm-up.
BETAS = {'b1': 0.9, 'b2': 0.99}


@dataclasses.dataclass(frozen=True)
class Config:
  """The command line."""

  seeds: int = 3
  """How many."""
  steps: int = 400
  """Of each run."""
  lr: float = 4e-3
  """Peak learning rate of all."""


def signs() -> jd.Communicator:
  """Matrices in one bit a number, vectors whole."""
  return jd.partition(
    {'matrix': jd.mean(AXIS, jd.sign(), 'two_shot'), 'vector': jd.mean(AXIS)},
    lambda tree: jax.tree.map(
      lambda x: 'matrix' if x.ndim > 1 else 'vector', tree
    ),
  )


def ways(warmup: int) -> list[methods.Method]:
  """What is compared."""

  def adam(axis, rate):
    return optax.chain(jd.communicate(jd.mean(axis)), optax.adam(rate, **BETAS))

  def one_bit(axis, rate):
    return jd.one_bit_adam(rate, signs(), warmup, **BETAS)

  def feedback(axis, rate):
    return optax.chain(jd.error_feedback(signs()), optax.adam(rate, **BETAS))

  builds = {
    'Adam': adam,
    '1-bit Adam': one_bit,
    'feedback, then Adam': feedback,
  }
  return [
    methods.Method(name, name, 4e-3, build) for name, build in builds.items()
  ]


def bytes_in_all(traffic: jd.Traffic, steps: int, warmup: int) -> float:
  """What a worker sends in a training, with its warm-up if there is one."""
  started = sum(
    row.bytes_sent for row in traffic.rows if 'jaxdist.warmup' in row.source
  )
  warmup = warmup if started else 0
  return warmup * started + (steps - warmup) * traffic.bytes_a_step


def main() -> None:
  config = tyro.cli(Config, description=__doc__.partition('\n')[0])
  prepare_devices(None)
  data = text.load(None)
  warmup = config.steps // 4
  console = Console()
  table = Table('method', 'validation loss', 'least', 'most', 'sent in all')
  for way in ways(warmup):
    losses = []
    for seed in range(config.seeds):
      with console.status(f'{way.name}, seed {seed}'):
        setting = lm.Config(
          steps=config.steps, every_eval=config.steps, lr=config.lr, seed=seed
        )
        run = lm.train(setting, way, data)
      losses.append(run.val_loss)
      console.print(f'{way.name}, seed {seed}: {losses[-1]:.4f}')
    numbers = [f'{x:.4f}' for x in (np.mean(losses), min(losses), max(losses))]
    sent = bytes_in_all(run.traffic, config.steps, warmup)
    table.add_row(way.name, *numbers, report.size(sent))
  console.print(table)


if __name__ == '__main__':
  main()
