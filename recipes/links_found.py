"""What links.py measured, as numbers: pure functions of its files."""

import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any

import netns
import numpy as np
from links_host import CODES, NO_EXCHANGE

import jaxdist as jd

DENSE_PEER = 'torch DDP'
COMPRESSED_PEER = 'torch DDP, PowerSGD'
LIMITS = (NO_EXCHANGE, 'torch, no exchange')
PEERS = (LIMITS[1], DENSE_PEER, COMPRESSED_PEER)
# Of a core, for coding, as jd.advise wants it: a copy's.
MEMORY_BYTES_PER_SECOND = 2e9
# The methods of methods.py that are predicted without compiling. A program for
# CPUs hides no transfer behind compute, so that none is said to be late.
PLANNED = {
  'dense': (jd.mean, 1, 1),
  'quantized': (lambda axis: jd.mean(axis, jd.quantize(bits=4)), 1, 1),
  'local-sgd': (lambda axis: jd.mean(axis, jd.quantize(bits=2)), 4, 1),
  'diloco': (lambda axis: jd.mean(axis, jd.quantize(bits=2)), 4, 1),
  'sparse-loco': (
    lambda axis: jd.mean(axis, jd.chained(jd.top_k(0.05), jd.quantize(bits=2))),
    4,
    1,
  ),
  'streaming-diloco': (
    lambda axis: jd.mean(axis, jd.float4(block_size=256)),
    8,
    4,
  ),
  'power-sgd': (lambda axis: jd.low_rank_mean(axis, rank=2), 1, 1),
}


@dataclasses.dataclass(frozen=True)
class Found:
  """All runs of one contender at one rate.

  Attributes:
    rate: as in ``--rates``.
    name: of the method, or of the peer.
    steps: after which it was validated.
    seconds: of each stretch between validations, by round; of the slowest host.
    bytes: that host 0's interface sent in each stretch, by round.
    packets: likewise.
    losses: of validation, by round.
    traffic: what the compiled step sends; ``None`` of a peer.
    load: the machine's, at most, at the end of a run.
  """

  rate: str
  name: str
  steps: np.ndarray
  seconds: np.ndarray
  bytes: np.ndarray
  packets: np.ndarray
  losses: np.ndarray
  traffic: jd.Traffic | None = None
  load: float = 0.0

  @property
  def bits_per_second(self) -> float:
    """The limit of the link."""
    return netns.bits_per_second(self.rate)

  @property
  def step_seconds_by_round(self) -> np.ndarray:
    """A step's time in each round: the median over its stretches."""
    steps = np.diff(self.steps, prepend=0)
    return np.median(self.seconds / steps, axis=1)

  @property
  def step_seconds(self) -> float:
    """A step's time."""
    return float(np.median(self.step_seconds_by_round))

  @property
  def bytes_a_step(self) -> float:
    """What the interface sent, headers and all."""
    return float(self.bytes.sum(axis=1).mean() / self.steps[-1])

  @property
  def carried_a_step(self) -> float:
    """What its packets carried: bytes without the headers of each."""
    payload = self.bytes - netns.HEADER_BYTES * self.packets
    return float(payload.sum(axis=1).mean() / self.steps[-1])

  @property
  def agreement(self) -> float | None:
    """What packets carried over what the program says that it sends."""
    if self.traffic is None or self.name in LIMITS:
      return None
    return self.carried_a_step / self.traffic.bytes_a_step

  @property
  def busy(self) -> float:
    """Share of the link's limit, over all of the time."""
    bits = 8 * self.bytes.sum(axis=1) / self.seconds.sum(axis=1)
    return float(np.median(bits) / self.bits_per_second)

  def clock(self, round: int) -> np.ndarray:
    """Seconds of training until each validation."""
    return np.cumsum(self.seconds[round])

  def over(self, limit: 'Found') -> float:
    """A step's time over that of the limit, round by round."""
    return float(
      np.median(self.step_seconds_by_round / limit.step_seconds_by_round)
    )


def load(folder: Path, rates, names, rounds, steps, every_eval) -> list[Found]:
  """Reads the runs of all contenders at all rates."""
  after = [*range(every_eval, steps, every_eval), steps]
  found = []
  for rate in rates:
    for name in names:
      runs = [
        json.loads((folder / f'{rate}.{seed}.{name}.json').read_text())
        for seed in range(rounds)
      ]
      hosts = lambda field, runs=runs: np.array(
        [[host[field] for host in run['hosts']] for run in runs], float
      )
      traffic = runs[0]['traffic']
      found.append(
        Found(
          rate,
          name,
          np.array(after),
          hosts('seconds').max(axis=1),
          hosts('bytes')[:, 0],
          hosts('packets')[:, 0],
          hosts('losses')[:, 0],
          traffic and jd.Traffic.from_json(json.dumps(traffic)),
          max(run['load'] for run in runs),
        )
      )
  return found


def time_to(loss: float, clock: np.ndarray, losses: np.ndarray) -> float:
  """When a validation loss was reached, on a line between validations.

  >>> time_to(2.0, np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.5, 1.5]))
  2.5
  """
  # A model whose last layer is zero begins at the loss of all bytes alike.
  clock, losses = np.append(0.0, clock), np.append(math.log(256), losses)
  if not (losses <= loss).any():
    return math.inf
  i = int(np.argmax(losses <= loss))
  if i == 0:
    return 0.0
  part = (losses[i - 1] - loss) / (losses[i - 1] - losses[i])
  return float(clock[i - 1] + part * (clock[i] - clock[i - 1]))


def sooner(own: Found, peer: Found) -> float | None:
  """How many times sooner than a peer it has a loss that both reach.

  That is the higher of both last losses, in each round; the median over rounds.
  None where a run has diverged.
  """
  found = []
  for i, (a, b) in enumerate(zip(own.losses, peer.losses, strict=True)):
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
      return None
    loss = max(a[-1], b[-1])
    found.append(
      time_to(loss, peer.clock(i), b) / time_to(loss, own.clock(i), a)
    )
  return statistics.median(found)


@dataclasses.dataclass(frozen=True)
class Exchange:
  """Bare exchanges in one code at one rate.

  Attributes:
    rate: as in ``--rates``.
    code: a name in ``CODES``.
    payload: bytes that a host sends, by the compiled program.
    seconds: of an exchange, the median.
  """

  rate: str
  code: str
  payload: float
  seconds: float

  @property
  def share(self) -> float:
    """Of what the link could carry in that time."""
    return 8 * self.payload / self.seconds / netns.bits_per_second(self.rate)


def load_exchanges(folder: Path, rates) -> list[Exchange]:
  """Reads the bare exchanges."""
  found = []
  for rate in rates:
    for code in CODES:
      told = json.loads((folder / f'{rate}.{code}.json').read_text())['hosts']
      seconds = np.max([host['seconds'] for host in told], axis=0)
      found.append(
        Exchange(rate, code, told[0]['payload'], float(np.median(seconds)))
      )
  return found


def load_links(folder: Path, rates) -> dict[str, jd.Link]:
  """What plain sums measured of the links."""
  found = {}
  for rate in rates:
    told = json.loads((folder / f'{rate}.link.json').read_text())['hosts'][0]
    found[rate] = jd.Link(told['bytes_per_second'], told['latency'])
  return found


def predicted(own: Found, limit: Found, link: jd.Link) -> float:
  """jd.step_time's: the limit, and the transfers of the compiled program."""
  links = dict.fromkeys(own.traffic.by_link(), link)
  exposed = jd.step_time(own.traffic, links).exposed
  return limit.step_seconds + sum(exposed.values())


def advised(
  name: str, params: Any, hosts: int, limit: Found, link: jd.Link
) -> float | None:
  """jd.advise's step time, which no program is compiled for."""
  if name not in PLANNED:
    return None
  make, every, fragments = PLANNED[name]
  candidate = jd.Candidate(name, '', make, every=every, fragments=fragments)
  advice = jd.advise(
    params,
    hosts,
    link,
    limit.step_seconds,
    memory_bytes_per_second=MEMORY_BYTES_PER_SECOND,
    candidates=[candidate],
  )
  return advice.predictions[0].step_seconds
