"""Compares the outer loops on the language model, and checks their claims.

  python recipes/outer.py
  python recipes/outer.py --steps 1400 --out out/longer

compare.py with the baselines that the loops' papers name; at the end it says
which claims hold. It goes on where it was stopped, as compare.py does, and with
the same ``--out`` and settings the two share their runs. BUILD_NOTES.md has the
table.
"""

import dataclasses
import json
from pathlib import Path

import compare
import compared
import optax
import record
import tyro
from compared import Compared
from methods import method, muon
from rich.console import Console
from rich.table import Table

import jaxdist as jd

# Meetings of the late and the uniform schedule, in each 100 steps.
MEETINGS = 2


@dataclasses.dataclass(frozen=True)
class Config(compare.Config):
  """The command line."""

  methods: tuple[str, ...] = (
    'dense',
    'local-float32',
    'local-sgd',
    'diloco-float32',
    'streaming-diloco',
    'diloco',
    'noloco',
    'pairs',
    'co2',
    'uniform',
    'late',
    'sparse-loco',
    'fedavg',
  )
  """What to train, from those of compare.py and this recipe; dense first."""
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
    peak: likewise, in the step that sends most.
  """

  words: str
  method: str
  baseline: str
  factor: float
  fewer: float = 0.0
  peak: float = 0.0


CLAIMS = (
  Claim('DiLoCo, within 1% at 50 times fewer', 'diloco', 'dense', 1.01, 50),
  Claim(
    'local steps, within 1% at 50 times fewer', 'local-sgd', 'dense', 1.01, 50
  ),
  Claim(
    'streaming in 4 bits, within 1% at 8 times fewer, a quarter of the peak',
    'streaming-diloco',
    'diloco-float32',
    1.01,
    8,
    32,
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


def judge(claim: Claim, one: Compared, other: Compared) -> dict:
  """Whether a claim holds, and by what figures.

  A loss within two standard errors of the limit decides nothing: None.
  """
  above = one.above(other)
  fewer = other.bytes_a_step / one.bytes_a_step
  peak = other.peak_bytes / one.peak_bytes
  over = 1 + above.mean() - claim.factor
  holds = None
  if fewer < claim.fewer or peak < claim.peak:
    holds = False
  elif abs(over) >= 2 * compared.standard_error(above):
    holds = bool(over <= 0)
  return {
    'claim': claim.words,
    'method': claim.method,
    'baseline': claim.baseline,
    'above, %': compared.with_error(100 * above, '+.2f'),
    'fewer bytes': round(fewer, 1),
    'fewer at the peak': round(peak, 1),
    'holds': holds,
  }


def judge_all(found: list[Compared]) -> list[dict]:
  """All claims about what was trained."""
  by_name = {each.name: each for each in found}
  return [
    judge(claim, by_name[claim.method], by_name[claim.baseline])
    for claim in CLAIMS
    if claim.method in by_name and claim.baseline in by_name
  ]


def main() -> None:
  config = tyro.cli(
    Config,
    description=__doc__.partition('\n')[0],
    config=(tyro.conf.FlagCreatePairsOff,),
  )
  add_methods(config.steps)
  claims = judge_all(compare.compare(config, 'outer.py'))
  record.replace(
    config.out / 'claims.json', json.dumps(claims, indent=2) + '\n'
  )
  if claims:
    table = Table(*claims[0])
    for claim in claims:
      table.add_row(*map(str, claim.values()))
    Console().print(table)


if __name__ == '__main__':
  main()
