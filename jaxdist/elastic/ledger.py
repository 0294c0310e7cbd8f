"""Which changes count: each at most once, and none of a fenced replica."""

import collections
import enum
from typing import NamedTuple


class Tag(NamedTuple):
  """Whose work a change is.

  Attributes:
    replica: its number, from 0.
    incarnation: which of the processes that have been this replica, from 1.
    round: the round that it was given to work on.
  """

  replica: int
  incarnation: int
  round: int


class Verdict(enum.StrEnum):
  """What becomes of a change that came in.

  Attributes:
    FRESH: it is of the open round, and is applied.
    LATE: it is of an earlier round, and is applied with less weight.
    STALE: it is of too early a round, and is dropped.
    UNSOUND: it was given, but what came cannot be applied.
    FENCED: it is of an incarnation that was given up.
    UNKNOWN: it was never given, or came before.
  """

  FRESH = 'fresh'
  LATE = 'late'
  STALE = 'stale'
  UNSOUND = 'unsound'
  FENCED = 'fenced'
  UNKNOWN = 'unknown'

  @property
  def applies(self) -> bool:
    """Whether the change is applied."""
    return self in (Verdict.FRESH, Verdict.LATE)


class Ledger:
  """Books of what was given to replicas and what came of it.

  A replica works on one round at a time. What it is given is taken out of the
  books by the first change with its tag, by the end of its incarnation, or
  never; so nothing can be applied twice, and the books do not grow. At all
  times::

    given == fresh + late + stale + unsound + lost + len(under_way)

  Args:
    max_staleness: the most rounds that a change may be late.
    round: the round that is open at first.

  Attributes:
    round: the round that is open.
    counts: of all verdicts, of what was ``given``, and of what was given to an
      incarnation that ended before it sent it, ``lost``.
    under_way: the tag of what each replica works on.

  Examples:
    >>> ledger = Ledger(max_staleness=1)
    >>> ledger.admit(0)
    1
    >>> tag = ledger.give(0)
    >>> ledger.close()
    >>> ledger.judge(tag), ledger.judge(tag)
    (<Verdict.LATE: 'late'>, <Verdict.UNKNOWN: 'unknown'>)
  """

  def __init__(self, max_staleness: int, round: int = 0):
    self.max_staleness = max_staleness
    self.round = round
    self.counts: collections.Counter[str] = collections.Counter()
    self.under_way: dict[int, Tag] = {}
    self._begun: dict[int, int] = {}
    self._current: dict[int, int] = {}
    self._last: dict[int, Tag] = {}

  def admit(self, replica: int) -> int:
    """Begins a new incarnation; all before it are fenced.

    Args:
      replica: its number.

    Returns:
      The incarnation's number.
    """
    self.fence(replica)
    self._begun[replica] = self._begun.get(replica, 0) + 1
    self._current[replica] = self._begun[replica]
    return self._current[replica]

  def fence(self, replica: int) -> None:
    """Gives an incarnation up: whatever it sends from now on is refused."""
    if self.under_way.pop(replica, None):
      self.counts['lost'] += 1
    self._current.pop(replica, None)

  def give(self, replica: int) -> Tag:
    """Books that a replica works on the open round.

    Raises:
      ValueError: if it has work, had that of this round, or is not admitted.
    """
    tag = Tag(replica, self._current.get(replica, 0), self.round)
    # Twice the same tag, and two changes could count for one.
    busy = replica in self.under_way or self.had(replica)
    if not tag.incarnation or busy:
      raise ValueError(f'replica must be idle, got {replica!r}.')
    self.under_way[replica] = self._last[replica] = tag
    self.counts['given'] += 1
    return tag

  def had(self, replica: int) -> bool:
    """Whether a replica was given the open round."""
    last = self._last.get(replica)
    return last == Tag(replica, self._current.get(replica, 0), self.round)

  def age(self, tag: Tag) -> int:
    """How many rounds later than the change's the open one is."""
    return self.round - tag.round

  def judge(self, tag: Tag, sound: bool = True) -> Verdict:
    """Says what becomes of a change, and books it.

    Args:
      tag: what it says of itself.
      sound: whether it can be applied.

    Returns:
      The verdict.
    """
    verdict = self._verdict(tag, sound)
    if verdict not in (Verdict.FENCED, Verdict.UNKNOWN):
      del self.under_way[tag.replica]
    self.counts[verdict.value] += 1
    return verdict

  def _verdict(self, tag, sound):
    if tag.incarnation != self._current.get(tag.replica):
      return Verdict.FENCED
    if tag != self.under_way.get(tag.replica):
      return Verdict.UNKNOWN
    if not sound:
      return Verdict.UNSOUND
    age = self.age(tag)
    if age > self.max_staleness:
      return Verdict.STALE
    return Verdict.LATE if age else Verdict.FRESH

  def close(self) -> None:
    """Ends the open round and opens the next."""
    self.round += 1
