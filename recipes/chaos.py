"""Faults of all kinds, drawn from a seed and brought upon real processes."""

import contextlib
import dataclasses
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxdist import elastic
from jaxdist.elastic.pool import RayPool

KINDS = ('kill', 'kill several', 'term', 'stop', 'slow', 'nan', 'garbage')
WORDS = {
  'kill': 'SIGKILL',
  'kill several': 'SIGKILL to several at once',
  'term': 'SIGTERM',
  'stop': 'SIGSTOP, SIGCONT later',
  'slow': 'steps take ten times as long',
  'nan': 'a change of NaN',
  'garbage': 'a message flipped, cut or replaced',
}


@dataclasses.dataclass
class Fault:
  """One fault, and what it met.

  Attributes:
    at: seconds after the start at which it is due.
    kind: one of KINDS.
    replicas: whom it is for.
    lasts: seconds, where it does.
    done: seconds after the start at which it was brought about.
    hit: ``(replica, incarnation)`` of those that it met.
  """

  at: float
  kind: str
  replicas: tuple[int, ...]
  lasts: float = 0.0
  done: float | None = None
  hit: list[tuple[int, int]] = dataclasses.field(default_factory=list)


def schedule(
  seed: int, replicas: int, seconds: float, every: float
) -> list[Fault]:
  """Faults until shortly before the end; every kind comes in its turn.

  Args:
    seed: decides all.
    replicas: how many there are.
    seconds: how long the run is.
    every: mean seconds between faults.

  Returns:
    Faults, in order.
  """
  rng = random.Random(seed)
  faults, at, kinds = [], every / 2, []
  while at < seconds - every / 2:
    kinds = kinds or rng.sample(KINDS, len(KINDS))
    kind = kinds.pop()
    several = rng.randint(2, max(2, replicas - 1))
    count = several if kind == 'kill several' else 1
    chosen = rng.sample(range(replicas), min(count, replicas))
    lasts = 0.0
    if kind in ('stop', 'slow'):
      lasts = rng.uniform(0.2, 1.2) * every
    faults.append(Fault(at, kind, tuple(sorted(chosen)), lasts))
    at += every * rng.uniform(0.5, 1.5)
  return faults


def processes(pid: int | None = None) -> dict[int, tuple[int, str]]:
  """Parent and name of each process, or of one, from ``/proc``."""
  found = {}
  for path in Path('/proc').glob('[0-9]*' if pid is None else str(pid)):
    # It may end at any moment.
    with contextlib.suppress(OSError):
      stat = (path / 'stat').read_text()
      name, rest = stat[: stat.rindex(')')], stat[stat.rindex(')') + 2 :]
      found[int(path.name)] = int(rest.split()[1]), name.partition('(')[2]
  return found


def usage() -> dict[str, dict[str, int]]:
  """Resident bytes and open files of this process, and of those it began."""
  table = processes()
  ours = {os.getpid()}
  while more := {p for p, (up, _) in table.items() if up in ours} - ours:
    ours |= more
  found = {}
  for pid in ours:
    who = 'coordinator' if pid == os.getpid() else 'Ray'
    if table.get(pid, (0, ''))[1].startswith('ray::Repl'):
      who = 'replicas'
    with contextlib.suppress(OSError):
      pages = int(Path(f'/proc/{pid}/statm').read_text().split()[1])
      files = len(os.listdir(f'/proc/{pid}/fd'))
      sums = found.setdefault(who, {'count': 0, 'bytes': 0, 'files': 0})
      sums['count'] += 1
      sums['bytes'] += pages * os.sysconf('SC_PAGE_SIZE')
      sums['files'] += files
  return found


def send(seat: elastic.Seat, number: int) -> bool:
  """Sends a signal to a replica's process; whether there was one."""
  name = processes(seat.pid).get(seat.pid, (0, ''))[1] if seat.pid else ''
  if not name.startswith('ray::'):
    return False
  with contextlib.suppress(ProcessLookupError):
    os.kill(seat.pid, number)
    return True
  return False


class Chaos:
  """Brings faults about while a coordinator runs.

  Args:
    faults: what, and when.
    folder: where replicas look for what they are to suffer.
  """

  def __init__(self, faults: list[Fault], folder: Path):
    self.faults, self.folder = faults, folder
    self.spoil: dict[int, Fault] = {}
    self._rng = random.Random(len(faults))
    self._stop = threading.Event()
    self._thread = None
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob('*.json'):
      path.unlink()

  def pool(self, *args: Any) -> RayPool:
    """A pool of actors, some of whose messages are damaged on their way."""
    pool = RayPool(*args)
    wait = pool.wait
    pool.wait = lambda seconds: list(map(self._damaged, wait(seconds)))
    return pool

  def start(self, seats: Callable[[], list[elastic.Seat]]) -> None:
    """Begins, now; ``seats`` says who the replicas are at any time."""
    self._thread = threading.Thread(target=self._run, args=(seats,))
    self._thread.start()

  def stop(self) -> None:
    """Ends; whoever is stopped goes on."""
    self._stop.set()
    if self._thread is not None:
      self._thread.join()

  def _run(self, seats):
    began = time.monotonic()
    wakes = []
    due = list(self.faults)
    while due or wakes:
      now = time.monotonic() - began
      ending = self._stop.is_set()
      for wake in [w for w in wakes if ending or w[0] <= now]:
        wakes.remove(wake)
        send(wake[1], signal.SIGCONT)
      if ending:
        return
      if due and due[0].at <= now:
        fault = due[0]
        # Whoever is just starting is met once it is there.
        if all(seats()[i].pid for i in fault.replicas):
          due.pop(0)
          wakes += self._bring(fault, seats(), now)
      self._stop.wait(0.05)

  def _bring(self, fault, seats, now):
    """Brings one fault about; returns whom to wake, and when."""
    wakes = []
    for replica in fault.replicas:
      seat, met = seats[replica], True
      if fault.kind in ('kill', 'kill several'):
        met = send(seat, signal.SIGKILL)
      elif fault.kind == 'term':
        met = send(seat, signal.SIGTERM)
      elif fault.kind == 'stop':
        met = send(seat, signal.SIGSTOP)
        wakes.append((now + fault.lasts, seat))
      elif fault.kind == 'garbage':
        self.spoil[replica] = fault
      else:
        order = {'kind': fault.kind, 'until': time.time() + fault.lasts}
        path = self.folder / f'{replica}.json'
        path.with_suffix('.tmp').write_text(json.dumps(order))
        path.with_suffix('.tmp').replace(path)
      if met:
        fault.hit.append((replica, seat.incarnation))
    fault.done = now
    return wakes

  def _damaged(self, answer):
    is_change = isinstance(answer.value, bytes)
    if not is_change or self.spoil.pop(answer.replica, None) is None:
      return answer
    data = bytearray(answer.value)
    how = self._rng.choice(('flip', 'cut', 'noise'))
    if how == 'flip':
      data[self._rng.randrange(len(data))] ^= 1 << self._rng.randrange(8)
    elif how == 'cut':
      del data[self._rng.randrange(len(data)) :]
    else:
      data = self._rng.randbytes(len(data))
    return answer._replace(value=bytes(data))


def suffering(
  program: elastic.Program, path: Path, every: int
) -> elastic.Program:
  """A program whose steps do what a file says, while it is there.

  Args:
    program: what to do otherwise.
    path: the file that :class:`Chaos` writes.
    every: steps in a round.

  Returns:
    The program.
  """

  def step(params, state, number):
    began = time.monotonic()
    params, state, loss = program.step(params, state, number)
    try:
      order = json.loads(path.read_text())
    except FileNotFoundError:
      return params, state, loss
    if order['kind'] == 'nan' and (number + 1) % every == 0:
      path.unlink()
      params = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    if order['kind'] == 'slow':
      loss.block_until_ready()
      if time.time() < order['until']:
        time.sleep(9 * (time.monotonic() - began))
      else:
        path.unlink()
    return params, state, loss

  return program._replace(step=step)
