"""Levels by leaf on the language model; run by ``python recipes/lgreco.py lm``.

The model, text, optimizer and schedule of lm.py. Matrices are sent with
feedback at one level, cheap, usual or dear, or each at a level of its own.
Those are chosen when a tenth of the steps has warmed up at the usual level, and
every so many steps after that, so that in sum no more is dropped than at the
usual level.
"""

import collections
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lgreco_page
import lm
import methods
import numpy as np
import optax
import record
import text
from levels import Levels, feedback, in_order, kinds, matrices
from place import WORKERS, find_place, prepare_devices
from rich.console import Console
from task import Task

import jaxdist as jd

DENSE = methods.find(methods.DENSE)


class Rule(NamedTuple):
  """What a choice keeps below a bound: a sum over the leaves.

  Attributes:
    power: of what is dropped of a leaf, in norm.
    owed: whether of the gradient and what feedback owes, as is sent, or of the
      gradient alone.
    relative: whether as a part of the leaf's norm.
  """

  power: int
  owed: bool = True
  relative: bool = False

  def of(self, errors: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """A summand for each leaf and level; means over workers, who lead."""
    summands = np.mean(errors**self.power, axis=0)
    if not self.relative:
      return summands
    # Of nothing, nothing is dropped.
    whole = np.mean(norms**self.power, axis=0)[:, None]
    return summands / np.where(whole > 0, whole, 1)


RULES = {
  'own, errors': Rule(1),
  'own, squares': Rule(2),
  'own, errors of gradients': Rule(1, owed=False),
  'own, relative errors': Rule(1, relative=True),
}


class Way(NamedTuple):
  """How the leaves get their levels.

  Attributes:
    levels: by label.
    level: of all leaves; with a rule, until the first choice, and its bound.
    rule: of choices; None for one level throughout.
  """

  levels: Levels
  level: Any
  rule: Rule | None = None


def ways() -> dict[tuple[str, str], Way | None]:
  """By kind and name; dense, the first, has neither kind nor levels."""
  found = {('', methods.DENSE): None}
  for name, kind in kinds().items():
    for level in (kind.cheaper, kind.usual, kind.dearer):
      found[name, f'all {level}'] = Way(kind.levels, level)
    for words, rule in RULES.items():
      found[name, words] = Way(kind.levels, kind.usual, rule)
  return found


class Measure:
  """What the levels of a kind would drop of what each worker would send."""

  def __init__(self, task: Task, levels: Levels):
    self.task = task

    def worker(params, owed, rows):
      gradient = jax.grad(task.loss_fn)(params, rows)
      sent = matrices(jax.tree.map(jnp.add, gradient, owed))
      norms = jnp.stack([jnp.linalg.norm(x) for x in sent])
      return jd.level_errors(levels, sent), norms

    self.by_worker = jax.jit(jax.vmap(worker, (None, 0, 0)))

  def __call__(self, state: jd.TrainState, index: int, rule: Rule):
    """For each worker, leaf and level; and norms for each worker and leaf.

    On one device: at a choice every few hundred steps it does not matter where.
    """
    owed = state.opt_state[0].residual.value
    owed = owed if rule.owed else jax.tree.map(jnp.zeros_like, owed)
    rows = self.task.batches[index]
    rows = rows.reshape(WORKERS, -1, rows.shape[-1])
    params, owed = jax.device_get((state.params, owed))
    return jax.device_get(self.by_worker(params, owed, rows))


def train(config: lm.Config, way: Way, data: text.Text, every: int) -> dict:
  """Trains one model.

  Args:
    config: of lm.py; the run ends with its validation.
    way: to train.
    data: what to read.
    every: steps between choices, from a tenth of all steps on.

  Returns:
    The validation loss, bytes that a worker sends a step, in the mean, steps
    that were skipped, and the levels by the steps at which they were chosen.
  """
  # Devices that share few cores wait for each other in the collectives of each
  # leaf, at times forever.
  task = Task.of(config, data, find_place(WORKERS).simulated())
  levels = way.levels
  rate = lm.schedule(config, DENSE.learning_rate)
  measure = Measure(task, levels)

  def transform(labels):
    communicator = jd.per_leaf(levels, in_order(labels))
    return optax.chain(feedback(communicator), methods.muon(rate))

  labels = [way.level] * len(matrices(task.params))
  state = task.start(transform(labels))
  step, traffic = task.compile(transform(labels), state)
  chosen, sent = {0: labels}, 0.0
  first = config.steps // 10
  for index in range(config.steps):
    if way.rule and index >= first and (index - first) % every == 0:
      labels = jd.lgreco(
        levels,
        way.rule.of(*measure(state, index, way.rule)),
        matrices(task.params),
        uniform=way.level,
        workers=WORKERS,
      )
      chosen[index] = labels
      step, traffic = task.compile(transform(labels), state)
    state, _ = step(state, task.batch(index))
    sent += traffic.bytes_a_step
  return {
    'loss': task.evaluation()(state),
    'sent': sent / config.steps,
    'skipped': int(state.skipped),
    'chosen': chosen,
  }


def dense(config: lm.Config, data: text.Text) -> dict:
  """Trains the model with whole gradients."""
  run = lm.train(config, DENSE, data)
  return {
    'loss': run.val_loss,
    'sent': run.traffic.bytes_a_step,
    'skipped': run.lines[-1]['skipped'],
    'chosen': {},
  }


def compare(
  out: Path, seeds: int, steps: int, every: int, console: Console
) -> None:
  """Trains what is not there yet, and writes the report after each seed.

  Args:
    out: folder; each finished run is a file in it.
    seeds: how many.
    steps: of each run.
    every: steps between choices.
    console: for the table and the names of finished runs.
  """
  prepare_devices(WORKERS)
  data = text.load(None)
  settings = {'steps': steps, 'every': every, 'text': str(data)}
  (out / 'runs').mkdir(parents=True, exist_ok=True)
  # Seeds of a way share programs.
  jax.config.update('jax_compilation_cache_dir', str(out / 'compiled'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  found = collections.defaultdict(list)
  with record.locked(out):
    for seed in range(seeds):
      config = lm.Config(
        steps=steps, every_eval=steps, workers=WORKERS, seed=seed
      )
      for name, way in ways().items():
        words = ', '.join(filter(None, name))
        path = out / 'runs' / f'{re.sub("[ ,]+", "-", words)}.{seed}.json'
        if not path.exists():
          with console.status(f'{words}, seed {seed}'):
            run = (
              train(config, way, data, every) if way else dense(config, data)
            )
          record.replace(path, record.as_line({'settings': settings, **run}))
          console.print(f'{words}, seed {seed}: {run["loss"]:.4f}')
        kept = json.loads(path.read_text())
        if kept['settings'] != settings:
          raise SystemExit(
            f'lgreco.py: --out must hold runs of the same settings, got '
            f'{kept["settings"]} in {path.name}, {settings} now.'
          )
        found[name].append(kept)
      rows = lgreco_page.rows_of(found)
      lgreco_page.write(out, rows, found, settings | lm.versions())
  console.print(lgreco_page.terminal_table(rows))
  console.print(f'Report: {out / "report.html"}', highlight=False)
