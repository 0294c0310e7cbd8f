"""What coordinator and replicas must agree on, and when a round ends."""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxdist.communicators import checks
from jaxdist.communicators.base import exchanged_leaves
from jaxdist.compressors.base import Compressor
from jaxdist.compressors.identity import identity
from jaxdist.digest import digest
from jaxdist.hosts.desync import describe_tree, versions


@dataclasses.dataclass(frozen=True)
class Agreement:
  """What decides how a change is made and read, the same on both sides.

  Attributes:
    like: shapes and dtypes of the parameters.
    every: inner steps in a round.
    code: that changes are encoded with.
    feedback: whether a replica keeps what the code drops.
    decay: of that.
    seed: of codes that draw random numbers.
    session: which life of the coordinator it is, so that nothing counts that
      was meant for another.
  """

  like: Any
  every: int
  code: Compressor
  feedback: bool
  decay: float
  seed: int
  session: int

  @classmethod
  def checked(
    cls,
    params: optax.Params,
    every: int,
    compressor: Compressor | None,
    feedback: bool | None,
    decay: float,
    seed: int,
    session: int,
  ) -> 'Agreement':
    """An agreement, if its parts can go together.

    Raises:
      ValueError: if they cannot, or one is out of range; names it.
      TypeError: if a parameter is not real floating point.
    """
    like = jax.eval_shape(lambda params: params, params)
    exchanged_leaves(like, 'params')
    checks.check_compressor(compressor)
    code = identity(block_size=128) if compressor is None else compressor
    if feedback is None:
      feedback = not code.unbiased
    if feedback:
      checks.check_fraction('decay', decay)
      instead = 'It is unbiased: use feedback=False.'
      checks.check_contracts('feedback', code, instead)
    elif decay != 1.0:
      raise ValueError(f'decay does nothing without feedback, got {decay}.')
    return cls(
      like,
      checks.integer('every', every, 1),
      code,
      feedback,
      decay,
      checks.seed(seed),
      session,
    )

  def digest(self) -> bytes:
    """Differs where the sides would read each other's bytes as something else.

    It has the version of this package on this side.
    """
    rest = [self.every, self.code, self.feedback, self.decay, self.seed]
    words = [versions()['jaxdist'], *describe_tree(self.like), rest]
    return digest(repr((words, self.session)).encode())


@dataclasses.dataclass(frozen=True)
class Patience:
  """When a round ends, and when a replica is given up.

  Attributes:
    replicas: how many there are to be.
    quorum: fresh changes that are enough.
    deadline: seconds after which a round ends whatever is there.
    max_staleness: rounds that a change may be late.
    staleness: from a change's age in rounds, at least 1, to its weight.
    start_timeout: seconds that a replica has to start and compile.
  """

  replicas: int
  quorum: int
  deadline: float
  max_staleness: int
  staleness: Callable[[int], float]
  start_timeout: float

  def weight(self, age: int) -> float:
    """Of a change; 1 for one of the open round."""
    return float(self.staleness(age)) if age else 1.0

  @classmethod
  def checked(
    cls,
    replicas: int,
    quorum: int | None,
    deadline: float,
    max_staleness: int,
    staleness: float | Callable[[int], float],
    start_timeout: float,
  ) -> 'Patience':
    """Patience, if its parts can go together.

    Raises:
      ValueError: if they cannot, or one is out of range; names it.
    """
    replicas = checks.integer('replicas', replicas, 1)
    quorum = replicas if quorum is None else checks.integer('quorum', quorum, 1)
    if quorum > replicas:
      raise ValueError(
        f'quorum must be at most the number of replicas, {replicas}, got '
        f'{quorum}.'
      )
    check_seconds('deadline', deadline)
    check_seconds('start_timeout', start_timeout)
    max_staleness = checks.integer('max_staleness', max_staleness, 0)
    weight = staleness
    if not callable(staleness):
      checks.check_fraction('staleness', staleness)
      weight = lambda age: staleness**age
    for age in range(1, max_staleness + 1):
      if not 0 <= weight(age) <= 1:
        raise ValueError(
          f'staleness must be a weight in [0, 1] at every age, got '
          f'{weight(age)} at {age}.'
        )
    return cls(replicas, quorum, deadline, max_staleness, weight, start_timeout)


def check_seconds(name: str, value: Any) -> None:
  """Raises unless a value is a positive, finite number."""
  is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if not is_number or not 0 < value < math.inf:
    raise ValueError(f'{name} must be positive seconds, got {value!r}.')
