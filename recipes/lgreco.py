"""Trains networks with a level of compression for each matrix (L-GreCo).

  python recipes/lgreco.py train
  python recipes/lgreco.py lm --seeds 2 --every 150
  python recipes/lgreco.py cost

``train``: eight workers train a network of 64, 256, 128, 64 and 10 units on
scikit-learn's digits. Matrices are sent sparse, in few bits or at low rank,
with feedback, biases whole: all at one level, all at the next cheaper one, or
each at a level of its own, chosen every 100 steps so that what is dropped is in
sum no more than at the one level. ``lm``: the same on the language model of
lm.py, by several sums. ``cost``: what a choice costs, where the step is
compiled anew and where it has a branch for each level.

On two CPU cores ``train`` takes about 3 minutes for five seeds, ``cost`` one
minute, ``lm`` half an hour a seed, one finished run after another, from which
the same command goes on. BUILD_NOTES.md has the tables. Leaves JSON in
out/lgreco, ``lm`` also a page.

Alimohammadi et al, `L-GreCo <https://arxiv.org/abs/2210.17357>`_, 2024.
"""

import dataclasses
import functools
import itertools
import json
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import lgreco_lm
import numpy as np
import optax
import tyro
from levels import Levels, feedback, in_order, kinds, matrices
from place import AXIS, WORKERS
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import jaxdist as jd

IMAGES = 16
UNITS = (64, 256, 128, 64, 10)
RATE, MOMENTUM = 0.1, 0.9
# Images a worker that a choice is measured on; steps between evaluations.
MEASURED, EVALUATED = 160, 10


@dataclasses.dataclass(frozen=True)
class Config:
  """The command line."""

  what: tyro.conf.Positional[Literal['train', 'lm', 'cost']]
  """What to run."""
  seeds: int = 5
  """How many."""
  steps: int = 300
  """Of each run."""
  every: int = 100
  """Steps between choices."""
  out: Path = Path('out/lgreco')
  """Folder for JSON; ``lm`` goes on with the runs that are in it."""


def start(key) -> dict[str, jax.Array]:
  """The network's parameters."""
  params = {}
  for i, (n_in, n_out) in enumerate(itertools.pairwise(UNITS)):
    key, own = jax.random.split(key)
    params[f'w{i}'] = jax.random.normal(own, (n_in, n_out)) * (2 / n_in) ** 0.5
    params[f'b{i}'] = jnp.zeros(n_out)
  return params


def loss(params, batch):
  """Mean cross-entropy in nats an image."""
  x, y = batch
  for i in range(len(UNITS) - 1):
    x = (jax.nn.relu(x) if i else x) @ params[f'w{i}'] + params[f'b{i}']
  return optax.softmax_cross_entropy_with_integer_labels(x, y).mean()


def optimizer(communicator: jd.Communicator) -> optax.GradientTransformation:
  """Feedback for matrices through a communicator, then momentum."""
  return optax.chain(feedback(communicator), optax.sgd(RATE, momentum=MOMENTUM))


class Images:
  """Digits in an order of the seed's, those of each worker together."""

  def __init__(self, seed: int):
    bunch = load_digits()
    self.rng = np.random.default_rng(seed)
    order = self.rng.permutation(len(bunch.data) // WORKERS * WORKERS)
    whole = bunch.data[order] / 16, bunch.target[order]
    self.all = tuple(map(jnp.asarray, map(np.float32, whole[:1]))) + (
      jnp.asarray(whole[1]),
    )

  def batch(self, images: int):
    """Some images for each worker."""
    own = len(self.all[0]) // WORKERS
    rows = self.rng.integers(own, size=(WORKERS, images))
    rows = (rows + own * np.arange(WORKERS)[:, None]).reshape(-1)
    return jax.tree.map(lambda x: x[rows], self.all)


class Trainer:
  """Trains with the levels of one kind; remembers compiled steps."""

  def __init__(self, levels: Levels):
    self.levels, self.steps = levels, {}
    self.evaluate = jax.jit(loss)
    self.measure = jax.jit(self._errors)

  def _errors(self, params, batch):
    """What levels drop of each worker's gradient, in the mean.

    On a mesh each worker has its own, and only the means travel.
    """
    by_worker = lambda x: x.reshape(WORKERS, -1, *x.shape[1:])

    def worker(batch):
      return jd.level_errors(
        self.levels, matrices(jax.grad(loss)(params, batch))
      )

    return jnp.mean(jax.vmap(worker)(jax.tree.map(by_worker, batch)), axis=0)

  def step(self, labels: list):
    """A compiled step and what a worker sends in it for matrices."""
    key = tuple(labels)
    if key not in self.steps:
      communicator = jd.per_leaf(self.levels, in_order(labels))
      step = jd.train_step(
        loss, optimizer(communicator), axis=AXIS, workers=WORKERS
      )
      shapes = matrices(jax.eval_shape(start, jax.random.key(0)))
      self.steps[key] = step, communicator.bytes_sent(shapes, WORKERS)
    return self.steps[key]

  def run(
    self, seed: int, uniform: Any, steps: int, every: int | None = None
  ) -> dict[str, Any]:
    """Trains one network.

    Args:
      seed: of parameters and images.
      uniform: the level of all matrices, or that bounds what is dropped.
      steps: in all.
      every: steps between choices; None for none.

    Returns:
      The median loss of all images over the last tenth of the steps, bytes that
      a worker sends a step for matrices, in the mean, and what was chosen.
    """
    images = Images(seed)
    params = start(jax.random.key(seed))
    labels = [uniform] * len(matrices(params))
    tx = optimizer(jd.per_leaf(self.levels, in_order(labels)))
    state = jd.init(tx, params, axis=AXIS, workers=WORKERS)
    sent, losses, choices = 0.0, [], []
    for index in range(steps):
      if every and index % every == 0:
        labels = jd.lgreco(
          self.levels,
          self.measure(state.params, images.batch(MEASURED)),
          matrices(params),
          uniform=uniform,
          workers=WORKERS,
        )
        choices.append(labels)
      step, bytes_sent = self.step(labels)  # With the same state.
      state, _ = step(state, images.batch(IMAGES))
      sent += bytes_sent
      if (index + 1) % EVALUATED == 0 and index >= 0.9 * steps:
        losses.append(float(self.evaluate(state.params, images.all)))
    return {
      'loss': float(np.median(losses)),
      'sent': sent / steps,
      'choices': choices,
    }


def compare(config: Config, console: Console) -> None:
  """Trains all, prints a table and leaves the numbers."""
  table = Table('levels', 'loss', 'least', 'most', 'sent a step', 'fewer')
  found = {}
  for name, kind in kinds().items():
    trainer = Trainer(kind.levels)
    ways = {
      f'all {kind.usual}': (kind.usual, None),
      f'all {kind.cheaper}': (kind.cheaper, None),
      'each its own': (kind.usual, config.every),
    }
    first = None
    for way, (label, every) in ways.items():
      with console.status(f'{name}, {way}'):
        trials = [
          trainer.run(seed, label, config.steps, every)
          for seed in range(config.seeds)
        ]
      found[f'{name}, {way}'] = trials
      losses = [trial['loss'] for trial in trials]
      sent = np.mean([trial['sent'] for trial in trials])
      first = first or sent
      table.add_row(
        f'{name}, {way}',
        *(f'{x:.4f}' for x in (np.mean(losses), min(losses), max(losses))),
        f'{sent:,.0f} bytes',
        f'{100 * (1 - sent / first):.0f}%',
      )
  console.print(table)
  config.out.mkdir(parents=True, exist_ok=True)
  (config.out / 'train.json').write_text(json.dumps(found, indent=2) + '\n')


def switched(levels: Levels, label: Any) -> jd.Communicator:
  """As :func:`jaxdist.per_leaf`, with a branch for each level of each leaf.

  The choice is a number for each leaf in its state, at first that of a label.
  """
  leveled = jd.per_leaf(
    levels, lambda tree: jax.tree.map(lambda _: label, tree)
  )
  branches = [
    lambda leaf, kept, c=c: c.exchange([leaf], kept) for c in levels.values()
  ]

  def init(tree, feedback=False):
    number = list(levels).index(label)
    choice = jnp.full(len(jax.tree.leaves(tree)), number, jnp.int32)
    return choice, leveled.init(tree, feedback)

  def exchange(tree, state):
    choice, kept = state
    leaves, treedef = jax.tree.flatten(tree)
    done = [
      jax.lax.switch(choice[i], branches, leaf, kept[i])
      for i, leaf in enumerate(leaves)
    ]
    result, sent = (treedef.unflatten([x[i][0] for x in done]) for i in (0, 1))
    return result, sent, (choice, [new for _, _, new in done])

  return dataclasses.replace(leveled, init=init, exchange=exchange)


def cost(console: Console) -> None:
  """Times the two ways to go on with another choice."""
  table = Table('levels', 'way', 'compiling', 'a step', 'measuring')
  params, batch = start(jax.random.key(0)), Images(0).batch(IMAGES)
  for name, (levels, _, uniform, _) in kinds().items():
    measure = Trainer(levels).measure.lower(params, batch).compile()
    measuring = seconds(functools.partial(measure, params, batch), 10)
    chosen = jd.per_leaf(levels, in_order([uniform] * (len(UNITS) - 1)))
    ways = {'compiled anew': chosen, 'branches': switched(levels, uniform)}
    for way, communicator in ways.items():
      compiling, step = times_of(optimizer(communicator), params, batch)
      table.add_row(
        name,
        way,
        f'{compiling:.2f} s',
        f'{1e3 * step:.2f} ms',
        f'{1e3 * measuring:.1f} ms',
      )
  console.print(table)


def times_of(tx: optax.GradientTransformation, params, batch):
  """Seconds to compile a step anew, and to take one."""
  where = {'axis': AXIS, 'workers': WORKERS}
  state = jd.init(tx, params, **where)

  began = time.perf_counter()
  step = jd.train_step(loss, tx, **where).lower(state, batch).compile()
  compiling = time.perf_counter() - began

  def again():
    nonlocal state
    state, metrics = step(state, batch)
    return metrics

  return compiling, seconds(again, 100)


def seconds(fn, repeats: int) -> float:
  """The median time of a call."""
  taken = []
  for _ in range(repeats):
    began = time.perf_counter()
    jax.block_until_ready(fn())
    taken.append(time.perf_counter() - began)
  return float(np.median(taken))


def main() -> None:
  config = tyro.cli(Config, description=__doc__.partition('\n')[0])
  jax.config.update('jax_platforms', 'cpu')
  console = Console()
  if config.what == 'cost':
    cost(console)
  elif config.what == 'lm':
    lgreco_lm.compare(
      config.out / 'lm', config.seeds, config.steps, config.every, console
    )
  else:
    compare(config, console)


if __name__ == '__main__':
  main()
