"""The outer loop: rounds that end in time, whatever becomes of a replica."""

import dataclasses
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import optax

from jaxdist.compressors.base import Compressor
from jaxdist.elastic.anchor import Anchor
from jaxdist.elastic.delta import Change, Wire
from jaxdist.elastic.events import Event, ReplicaError, Round, Seat
from jaxdist.elastic.ledger import Ledger, Tag, Verdict
from jaxdist.elastic.pool import Answer, RayPool
from jaxdist.elastic.replica import Program
from jaxdist.elastic.settings import Agreement, Patience

# Once a quorum is there, the others get so much of the time that it took.
_GRACE = 0.5
# A replica is replaced after so many unsound changes in a row; if none can
# start so many times in a row, something is wrong with all.
_STRIKES = 3


class Coordinator:
  r"""DiLoCo between replicas that may come, go, lag and send nonsense.

  .. math::

    \Delta_i = a_r - \theta_i + \beta e_i, \qquad
    a_{r+1} = a_r + \text{outer}\Big(
      \frac{\sum_i w_i D(E(\Delta_i))}{\max(1, \sum_i w_i)}\Big)

  over the changes that came in, with weight 1 for those of this round and
  ``staleness ** age`` for late ones. With all replicas there it is
  :func:`jaxdist.diloco` with ``jd.mean(axis, compressor, 'gather')``.

  A round is given to the replicas that are idle when it begins. It ends when
  all of them have answered or died; when a ``quorum`` has, and half as much
  time again has passed; and at the ``deadline``, with whatever is there. If
  nothing is, the round counts but moves nothing.

  A change counts once, by its tag of replica, incarnation and round. What was
  damaged on its way, is not finite, or is of another program is refused; after
  three in a row a replica is replaced. So is one that dies, or whose change is
  more than ``max_staleness`` rounds late: from then on nothing that its process
  sends is taken, also if it wakes up. The new one begins with the outer
  parameters, a new inner state and no residual: it needs no disk. What the
  residual held is lost with the process, and each :class:`Event` says how much;
  a slow replica keeps its own.

  **On the wire**, each round: float32 parameters to each replica, and from each
  replica its payload, packed and with a digest both ways.

  The coordinator runs in the process that makes it, on JAX's default device;
  ``JAX_PLATFORMS=cpu`` there leaves the accelerators to the replicas. Its own
  death ends the replicas. Begun anew with the same ``directory`` it goes on
  after the last round that was saved.

  Args:
    build: ``replica -> Program``; runs in each replica's process.
    params: the parameters to begin with.
    replicas: how many there are to be.
    outer: any optimizer; takes the negated mean change as a gradient.
    every: inner steps in a round.
    deadline: seconds that a round takes at most.
    compressor: how changes are encoded; ``None`` sends float32.
    feedback: whether a replica keeps what the code drops and sends it in its
      next change. ``None``: if the code is biased.
    decay: :math:`\beta` in (0, 1]; below 1 forgets old residuals.
    quorum: fresh changes that are enough; ``None``: those of all replicas.
    max_staleness: rounds that a change may be late; a replica that has not sent
      it by then is replaced.
    staleness: the weight of a change one round late, raised to its age; or a
      function from the age.
    seed: of codes that draw random numbers.
    directory: for checkpoints; ``None``: none.
    save_every: committed rounds between checkpoints.
    start_timeout: seconds that a replica has to start and compile.
    options: of Ray for each replica's actor, such as ``{'num_gpus': 1}``.
    pool: what starts replicas instead of Ray; for tests.

  Raises:
    ValueError: if an argument is out of range or does not go with another.
    CorruptCheckpointError: if there are checkpoints and none can be read.

  Examples:
    >>> import jaxdist as jd
    >>> from jaxdist import elastic
    >>> def build(replica):
    ...   loss = lambda w, x: jnp.mean((w - x) ** 2)
    ...   batches = lambda step: jnp.float32(2 * replica)
    ...   return elastic.program(loss, optax.sgd(0.1), batches)
    >>> outer = optax.sgd(0.7, momentum=0.9, nesterov=True)
    >>> with elastic.Coordinator(
    ...   build, jnp.zeros(3), replicas=2, outer=outer, every=10, deadline=60.0,
    ... ) as coordinator:  # doctest: +SKIP
    ...   for report in coordinator.rounds(20):
    ...     print(report.round, report.loss)

  References:
    Douillard et al, `DiLoCo <https://arxiv.org/abs/2311.08105>`_, 2023; Nguyen
    et al, `FedBuff <https://arxiv.org/abs/2106.06639>`_, 2022 (weights of late
    changes)
  """

  def __init__(
    self,
    build: Callable[[int], Program],
    params: optax.Params,
    *,
    replicas: int,
    outer: optax.GradientTransformation,
    every: int,
    deadline: float,
    compressor: Compressor | None = None,
    feedback: bool | None = None,
    decay: float = 1.0,
    quorum: int | None = None,
    max_staleness: int = 2,
    staleness: float | Callable[[int], float] = 0.5,
    seed: int = 0,
    directory: str | os.PathLike | None = None,
    save_every: int = 1,
    start_timeout: float = 300.0,
    options: dict[str, Any] | None = None,
    pool: Callable[..., Any] = RayPool,
  ):
    self._patience = Patience.checked(
      replicas, quorum, deadline, max_staleness, staleness, start_timeout
    )
    agreement = Agreement.checked(
      params, every, compressor, feedback, decay, seed, secrets.randbits(63)
    )
    self._wire = Wire(agreement)
    self._anchor = Anchor(params, outer, self._wire, directory, save_every)
    self._ledger = Ledger(max_staleness, self._anchor.first)
    self._seats = [Seat() for _ in range(replicas)]
    self._events: list[Event] = []
    self._taken: dict[Tag, Change] = {}  # In the open round.
    self._began = time.monotonic()
    self._open = pool
    self._build, self._options = build, options or {}
    self._pool = None

  @property
  def round(self) -> int:
    """The round that is open: so many were closed."""
    return self._ledger.round

  @property
  def params(self) -> optax.Params:
    """The outer parameters, in the dtypes that they were given in."""
    return self._anchor.params

  @property
  def counts(self) -> dict[str, int]:
    """What became of all that was given, see :class:`Ledger`."""
    return dict(self._ledger.counts)

  @property
  def seats(self) -> list[Seat]:
    """The replicas as they are now."""
    return [dataclasses.replace(seat) for seat in self._seats]

  def rounds(self, until: int) -> Iterator[Round]:
    """Runs rounds until so many were closed in all.

    Args:
      until: the number of the first round that does not run.

    Yields:
      What came of each.

    Raises:
      ReplicaError: if no replica can start, or the program of one raises
        before the first round.
      OSError: if a checkpoint cannot be written.
    """
    if self._pool is None:
      self._pool = self._open(self._build, self._wire.agreement, self._options)
      self._wait_for_all()
    while self.round < until:
      yield self._one_round()
    self._anchor.wait()

  def close(self) -> None:
    """Ends all replicas; more rounds would begin with new ones."""
    pool, self._pool = self._pool, None
    if pool is not None:
      pool.close()
      for replica, seat in enumerate(self._seats):
        self._ledger.fence(replica)
        self._seats[replica] = Seat(seat.incarnation)
    self._anchor.wait()

  def __enter__(self) -> 'Coordinator':
    return self

  def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
    self.close()

  def _wait_for_all(self):
    """Until all replicas were compiled, or had the time for it."""
    ends = time.monotonic() + self._patience.start_timeout
    self._message = self._pack()
    waits = lambda: any(s.phase in ('empty', 'starting') for s in self._seats)
    self._fill()
    # They compile meanwhile; and so do we.
    self._anchor.compile()
    while waits() and time.monotonic() < ends:
      self._fill()
      self._take(self._pool.wait(1.0), {}, at_start=True)
    if all(seat.phase != 'idle' for seat in self._seats):
      raise ReplicaError(
        f'no replica started within {self._patience.start_timeout} s.'
      )

  def _one_round(self):
    patience, ledger = self._patience, self._ledger
    began = time.monotonic()
    ends = began + patience.deadline
    self._message = self._pack()
    self._received = 0
    for replica, tag in list(ledger.under_way.items()):
      if ledger.age(tag) > patience.max_staleness:
        self._end(replica, 'fenced', f'no change since round {tag.round}')
    for replica, seat in enumerate(self._seats):
      # One that was interrupted may have had this round before.
      if seat.phase == 'idle' and not ledger.had(replica):
        ledger.give(replica)
        self._pool.give(replica, seat.incarnation, self._message)
        self._enter(seat, 'working')
    taken, enough = self._taken, False
    left = patience.deadline
    while left > 0:
      fresh = [tag for tag in taken if tag.round == self.round]
      if len(fresh) >= patience.quorum and not enough:
        enough = True
        took = time.monotonic() - began
        ends = min(ends, began + took + _GRACE * took)
      awaited = any(t.round == self.round for t in ledger.under_way.values())
      if not awaited and (taken or any(s.phase == 'idle' for s in self._seats)):
        break
      self._fill()
      # The last look finds what is there, however late it is by now.
      left = ends - time.monotonic()
      self._take(self._pool.wait(min(max(left, 0.0), 1.0)), taken)
    return self._close_round(taken, began)

  def _close_round(self, taken, began):
    weigh = self._patience.weight
    weights = {tag: weigh(self._ledger.age(tag)) for tag in sorted(taken)}
    committed = self._anchor.move(taken, weights)
    fresh = [tag for tag in taken if tag.round == self.round]
    losses = [taken[tag].loss for tag in fresh]
    report = Round(
      self.round,
      committed,
      time.monotonic() - began,
      tuple(sorted(tag.replica for tag in fresh)),
      {
        t.replica: self.round - t.round for t in sorted(set(taken) - set(fresh))
      },
      sum(weights.values()),
      sum(losses) / len(losses) if losses else math.nan,
      self._received,
      tuple(self._events),
    )
    self._events.clear()
    self._taken.clear()
    self._ledger.close()
    self._anchor.save(self.round)
    return report

  def _pack(self):
    return self._pool.share(self._anchor.pack(self.round))

  def _fill(self):
    """Starts replicas where there are none, and gives up those too slow."""
    now = time.monotonic()
    for replica, seat in enumerate(self._seats):
      waited = now - seat.since
      if seat.phase == 'starting' and waited > self._patience.start_timeout:
        self._end(replica, 'failed', f'not started in {waited:.0f} s')
      pause = min(2**seat.failures - 1, 60)
      if seat.phase == 'empty' and waited >= pause:
        seat.incarnation = self._ledger.admit(replica)
        self._enter(seat, 'starting')
        self._pool.start(replica, seat.incarnation, self._message)

  def _enter(self, seat, phase):
    seat.phase, seat.since = phase, time.monotonic()

  def _take(self, answers, taken, at_start=False):
    """Books what replicas answered; changes that apply go into ``taken``."""
    for answer in answers:
      replica, value = answer.replica, answer.value
      seat = self._seats[replica]
      if isinstance(value, bytes):
        self._received += len(value)
        self._judge(answer, taken)
      elif answer.incarnation != seat.incarnation or seat.phase == 'empty':
        continue  # The end of one that was given up.
      elif isinstance(value, Exception):
        if at_start and not answer.died:
          raise ReplicaError(f'replica {replica} cannot start.') from value
        kind = 'died' if answer.died else 'failed'
        self._end(replica, kind, value)
      elif value['program'] != self._wire.digest:
        why = 'it has another version of jaxdist'
        if at_start:
          raise ReplicaError(f'replica {replica} cannot start: {why}.')
        self._end(replica, 'failed', why)
      else:
        seat.pid, seat.host = value['pid'], value['host']
        self._enter(seat, 'idle')
        self._note('ready', replica, seat.incarnation)

  def _judge(self, answer: Answer, taken):
    replica, incarnation = answer.replica, answer.incarnation
    seat, change, wrong = self._seats[replica], None, ''
    # Unless the change says whose it is.
    tag = Tag(replica, incarnation, -1)
    if incarnation == seat.incarnation:
      tag = self._ledger.under_way.get(replica, tag)
    try:
      change = self._wire.unpack_change(answer.value)
    except ValueError as error:
      wrong, detail = 'damaged', str(error)
    else:
      if change.tag[:2] == (replica, incarnation):
        tag = Tag(*change.tag)
      else:
        wrong, detail = 'damaged', 'it is of another replica'
      given = tag == self._ledger.under_way.get(replica)
      if given and not wrong and not self._anchor.is_finite(tag, change):
        wrong, detail = 'not finite', ''
    verdict = self._ledger.judge(tag, sound=not wrong)
    if verdict == Verdict.UNSOUND:
      self._note(wrong, replica, incarnation, detail)
    elif verdict != Verdict.FRESH:
      self._note(verdict.value, replica, incarnation, f'of round {tag.round}')
    if verdict.applies:
      taken[tag] = change
    if verdict in (Verdict.FENCED, Verdict.UNKNOWN):
      return
    self._enter(seat, 'idle')
    if change is not None:
      seat.owed = change.owed
    seat.strikes = seat.strikes + 1 if wrong else 0
    seat.failures = seat.failures if wrong else 0
    if seat.strikes == _STRIKES:
      self._end(replica, 'fenced', f'{_STRIKES} unsound changes in a row')

  def _end(self, replica, kind, why):
    """Ends an incarnation: whatever comes of it from now on is refused."""
    detail = str(why).partition('\n')[0]
    seat = self._seats[replica]
    lost = seat.owed / len(self._seats)
    self._note(kind, replica, seat.incarnation, detail, lost)
    failures = seat.failures + (kind == 'failed' or seat.phase == 'starting')
    self._pool.stop(replica, seat.incarnation)
    self._ledger.fence(replica)
    self._seats[replica] = Seat(
      seat.incarnation, since=time.monotonic(), failures=failures
    )
    if all(seat.failures >= _STRIKES for seat in self._seats):
      cause = why if isinstance(why, Exception) else None
      raise ReplicaError(f'no replica can run: {detail}') from cause

  def _note(self, kind, replica, incarnation, detail='', lost=0.0):
    seconds = time.monotonic() - self._began
    self._events.append(
      Event(seconds, self.round, kind, replica, incarnation, detail, lost)
    )
