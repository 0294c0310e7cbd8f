"""Compares the outer loops on the language model, over several seeds.

  python recipes/outer.py

Model, data and defaults are those of lm.py; so are the 8 workers. Each run
adds a line to ``runs.jsonl`` in ``--out``, and those that are there are not
repeated: a run that was stopped goes on with the same command. The table ends
with what the papers claim, and whether it holds here. One run takes about as
long as one of lm.py's, 3 minutes on two cores.
"""

import dataclasses
import json
import math
import statistics
import sys
from pathlib import Path

import lm
import methods
import optax
import report
import text
import tyro
from methods import method, muon
from place import find_place, prepare_devices
from rich.console import Console
from rich.table import Table

import jaxdist as jd

# Meetings of the late and the uniform schedule, in each 100 steps.
MEETINGS = 2


@dataclasses.dataclass(frozen=True)
class Config:
  """The command line."""

  methods: tuple[str, ...] = (
    'dense',
    'local-sgd',
    'diloco-float32',
    'streaming-diloco',
    'noloco',
    'pairs',
    'local-float32',
    'co2',
    'uniform',
    'late',
  )
  """What to train, from lm.py's methods and those below."""
  seeds: int = 5
  """Runs of each method."""
  steps: int = 1400
  """Optimizer steps of each run."""
  workers: int = 8
  """Data-parallel workers."""
  layers: int = 2
  """Transformer blocks."""
  width: int = 64
  """Features of a byte inside the model."""
  out: Path = Path('out/outer')
  """Folder for the results."""


@dataclasses.dataclass(frozen=True)
class Claim:
  """What a paper says of two methods.

  Attributes:
    words: the claim.
    method: what it is about.
    baseline: what it is compared with.
    factor: the largest loss that confirms it, in losses of the baseline.
    fewer: how many times fewer bytes it sends, at least.
  """

  words: str
  method: str
  baseline: str
  factor: float
  fewer: float = 0.0


CLAIMS = (
  Claim(
    'local steps, within 1% at 50 times fewer', 'local-sgd', 'dense', 1.01, 50
  ),
  Claim(
    'streaming in 4 bits, within 1% at 7 times fewer',
    'streaming-diloco',
    'diloco-float32',
    1.01,
    7,
  ),
  Claim('NoLoCo, at or below DiLoCo', 'noloco', 'local-float32', 1.0),
  Claim('NoLoCo, below averaging in pairs', 'noloco', 'pairs', 1.0),
  Claim('CO2, within 1% of local SGD', 'co2', 'local-float32', 1.01),
  Claim('late meetings, below uniform ones', 'late', 'uniform', 1.0),
)


def add_methods(steps: int) -> None:
  """Adds the baselines to the methods; some depend on a run's length."""
  meetings = max(1, steps * MEETINGS // 100)

  @method('diloco-float32', 'streaming-diloco, all at once, uncoded', 1.6e-2)
  def diloco(axis, learning_rate):
    return jd.diloco(
      muon(learning_rate), optax.sgd(1.0), jd.mean(axis), every=8
    )

  @method('local-float32', 'local-sgd without a code', 1.6e-2)
  def local(axis, learning_rate):
    return jd.local_sgd(muon(learning_rate), jd.mean(axis), every=4)

  @method('pairs', 'random pairs average their parameters', 1.6e-2)
  def pairs(axis, learning_rate):
    gossip = jd.gossip(axis, 'random_pairs')
    return jd.local_sgd(muon(learning_rate), gossip, every=4)

  @method('uniform', 'few meetings, evenly spread', 1.6e-2)
  def uniform(axis, learning_rate):
    when = jd.late_meetings(steps, meetings, share=1.0, window=1.0)
    return jd.local_sgd(muon(learning_rate), jd.mean(axis), every=when)

  @method('late', 'as few meetings, half of them in the last tenth', 1.6e-2)
  def late(axis, learning_rate):
    when = jd.late_meetings(steps, meetings)
    return jd.local_sgd(muon(learning_rate), jd.mean(axis), every=when)


def train_all(config: Config, console: Console) -> list[dict]:
  """Trains what is not there yet, and returns a line for each run."""
  config.out.mkdir(parents=True, exist_ok=True)
  path = config.out / 'runs.jsonl'
  lines = path.read_text().splitlines() if path.exists() else []
  done = {}
  for line in map(json.loads, lines):
    done[json.dumps(line['run'], sort_keys=True)] = line
  data = text.load(None)
  found = []
  for seed in range(config.seeds):
    for name in config.methods:
      settings = {
        'steps': config.steps,
        'workers': config.workers,
        'layers': config.layers,
        'width': config.width,
        'seed': seed,
      }
      key = {'method': name, **settings}
      line = done.get(json.dumps(key, sort_keys=True))
      if line is None:
        run = lm.train(
          lm.Config(every_eval=config.steps, **settings), name, data
        )
        line = {
          'run': key,
          'val_loss': run.val_loss,
          'bytes_a_step': run.traffic.bytes_a_step,
          'step_seconds': run.step_seconds,
          'skipped': run.lines[-1]['skipped'],
        }
        with path.open('a') as file:
          file.write(json.dumps(line) + '\n')
        console.print(
          f'{name}, seed {seed}: {run.val_loss:.4f}', highlight=False
        )
      found.append(line)
  return found


def summary(lines: list[dict], names: tuple[str, ...]) -> dict[str, dict]:
  """Mean, standard error and bytes of each method."""
  result = {}
  for name in names:
    runs = [line for line in lines if line['run']['method'] == name]
    losses = [line['val_loss'] for line in runs]
    spread = statistics.stdev(losses) if len(losses) > 1 else math.nan
    result[name] = {
      'losses': losses,
      'mean': statistics.mean(losses),
      'standard_error': spread / len(losses) ** 0.5,
      'bytes_a_step': runs[0]['bytes_a_step'],
    }
  return result


def tables(found: dict[str, dict]) -> list[Table]:
  """The methods, and the claims about those that were trained."""
  methods_table = Table('method', 'validation loss', 'sent a step', 'fewer')
  first = next(iter(found.values()))
  for name, row in found.items():
    methods_table.add_row(
      name,
      f'{row["mean"]:.4f} ± {row["standard_error"]:.4f}',
      report.size(row['bytes_a_step']),
      f'{first["bytes_a_step"] / row["bytes_a_step"]:.1f}',
    )
  claims = Table('claim', 'loss', 'fewer bytes', 'here')
  for claim in CLAIMS:
    if claim.method not in found or claim.baseline not in found:
      continue
    one, other = found[claim.method], found[claim.baseline]
    factor = one['mean'] / other['mean']
    fewer = other['bytes_a_step'] / one['bytes_a_step']
    holds = factor <= claim.factor and fewer >= claim.fewer
    claims.add_row(
      claim.words,
      f'{100 * (factor - 1):+.2f}%',
      f'{fewer:.1f}',
      'holds' if holds else 'does not hold',
    )
  return [methods_table, claims]


def main() -> None:
  config = tyro.cli(
    Config,
    description=__doc__.partition('\n')[0],
    config=(tyro.conf.FlagCreatePairsOff,),
  )
  add_methods(config.steps)
  try:
    for name in config.methods:
      methods.find(name)
  except ValueError as error:
    sys.exit(f'outer.py: {error}')
  prepare_devices(config.workers)
  console = Console()
  console.print(find_place(config.workers).words, highlight=False)
  found = summary(train_all(config, console), config.methods)
  (config.out / 'summary.json').write_text(json.dumps(found, indent=2) + '\n')
  for table in tables(found):
    console.print(table)


if __name__ == '__main__':
  main()
