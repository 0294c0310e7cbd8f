"""A save that has begun: its end, on this process and between all."""

import contextlib
import os
import threading
import traceback
from collections.abc import Iterator
from concurrent import futures
from typing import Any, NamedTuple

import jax

from jaxdist import compat
from jaxdist.checkpoint.layout import system_numbers
from jaxdist.checkpoint.staging import Staging, lost
from jaxdist.hosts import agreement

_POLL_SECONDS = 0.05
_MOST_POLL_SECONDS = 1.0


class Pending(NamedTuple):
  """A save that has begun."""

  future: futures.Future
  thread: threading.Thread
  token: str

  def end(self) -> BaseException | None:
    """Waits for what this process does, unless another one fails."""
    pause = _POLL_SECONDS if jax.process_count() > 1 else None
    while not futures.wait([self.future], pause).done:
      if agreement.hears_alarm(self.token):
        break
      pause = min(2 * pause, _MOST_POLL_SECONDS)
    begun.discard(self)
    return self.future.exception() if self.future.done() else None

  def rest(self) -> None:
    """Waits until all is deleted that was to be; the others know the end."""
    if self.future.done() and self.thread.is_alive():
      self.thread.join()

  def wait(self) -> None:
    """Returns once it is committed, or raises: alike on all processes."""
    error = self.end()
    if jax.process_count() > 1:
      first = agreement.decide(
        'the end of a save',
        error and [jax.process_index(), *agreement.told(error)],
        lambda said: next(filter(None, said.values()), None),
        range(jax.process_count()),
      )
      if first and error is None:
        rank, number, words = first
        error = agreement.heard(number, f'process {rank}: {words}')
    self.rest()
    if error is not None:
      raise error


begun: set[Pending] = set()


# A child process has the list, and no threads that would end its saves.
os.register_at_fork(after_in_child=begun.clear)


@compat.before_threads_end
def _end_what_nobody_waited_for():
  for pending in list(begun):
    if error := pending.end():
      traceback.print_exception(error)
    pending.rest()


def fail(future: futures.Future, token: str, error: BaseException) -> None:
  """Ends a save here, and tells the others, which would wait for this one."""
  future.set_exception(error)
  if jax.process_count() > 1:
    agreement.sound_alarm(token)


def finish(
  future: futures.Future,
  staging: Staging,
  keep: int,
  response: Any,
  stack: contextlib.ExitStack,
) -> None:
  """Commits what Orbax has written; in a thread.

  Args:
    future: to be told.
    staging: where it is written.
    keep: how many steps to keep.
    response: Orbax's.
    stack: to be left at the end.
  """
  try:
    with named_errors(staging.directory, staging.step), stack:
      try:
        response.result()
      except Exception as error:  # Orbax's, which cannot know of another run.
        if staging.is_lost:
          raise lost(staging.directory) from error
        raise
      if jax.process_index() == 0:
        staging.commit(keep)
  except BaseException as error:
    fail(future, staging.token, error)
    return
  future.set_result(None)
  if jax.process_index() == 0:
    staging.delete()  # It may take long, and nobody waits for it elsewhere.


@contextlib.contextmanager
def named_errors(directory: str, step: int) -> Iterator[None]:
  """Says what could not be saved, where the file system refused something."""
  try:
    yield
  except (OSError, ValueError) as error:
    number = next(iter(system_numbers(error)), getattr(error, 'errno', None))
    if number is None:
      raise
    raise OSError(
      number,
      f'step {step} was not saved in {directory}: {os.strerror(number)}. '
      f'Checkpoints that were there still are.',
    ) from error
