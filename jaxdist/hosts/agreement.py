"""All processes learn one verdict, through JAX's coordination service.

Its key-value store needs no mesh, no compiled program and no collective, so
that a question can be asked before any of these is trusted.
"""

import collections
import contextlib
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxdist import compat
from jaxdist.hosts.errors import MissingProcessError

# Set by jaxdist.initialize.
timeout = 30.0

# For the first to tell who is missing when its own wait is over.
_VERDICT_SECONDS = 1.0
_POLL_SECONDS = 0.001
_MOST_POLL_SECONDS = 0.05
_rounds: dict[str, Any] = collections.defaultdict(itertools.count)


def decide(
  what: str,
  mine: Any,
  rule: Callable[[dict[int, Any]], Any],
  among: Sequence[int],
) -> Any:
  """Collects something from each process, and tells all what follows from it.

  **On the wire:** ``mine`` to the first process, the verdict to all others.

  Args:
    what: what all wait for, for the error.
    mine: what this process has to say, as JSON.
    rule: from what each process said to the verdict, as JSON; called by the
      first process.
    among: the processes that take part; each must call this equally often.

  Returns:
    The verdict, the same for all.

  Raises:
    MissingProcessError: on all who came, if others did not come in time.
    RuntimeError: if the processes were not joined.
  """
  client = compat.coordination_client()
  if client is None:
    raise RuntimeError(
      f'{what} is compared between processes, which jaxdist.initialize() has '
      'to join first.'
    )
  group = hashlib.blake2b(repr(among).encode(), digest_size=8).hexdigest()
  turn = next(_rounds[group])
  folder = f'jaxdist/{group}/{turn}'
  me, first = jax.process_index(), min(among)
  try:
    client.key_value_set_bytes(f'{folder}/said/{me}', _packed(mine))
    if me == first:
      client.key_value_set(f'{folder}/begun', '')
      verdict = _collect(client, f'{folder}/said/', what, rule, among)
      client.key_value_set_bytes(f'{folder}/verdict', _packed(verdict))
      if turn > 0:  # All have read the one before: they answered this one.
        client.key_value_delete(f'jaxdist/{group}/{turn - 1}')
    else:
      wait = lambda key, seconds: client.blocking_key_value_get_bytes(
        f'{folder}/{key}', int(1000 * seconds)
      )
      wait('begun', timeout)
      verdict = json.loads(wait('verdict', timeout + _VERDICT_SECONDS))
  except jax.errors.JaxRuntimeError as error:
    raise MissingProcessError(
      f'process {first} did not come to {what} within {timeout:g} s, or the '
      f'coordination service on process 0 is gone.'
    ) from error
  if 'missing' in verdict:
    raise MissingProcessError(verdict['missing'])
  return verdict['verdict']


def from_first(what: str, function: Callable[[], Any]) -> Any:
  """What a function returns on the first process, which alone calls it.

  **On the wire:** the result, from the first process to all others.

  Args:
    what: see :func:`decide`.
    function: returns JSON.

  Returns:
    Its result, the same for all.

  Raises:
    Exception: what it raised; on the other processes as OSError if the system
      had a number for it, else as RuntimeError.
    MissingProcessError: if another process does not call this in time.
  """
  if jax.process_count() == 1:
    return function()
  mine = raised = None
  if jax.process_index() == 0:
    try:
      mine = {'result': function()}
    except Exception as error:  # The others would wait for an answer.
      mine, raised = {'refused': told(error)}, error
  everyone = range(jax.process_count())
  said = decide(what, mine, lambda said: said[0], everyone)
  if raised is not None:
    raise raised
  if 'refused' in said:
    raise heard(*said['refused'])
  return said['result']


def told(error: BaseException) -> tuple[int | None, str]:
  """An error as JSON: the system's number, if it has one, and words."""
  number, words = (
    getattr(error, 'errno', None),
    getattr(error, 'strerror', None),
  )
  return number, words or str(error)


def heard(number: int | None, words: str) -> Exception:
  """The error that was told."""
  return RuntimeError(words) if number is None else OSError(number, words)


def sound_alarm(name: str) -> None:
  """Tells all processes that something of this name went wrong here."""
  client = compat.coordination_client()
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    client.key_value_set(f'jaxdist/alarm/{name}/{jax.process_index()}', '')


def hears_alarm(name: str) -> bool:
  """Whether something of this name went wrong on any process."""
  client = compat.coordination_client()
  # Where the service is gone, nobody can tell.
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    return bool(client.key_value_dir_get(f'jaxdist/alarm/{name}/'))
  return True


def _collect(client, folder, what, rule, among):
  """What the first process makes of all answers."""
  end = time.monotonic() + timeout
  pause = _POLL_SECONDS
  while len(found := client.key_value_dir_get_bytes(folder)) < len(among):
    if time.monotonic() > end:
      there = {int(key.rpartition('/')[2]) for key, _ in found}
      missing = sorted(set(among) - there)
      return {
        'missing': f'processes {missing} did not come to {what} within '
        f'{timeout:g} s.'
      }
    time.sleep(pause)
    pause = min(2 * pause, _MOST_POLL_SECONDS)
  said = {int(key.rpartition('/')[2]): json.loads(x) for key, x in found}
  return {'verdict': rule(dict(sorted(said.items())))}


def _packed(value):
  return json.dumps(value).encode()
