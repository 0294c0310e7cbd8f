"""The actors: one for each incarnation of a replica. All that knows Ray."""

import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import ray

from jaxdist.elastic.replica import Program, Replica
from jaxdist.elastic.settings import Agreement


class Answer(NamedTuple):
  """What an actor had to say.

  Attributes:
    replica: its number.
    incarnation: its incarnation.
    what: ``'begin'`` or ``'work'``.
    value: what the method of :class:`Replica` returned, or the exception.
    died: whether the value is the end of the actor.
  """

  replica: int
  incarnation: int
  what: str
  value: Any
  died: bool = False


class RayPool:
  """Actors on the Ray cluster that this process is in, or on this machine.

  Args:
    build: ``replica -> Program``, run in the actor.
    agreement: see :class:`Agreement`.
    options: of Ray for each actor, such as ``{'num_gpus': 1}``.
  """

  def __init__(
    self,
    build: Callable[[int], Program],
    agreement: Agreement,
    options: dict[str, Any],
  ):
    self._actor = ray.remote(max_restarts=0, max_task_retries=0, **options)(
      Replica
    )
    self._actors = {}
    self._asked = {}
    self._owns_cluster = not ray.is_initialized()
    if self._owns_cluster:
      start_ray()
    # Once for all that will be started, with what it closes over.
    self._arguments = ray.put(build), agreement

  def start(self, replica: int, incarnation: int, message: Any) -> None:
    """Makes an actor and lets it begin; ``message`` comes from share."""
    actor = self._actor.remote(*self._arguments, replica, incarnation)
    self._actors[replica, incarnation] = actor
    self._ask('begin', replica, incarnation, message)

  def give(self, replica: int, incarnation: int, message: Any) -> None:
    """Lets an actor work on a round; ``message`` comes from share."""
    self._ask('work', replica, incarnation, message)

  def share(self, message: bytes) -> Any:
    """Lays a message where all actors find it, once."""
    return ray.put(message)

  def stop(self, replica: int, incarnation: int) -> None:
    """Ends an actor, also one that does not answer; returns at once.

    Ray ends its process within 5 s, even a stopped one.
    """
    ray.kill(self._actors.pop((replica, incarnation)), no_restart=True)

  def wait(self, seconds: float) -> list[Answer]:
    """Answers that are there, or the first to come within some seconds."""
    refs = list(self._asked)
    if not refs:
      time.sleep(max(seconds, 0))
      return []
    ready, _ = ray.wait(refs, num_returns=1, timeout=max(seconds, 0))
    if ready:
      # All others that are there as well.
      ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
    answers = map(self._answer, ready)
    return [answer for answer in answers if answer is not None]

  def close(self) -> None:
    """Ends all actors, and the cluster if it was begun here."""
    for key in list(self._actors):
      self.stop(*key)
    self._asked.clear()
    if self._owns_cluster:
      ray.shutdown()

  def _ask(self, what, replica, incarnation, message):
    actor = self._actors[replica, incarnation]
    ref = getattr(actor, what).remote(message)
    self._asked[ref] = what, replica, incarnation

  def _answer(self, ref):
    what, replica, incarnation = self._asked.pop(ref)
    try:
      # ray.wait has fetched it.
      return Answer(replica, incarnation, what, ray.get(ref, timeout=0))
    except ray.exceptions.GetTimeoutError:  # And it left memory since.
      self._asked[ref] = what, replica, incarnation
      return None
    except ray.exceptions.RayTaskError as error:
      return Answer(replica, incarnation, what, error.cause)
    except ray.exceptions.RayError as error:
      return Answer(replica, incarnation, what, error, died=True)


def start_ray() -> None:
  """Starts a quiet Ray cluster on this machine, of this process alone.

  It tells nobody: usage statistics are off unless ``RAY_USAGE_STATS_ENABLED``
  says otherwise. What can be imported here can be in the replicas.
  """
  os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
  before = os.environ.get('PYTHONPATH')
  os.environ['PYTHONPATH'] = os.pathsep.join(sys.path)
  try:
    with warnings.catch_warnings():
      # What is forked here goes on as another program at once.
      warnings.filterwarnings('ignore', r'os\.fork\(\) was called')
      ray.init(
        address='local',
        include_dashboard=False,
        log_to_driver=False,
        logging_level='ERROR',
      )
  finally:
    os.environ.pop('PYTHONPATH')
    if before is not None:
      os.environ['PYTHONPATH'] = before
