"""Compares ways to make top-k converge where the workers' data differ.

  python recipes/feedback.py quadratic
  python recipes/feedback.py digits
  python recipes/feedback.py steps

``quadratic``: eight workers whose quadratics have other curvatures and other
minima, with exact and with noisy gradients. ``digits``: ten workers, each with
the images of one digit (scikit-learn's), fit a softmax regression, with full,
minibatch and single-image gradients. ``steps``: EF21 at the learning rates of
its first and of its newer theory, on digits whose workers' losses are curved
more and more unequally.

Five seeds each, learning rates from one grid for all. On two CPU cores the
three take about 5, 4 and 1 minutes. BUILD_NOTES.md has the tables. Leaves JSON
and plots in out/feedback.
"""

import dataclasses
import warnings
from pathlib import Path
from typing import Literal

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

TAIL = 1 / 15


@dataclasses.dataclass(frozen=True)
class Config:
  """The command line."""

  problem: tyro.conf.Positional[Literal['quadratic', 'digits', 'steps']]
  """What to run."""
  seeds: int = 5
  """How many."""
  steps: int | None = None
  """Of each run; None for 3000, 1500 and 20000."""
  out: Path = Path('out/feedback')
  """Folder for JSON and plots."""


def methods(code: jd.Compressor) -> dict[str, trials.Method]:
  """What is compared."""
  mean = jd.mean(AXIS, code, 'gather')
  with warnings.catch_warnings(action='ignore'):  # It says what is shown here.
    no_feedback = jd.communicate(mean)
  directions = {
    'dense': jd.communicate(jd.mean(AXIS)),
    'no feedback': no_feedback,
    'error feedback': jd.error_feedback(mean),
    'EF21': jd.ef21(mean),
    'EF21-SGDM': optax.chain(
      jd.per_worker(optax.ema(0.9, debias=False)), jd.ef21(mean)
    ),
    'EControl': jd.econtrol(mean),
  }
  return {name: trials.scaled(tx) for name, tx in directions.items()}


def gradient_norm(gradient):
  """A measure: the norm of the workers' mean gradient."""

  def measure(params, data):
    mean = jax.lax.pmean(gradient(params, data), AXIS)
    return optax.tree.norm(mean)

  return measure


def quadratic(
  spread: float, noise: float, workers: int = 8, size: int = 200
) -> Problem:
  r"""Worker i minimizes :math:`|a_i x - b_i|^2 / 2`.

  Args:
    spread: how far the minima are from each other.
    noise: norm of what is added to a worker's gradient.
    workers: how many; the i-th has :math:`a_i^2 = i / W`.
    size: of x.

  Returns:
    The problem.
  """

  def make(key):
    a = jnp.sqrt(jnp.arange(1.0, workers + 1) / workers)
    b = jax.random.normal(key, (workers, size)) * spread / size**0.5
    start = jax.random.normal(jax.random.fold_in(key, 1), (size,))
    return start, (a, b)

  def exact(x, data):
    a, b = data
    return a * (a * x - b)

  def gradient(x, data, key):
    return exact(x, data) + noise * jax.random.normal(key, x.shape) / size**0.5

  return Problem(make, gradient, gradient_norm(exact))


def digits_by_label(images: int) -> tuple[np.ndarray, np.ndarray]:
  """Images of each digit, ``(10, all, 64)`` between 0 and 1, all equally many.

  Args:
    images: how many of each.

  Returns:
    The images, and the digit of each, ``(10, images)``.
  """
  bunch = load_digits()
  x = np.stack([bunch.data[bunch.target == i][:images] for i in range(10)])
  labels = np.repeat(np.arange(10)[:, None], images, axis=1)
  return (x / 16).astype(np.float32), labels


def softmax_digits(batch: int | None, images: int = 100) -> Problem:
  """Softmax regression by ten workers, each of which knows one digit only.

  Args:
    batch: images in a gradient; None for all.
    images: that a worker has.

  Returns:
    The problem.
  """
  x, labels = digits_by_label(images)

  def make(key):
    params = {
      'w': 0.1 * jax.random.normal(key, (64, 10)),
      'b': jnp.zeros(10),
    }
    return params, (x, labels)

  def loss(params, data):
    x, labels = data
    logits = x @ params['w'] + params['b']
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean() + 0.005 * optax.tree.norm(params, squared=True)

  def gradient(params, data, key):
    if batch is not None:
      rows = jax.random.randint(key, (batch,), 0, images)
      data = jax.tree.map(lambda x: x[rows], data)
    return jax.grad(loss)(params, data)

  return Problem(make, gradient, gradient_norm(jax.grad(loss)))


def unequal_digits(spread: float, images: int = 100) -> Problem:
  """Logistic regression of "below five", with unequally curved losses.

  Nonconvex by its regularizer, as in EF21's papers. Worker i has digit i, and
  its pixels are ``10**(spread * i / 9)`` times as bright.

  Args:
    spread: powers of ten between the darkest and the brightest.
    images: that a worker has, drawn anew for each seed.

  Returns:
    The problem; its measure is the squared norm of the gradient.
  """
  every, labels = digits_by_label(170)
  every = every * 10 ** (spread * np.arange(10) / 9)[:, None, None]
  every = every.astype(np.float32)

  def make(key):
    rows = jax.random.permutation(key, every.shape[1])[:images]
    signs = jnp.where(labels[:, :images] < 5, 1.0, -1.0)
    return jnp.zeros(64), (jnp.asarray(every)[:, rows], signs)

  gradient = jax.grad(unequal_loss)
  norm = gradient_norm(gradient)
  return Problem(
    make,
    lambda w, data, key: gradient(w, data),
    lambda w, data: norm(w, data) ** 2,
  )


def unequal_loss(w, data):
  """One worker's loss in :func:`unequal_digits`."""
  x, signs = data
  return jax.nn.softplus(-signs * (x @ w)).mean() + 1e-3 * jnp.sum(
    w**2 / (1 + w**2)
  )


def theory_rates(problem: Problem, contraction: float) -> tuple[float, float]:
  """EF21's learning rates by its first and by its newer theory.

  A logistic loss is most curved at zero, where the regularizer is too; the
  workers' own smoothness is taken there, and the least rate over a few seeds.

  Args:
    problem: from :func:`unequal_digits`.
    contraction: of the code.

  Returns:
    Old and new.
  """
  rates = []
  for seed in range(3):
    w, data = problem.make(jax.random.key(seed))
    smooth = lambda data: jd.estimate_smoothness(unequal_loss, w, data)  # noqa: B023
    own = [float(x) for x in jax.vmap(smooth)(data)]
    merged = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), data)
    whole = float(smooth(merged))
    rates.append(
      [
        jd.ef21_stepsize(whole, own, contraction, mean=mean)
        for mean in ('quadratic', 'arithmetic')
      ]
    )
  old, new = np.min(rates, axis=0)
  return float(old), float(new)


def compare_methods(config: Config, console: Console) -> None:
  """Runs ``quadratic`` or ``digits``."""
  if config.problem == 'quadratic':
    steps, every, rates = (
      config.steps or 3000,
      10,
      (0.003, 0.01, 0.03, 0.1, 0.3),
    )
    rates = (*rates, 1.0)
    problems = {
      f'spread {spread}, noise {noise}': quadratic(spread, noise)
      for spread, noise in ((10, 0), (10, 1), (0, 1), (10, 5))
    }
    code = jd.global_top_k(0.1)
  else:
    steps, every, rates = config.steps or 1500, 15, (0.03, 0.1, 0.3, 1.0)
    problems = {
      f'{"all" if batch is None else batch} images a gradient': softmax_digits(
        batch
      )
      for batch in (None, 16, 1)
    }
    code = jd.global_top_k(0.02)
  for title, problem in problems.items():
    found = trials.best(
      methods(code),
      problem,
      rates,
      seeds=config.seeds,
      steps=steps,
      every=every,
      tail=TAIL,
      console=console,
    )
    console.print(trials.table(f'{title}: |gradient|', found, TAIL))
    name = f'{config.problem} {title}'.replace(',', '').replace(' ', '-')
    settings = {
      'problem': title,
      'code': str(code),
      'steps': steps,
      'rates': rates,
      'seeds': config.seeds,
    }
    trials.write(
      config.out, name, found, TAIL, settings, ('steps', every), '|gradient|'
    )


def compare_steps(config: Config, console: Console) -> None:
  """Runs ``steps``."""
  steps, every = config.steps or 20000, 100
  # One of 64, as jd.top_k with a block for all of them would keep.
  code = jd.global_top_k(1 / 64)
  method = trials.scaled(jd.ef21(jd.mean(AXIS, code, 'gather')))
  out = Table('spread', 'steps, old', 'new', 'rates, new to old', 'ends, old')
  for title in ('new', "as long to old's end"):
    out.add_column(title)
  for spread in (0.0, 1.0, 1.5):
    problem = unequal_digits(spread)
    rates = theory_rates(problem, code.contraction)
    curves = trials.run(method, problem, rates, config.seeds, steps, every)
    times = times_to_level(curves)
    out.add_row(
      f'{spread}',
      *(f'{rate:.3g}' for rate in rates),
      f'{rates[1] / rates[0]:.3f}',
      *(f'{x:.3g}' for x in np.median(curves[:, :, -1], axis=0)),
      f'{times.mean():.3f} ({times.min():.3f} to {times.max():.3f})',
    )
    found = [
      trials.Trial(name, rate, curves[:, i])
      for i, (name, rate) in enumerate(
        zip(
          (
            'EF21, first theory',
            'EF21-W',
          ),
          rates,
          strict=True,
        )
      )
    ]
    settings = {'spread': spread, 'steps': steps, 'seeds': config.seeds}
    trials.write(
      config.out,
      f'steps-{spread}',
      found,
      1e-9,
      settings,
      ('steps', every),
      '|gradient| squared',
    )
  console.print(out)


def times_to_level(curves: np.ndarray) -> np.ndarray:
  """How much longer the first rate takes to its end than the second.

  Args:
    curves: ``(seeds, 2, evaluations)``.

  Returns:
    For each seed, its evaluations over those after which the second is lower.
  """
  lower = curves[:, 1] <= curves[:, 0, -1:]
  return curves.shape[2] / (1 + np.argmax(lower, axis=1))


def main() -> None:
  jax.config.update('jax_platforms', 'cpu')
  config = tyro.cli(Config, description=__doc__.partition('\n')[0])
  console = Console()
  if config.problem == 'steps':
    compare_steps(config, console)
  else:
    compare_methods(config, console)


if __name__ == '__main__':
  main()
