"""Trains the language model by Adam, and by Adam with one bit a number.

  python recipes/one_bit.py

The model and text of lm.py, 8 workers. 1-bit Adam warms up for 100
steps, then sends the momentum of matrices as signs, both ways, and vectors
whole; beside it Adam, and Adam behind gradients sent in the same way. Three
seeds; on two CPU cores it takes about 10 minutes. BUILD_NOTES.md has the table.
"""

import dataclasses
import sys

import lm
import methods
import numpy as np
import optax
import report
import text
import tyro
from methods import BETAS
from place import prepare_devices
from rich.console import Console
from rich.table import Table

import jaxdist as jd


@dataclasses.dataclass(frozen=True)
class Config:
  """The command line."""

  seeds: int = 3
  """How many."""
  steps: int = 400
  """Of each run."""
  lr: float = 4e-3
  """Peak learning rate of all."""


def ways() -> list[methods.Method]:
  """What is compared."""

  def adam(axis, rate):
    return optax.chain(jd.communicate(jd.mean(axis)), optax.adam(rate, **BETAS))

  def feedback(axis, rate):
    signs = jd.error_feedback(methods.signs(axis))
    return optax.chain(signs, optax.adam(rate, **BETAS))

  return [
    methods.Method('Adam', 'gradients in float32', 4e-3, adam),
    methods.find('one-bit-adam'),
    methods.Method(
      'feedback, then Adam', 'gradients as signs, with feedback', 4e-3, feedback
    ),
  ]


def main() -> None:
  config = tyro.cli(Config, description=__doc__.partition('\n')[0])
  if config.steps <= methods.WARMUP:
    sys.exit(
      f'one_bit.py: --steps must be more than the {methods.WARMUP} of the '
      f'warm-up, got {config.steps}.'
    )
  prepare_devices(None)
  data = text.load(None)
  console = Console()
  table = Table('method', 'validation loss', 'least', 'most', 'sent in all')
  for way in ways():
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
    table.add_row(way.name, *numbers, report.size(run.lines[-1]['bytes_sent']))
  console.print(table)


if __name__ == '__main__':
  main()
