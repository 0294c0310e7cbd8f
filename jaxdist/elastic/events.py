"""What a coordinator tells of its rounds and replicas."""

import dataclasses
from typing import NamedTuple


class ReplicaError(RuntimeError):
  """Replicas do not start, or would run another program."""


class Event(NamedTuple):
  """Something that happened to a replica.

  Attributes:
    seconds: since the coordinator began.
    round: the round that was open.
    kind: ``'ready'``, ``'died'``, ``'fenced'``, ``'failed'`` (its program
      raised), ``'damaged'`` (bytes that cannot be read), ``'not finite'``, or
      one of the verdicts ``'late'``, ``'stale'``, ``'unknown'``.
    replica: its number.
    incarnation: its incarnation.
    detail: what is known of it.
    lost: for ends of an incarnation: the norm of the residual that went with
      it, as last reported, over the number of replicas: what the model would
      have been owed.
  """

  seconds: float
  round: int
  kind: str
  replica: int
  incarnation: int
  detail: str = ''
  lost: float = 0.0


class Round(NamedTuple):
  """What came of a round.

  Attributes:
    round: its number, from 0.
    committed: whether the parameters moved.
    seconds: that it took.
    fresh: the replicas whose change of this round was applied.
    late: those whose change of an earlier round was applied, and its age.
    weight: the weights of all that was applied, added up.
    loss: the mean of the fresh changes' losses; NaN without any.
    bytes_received: of changes.
    events: what happened meanwhile.
  """

  round: int
  committed: bool
  seconds: float
  fresh: tuple[int, ...]
  late: dict[int, int]
  weight: float
  loss: float
  bytes_received: int
  events: tuple[Event, ...]


@dataclasses.dataclass
class Seat:
  """A replica's place, whoever has it.

  Attributes:
    incarnation: of the process that has it, or had it last.
    phase: ``'empty'``, ``'starting'``, ``'idle'`` or ``'working'``.
    since: when that began, by ``time.monotonic()``.
    owed: the norm of its residual, as it last said.
    strikes: unsound changes in a row.
    failures: starts and rounds in a row in which its program failed.
    pid: its process; 0 before it is ready.
    host: where that runs.
  """

  incarnation: int = 0
  phase: str = 'empty'
  since: float = 0.0
  owed: float = 0.0
  strikes: int = 0
  failures: int = 0
  pid: int = 0
  host: str = ''
