"""Small experiments: many seeds and learning rates of a method at once.

All workers, seeds and learning rates run in one program on one device, so that
an experiment over five seeds takes about as long as one over a single seed.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

AXIS = 'data'


class Problem(NamedTuple):
  """What the workers minimize together.

  Attributes:
    make: ``key -> (params, data)``: where to start, and data whose leaves lead
      with the workers.
    gradient: ``(params, data, key) -> gradient``, of one worker.
    measure: ``(params, data) -> number`` to become small, on all workers alike.
  """

  make: Callable[[jax.Array], tuple[Any, Any]]
  gradient: Callable[[Any, Any, jax.Array], Any]
  measure: Callable[[Any, Any], jax.Array]


class Trial(NamedTuple):
  """One method on one problem, at the learning rate that suits it.

  Attributes:
    method: its name.
    rate: the learning rate.
    curve: the measure, ``(seeds, evaluations)``.
  """

  method: str
  rate: float
  curve: np.ndarray

  def final(self, tail: float) -> np.ndarray:
    """Each seed's median over the last part of its evaluations."""
    last = max(1, round(tail * self.curve.shape[1]))
    return np.median(self.curve[:, -last:], axis=1)


# From a learning rate to a whole optimizer.
Method = Callable[[Any], optax.GradientTransformation]


def scaled(direction: optax.GradientTransformation) -> Method:
  """The method that steps against a direction."""
  return lambda rate: optax.chain(direction, optax.scale(-rate))


def run(
  method: Method,
  problem: Problem,
  rates: Sequence[float],
  seeds: int,
  steps: int,
  every: int,
) -> np.ndarray:
  """The measure after every few steps, of all seeds and learning rates.

  Args:
    method: what to run.
    problem: what to minimize.
    rates: learning rates.
    seeds: how many.
    steps: in all, a multiple of ``every``.
    every: steps between evaluations.

  Returns:
    ``(seeds, rates, evaluations)``.
  """

  def worker(params, data, key, rate):
    tx = method(rate)

    def step(carry, index):
      params, state = carry
      own = jax.random.fold_in(jax.random.fold_in(key, index), worker_index())
      grad = problem.gradient(params, data, own)
      updates, state = tx.update(grad, state, params)
      return (optax.apply_updates(params, updates), state), None

    def several(carry, first):
      carry, _ = jax.lax.scan(step, carry, first + jnp.arange(every))
      return carry, problem.measure(carry[0], data)

    start = (params, tx.init(params))
    return jax.lax.scan(several, start, jnp.arange(0, steps, every))[1]

  def seed(key, rate):
    params, data = problem.make(key)
    workers = jax.vmap(worker, (None, 0, None, None), axis_name=AXIS)
    return workers(params, data, key, rate)[0]

  keys = jax.random.split(jax.random.key(0), seeds)
  all_rates = jax.vmap(seed, (None, 0))
  run = jax.jit(jax.vmap(all_rates, (0, None)))
  return np.asarray(run(keys, jnp.asarray(rates)))


def worker_index() -> jax.Array:
  """This worker's number."""
  return jax.lax.axis_index(AXIS)


def best(
  methods: Mapping[str, Method],
  problem: Problem,
  rates: Sequence[float],
  *,
  seeds: int,
  steps: int,
  every: int,
  tail: float,
  console: Console,
) -> list[Trial]:
  """Runs each method at the learning rate that ends lowest over the seeds.

  All methods choose from the same rates, by the median over seeds of the
  measure's median over the last part (``tail``) of the run.

  Args:
    methods: by name.
    problem: what to minimize.
    rates: to choose from.
    seeds: how many.
    steps: of each run.
    every: steps between evaluations.
    tail: part of the evaluations at the end that counts.
    console: shown what is being run.

  Returns:
    A trial for each method.
  """
  trials = []
  for name, method in methods.items():
    with console.status(name):
      curves = run(method, problem, rates, seeds, steps, every)
    candidates = [
      Trial(name, rate, curves[:, i]) for i, rate in enumerate(rates)
    ]
    # NaN, from a rate at which it diverged, must not win.
    score = lambda trial: np.nan_to_num(
      np.median(trial.final(tail)), nan=np.inf
    )
    trials.append(min(candidates, key=score))
  return trials


def table(title: str, trials: Sequence[Trial], tail: float) -> Table:
  """Mean and spread over the seeds of what each method ends at."""
  out = Table('method', 'rate', 'mean', 'least', 'most', title=title)
  for trial in trials:
    ends = trial.final(tail)
    numbers = [f'{x:.3g}' for x in (ends.mean(), ends.min(), ends.max())]
    out.add_row(trial.method, f'{trial.rate:g}', *numbers)
  return out


def write(
  folder: Path,
  name: str,
  trials: Sequence[Trial],
  tail: float,
  settings: Mapping[str, Any],
  x: tuple[str, float],
  y: str,
) -> None:
  """Leaves the numbers as JSON and the median curves as a plot.

  Args:
    folder: where to.
    name: of both files.
    trials: what to write.
    tail: as for :meth:`Trial.final`.
    settings: what was run, to stand beside the numbers.
    x: a name for the horizontal axis, and the distance of evaluations on it.
    y: a name for the vertical axis.
  """
  folder.mkdir(parents=True, exist_ok=True)
  rows = [
    {'method': t.method, 'rate': t.rate, 'ends': t.final(tail).tolist()}
    for t in trials
  ]
  text = json.dumps({'settings': dict(settings), 'trials': rows}, indent=2)
  (folder / f'{name}.json').write_text(text + '\n')
  figure = Figure(figsize=(7, 4.5), layout='constrained')
  axes = figure.subplots()
  for trial in trials:
    median = np.median(trial.curve, axis=0)
    steps = x[1] * np.arange(1, len(median) + 1)
    axes.plot(steps, median, label=f'{trial.method} ({trial.rate:g})')
  axes.set(yscale='log', xlabel=x[0], ylabel=y)
  axes.legend()
  figure.savefig(folder / f'{name}.png', dpi=120)
