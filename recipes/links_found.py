"""What links.py measured, as numbers: pure functions of its files."""

import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any

import jax
import netns
import numpy as np
from flax import nnx
from links_host import CODES, NO_EXCHANGE
from model import Transformer

import jaxdist as jd

DENSE_PEER = 'torch DDP'
COMPRESSED_PEER = 'torch PowerSGD'
LIMITS = (NO_EXCHANGE, 'torch alone')
# Of a rate, in full packets.
CARRIED = 1 - netns.HEADER_BYTES / netns.PACKET_BYTES
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
  None where a run has diverged, or has learnt nothing.
  """
  found = []
  for i, (a, b) in enumerate(zip(own.losses, peer.losses, strict=True)):
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
      return None
    loss = max(a[-1], b[-1])
    times = time_to(loss, peer.clock(i), b), time_to(loss, own.clock(i), a)
    if not all(times):
      return None
    found.append(times[0] / times[1])
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
    """Of what the link allows for the payload, in full packets."""
    bits = CARRIED * netns.bits_per_second(self.rate)
    return 8 * self.payload / self.seconds / bits


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


@dataclasses.dataclass(frozen=True)
class Measured:
  """All that was measured.

  Attributes:
    hosts: how many.
    params: shapes of the model's parameters.
    runs: of all contenders at all rates.
    exchanges: the bare ones.
    links: what plain sums measured, by rate.
  """

  hosts: int
  params: Any
  runs: list[Found]
  exchanges: list[Exchange]
  links: dict[str, jd.Link]

  def at(self, rate: str, name: str) -> Found | None:
    """A contender at a rate."""
    is_it = lambda run: run.rate == rate and run.name == name
    return next(filter(is_it, self.runs), None)

  def limit(self, run: Found) -> Found:
    """The step with no exchange, of the same framework."""
    return self.at(run.rate, LIMITS[run.name in PEERS])

  def predictions(self, run: Found) -> tuple[float | None, float | None]:
    """What jd.advise and jd.step_time say that a step takes."""
    if run.name in LIMITS + PEERS:
      return None, None
    limit, link = self.limit(run), self.links[run.rate]
    return (
      advised(run.name, self.params, self.hosts, limit, link),
      predicted(run, limit, link),
    )

  def sooner(self, run: Found) -> tuple[float | None, float | None]:
    """How many times sooner than plain DDP, and than with PowerSGD."""
    peers = [self.at(run.rate, name) for name in PEERS[1:]]
    if run.name in LIMITS:
      return None, None
    return tuple(peer and sooner(run, peer) for peer in peers)

  def own(self, rate: str) -> list[Found]:
    """The methods of jaxdist at a rate."""
    others = LIMITS + PEERS
    return [r for r in self.runs if r.rate == rate and r.name not in others]


def read(config: Any, names: list[str]) -> Measured:
  """Reads the files of a finished comparison.

  Args:
    config: of links.py.
    names: of the contenders.
  """
  folder = config.out / 'runs'

  def parameters():
    model = Transformer(config.layers, config.width, config.heads, nnx.Rngs(0))
    return nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])

  return Measured(
    config.hosts,
    jax.eval_shape(parameters),
    load(
      folder,
      config.rates,
      names,
      config.rounds,
      config.steps,
      config.every_eval,
    ),
    load_exchanges(folder, config.rates),
    load_links(folder, config.rates),
  )
