"""Where a step is written, and how a run that was given up loses that place.

The run that saves in a directory has a number there, one more than the run
before, and a directory ``saving-NUMBER``. A file ``owner`` in it holds a name
of the run's own, since numbers begin anew where all is removed. Orbax writes
below that, and renames the step's directory there once it is whole. Then the
first process renames it to where it is found: that is the commit.

A process that all had given up, stopped at any moment, may wake up beside its
successors. These have taken the next number and then renamed its directory,
before they looked what is there: either its step was committed by then, or what
it goes on to do fails, since what it renames is not there any more. Where it
makes the directory anew, it makes no ``owner``. What its successors write it
never touches: their number is larger.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jaxdist.checkpoint import layout

_OWNER = 'owner'
_SAVING = re.compile('saving-([0-9]+)')
_REMOVED = re.compile('removed-[0-9a-f]{16}')


class Run(NamedTuple):
  """Who saves in a directory.

  Attributes:
    number: one more than that of the run before.
    name: no other run's.
  """

  number: int
  name: str


# This process's, by directory.
_runs: dict[str, Run] = {}


class Staging(NamedTuple):
  """A directory in which one save writes one step.

  Attributes:
    directory: that of the run's checkpoints.
    run: whose.
    token: no other save's.
    step: what is saved.
  """

  directory: str
  run: Run
  token: str
  step: int

  @property
  def path(self) -> Path:
    """Which only this save uses."""
    return _path(self.directory, self.run.number) / self.token

  @property
  def step_path(self) -> Path:
    """Where Orbax is to write."""
    return self.path / layout.step_name(self.step)

  @property
  def is_lost(self) -> bool:
    """Whether another run has taken over."""
    return layout.is_local(self.directory) and not _is_held(
      self.directory, self.run
    )

  def commit(self, keep: int) -> None:
    """Puts the step among the checkpoints, and takes older ones from them.

    Args:
      keep: how many to keep.

    Raises:
      RuntimeError: if another run has taken over, or the step was committed and
        older ones remain.
    """
    if not layout.is_local(self.directory):
      return
    if self.is_lost:
      raise lost(self.directory)
    try:
      self.step_path.rename(Path(self.directory, self.step_path.name))
    except OSError as error:
      if error.errno in (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY):
        raise lost(self.directory) from error
      raise
    try:
      for step in self._older()[keep - 1 :]:
        self._retire(layout.step_name(step))
    except OSError as error:
      if self.is_lost:
        raise lost(self.directory) from error
      raise RuntimeError(
        f'step {self.step} is saved in {self.directory}, but older ones than '
        f'the newest {keep} remain: {error.strerror or error}.'
      ) from error

  def delete(self) -> None:
    """Deletes what is left of the save, older steps among it.

    What readers have open may remain, on a network file system.
    """
    if layout.is_local(self.directory):
      shutil.rmtree(self.path, ignore_errors=True)

  @contextlib.contextmanager
  def removed_after_errors(self) -> Iterator[None]:
    """Removes it if anything fails: a full disk should not stay full."""
    try:
      yield
    except BaseException:
      self.delete()
      raise

  def _older(self):
    steps = layout.checkpoints(self.directory)
    return sorted((step for step in steps if step < self.step), reverse=True)

  def _retire(self, name):
    """Takes a step from the checkpoints at once, then to be deleted."""
    try:
      Path(self.directory, name).rename(self.path / name)
    except FileNotFoundError:
      if not self.path.exists():
        raise


def take_over(directory: str) -> Run:
  """Begins a run: none that began before commits anything from now on.

  Also deletes what these have written and not committed.

  Args:
    directory: of checkpoints; nothing is done where none can be renamed.

  Returns:
    The run.

  Raises:
    RuntimeError: if another run begins at the same time.
  """
  if not layout.is_local(directory):
    return Run(0, '')
  os.makedirs(directory, exist_ok=True)
  number = max(_taken(directory), default=0) + 1
  run = Run(number, secrets.token_hex(8))
  path = _path(directory, number)
  try:
    path.mkdir()
    (path / _OWNER).write_text(run.name)
  except (FileExistsError, FileNotFoundError) as error:
    raise lost(directory) from error
  # Who looks after this moment sees the number. It is not made anew after a
  # failure: who was stopped before it would take over from its successors.
  for other in _taken(directory):
    if other > number:
      raise lost(directory)
    if other < number:
      _remove(_path(directory, other))
  for name in filter(_REMOVED.fullmatch, os.listdir(directory)):
    shutil.rmtree(Path(directory, name), ignore_errors=True)
  _runs[directory] = run
  return run


def current(directory: str) -> Run:
  """This process's run, which takes over if it has not yet.

  Raises:
    RuntimeError: if another run has taken over since.
  """
  run = _runs.get(directory)
  if run is not None and _is_held(directory, run):
    return run
  # Where nobody is, the directory was removed, and maybe made anew by Orbax.
  if run is not None and any(
    number > run.number or (_path(directory, number) / _OWNER).exists()
    for number in _taken(directory)
  ):
    raise lost(directory)
  return take_over(directory)


def lost(directory: str) -> RuntimeError:
  """The error of a run whose place another one has taken."""
  return RuntimeError(
    f'another run took over {directory}: this one saves there no more. '
    f'Checkpoints that were there still are.'
  )


def _path(directory, number):
  return Path(directory, f'saving-{number}')


def _is_held(directory, run):
  try:  # To open a file asks the server of a network file system.
    owner = (_path(directory, run.number) / _OWNER).read_text()
  except OSError as error:
    if error.errno in (errno.ENOENT, errno.ESTALE):
      return False
    raise
  return owner == run.name


def _taken(directory):
  """The numbers of runs that have a place."""
  try:
    names = os.listdir(directory)
  except FileNotFoundError:
    return []
  return [int(x[1]) for x in map(_SAVING.fullmatch, names) if x]


def _remove(path):
  """Makes the names in a run's directory void, in one moment; deletes it."""
  grave = path.with_name(f'removed-{secrets.token_hex(8)}')
  with contextlib.suppress(FileNotFoundError):  # Another one was faster.
    path.rename(grave)
  # Clients of a network file system may know the directory by a handle. The
  # owner's file goes first: without it nothing is committed that gets its name
  # after the list is made.
  (grave / _OWNER).unlink(missing_ok=True)
  for step in list(grave.glob('*/*')):
    with contextlib.suppress(FileNotFoundError):
      step.rename(step.with_name(secrets.token_hex(8)))
  shutil.rmtree(grave, ignore_errors=True)
