"""Where a step is written, and how a run that was given up loses that place.

Each save writes below a directory with a name of its own, ``saving-TOKEN``, in
which the first process of its run has put a file, ``owner``. Orbax renames the
step's directory there once it is whole. Then the first process removes
``owner`` and renames the step to where it is found: that is the commit.

A process that all had given up, stopped at any moment of this, may wake up
beside its successors. These have renamed its directory before they looked what
is there, so that either its step was committed by then, or what it goes on to
do fails: what it renames is not there any more. Where it was stopped so early
that it makes the directory anew, there is no ``owner`` in it.
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

_PREFIX = 'saving-'
_NAME = re.compile(_PREFIX + '[0-9a-f]{16}')
_OWNER = 'owner'


class Staging(NamedTuple):
  """A directory in which one save writes one step.

  Attributes:
    directory: that of the run's checkpoints.
    step: what is saved.
    token: no other save's.
  """

  directory: str
  step: int
  token: str

  @classmethod
  def make(cls, directory: str, step: int) -> 'Staging':
    """Makes one."""
    staging = cls(directory, step, secrets.token_hex(8))
    if layout.is_local(directory):
      os.makedirs(directory, exist_ok=True)
      staging.path.mkdir()
      (staging.path / _OWNER).touch()
    return staging

  @property
  def path(self) -> Path:
    """Which nobody else uses."""
    return Path(self.directory, _PREFIX + self.token)

  @property
  def step_path(self) -> Path:
    """Where Orbax is to write."""
    return self.path / layout.step_name(self.step)

  @property
  def is_lost(self) -> bool:
    """Whether another run has taken over, before the commit."""
    return layout.is_local(self.directory) and not (self.path / _OWNER).exists()

  def commit(self, keep: int) -> None:
    """Puts the step among the checkpoints, and deletes older ones.

    Args:
      keep: how many to keep.

    Raises:
      RuntimeError: if another run has taken over.
    """
    if not layout.is_local(self.directory):
      return
    try:
      (self.path / _OWNER).unlink()
      self.step_path.rename(Path(self.directory, self.step_path.name))
      for step in self._older()[keep - 1 :]:
        self._retire(layout.step_name(step))
    except OSError as error:
      if error.errno in (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY):
        raise self.lost() from error
      raise
    # On a network file system what a reader has open remains; fence removes it.
    shutil.rmtree(self.path, ignore_errors=True)

  def lost(self) -> RuntimeError:
    """The error of a run whose place another one has taken."""
    return RuntimeError(
      f'another run took over {self.directory} while this one saved step '
      f'{self.step} there. Checkpoints that were there still are.'
    )

  @contextlib.contextmanager
  def removed_after_errors(self) -> Iterator[None]:
    """Removes it if anything fails: a full disk should not stay full."""
    try:
      yield
    except BaseException:
      if layout.is_local(self.directory):
        with contextlib.suppress(OSError):
          _remove(self.path)
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


def fence(directory: str) -> None:
  """Ends the saves of others: no step of theirs is committed from now on.

  Also deletes what they have written, and what killed ones left.

  Args:
    directory: of checkpoints; nothing is done where none can be renamed.
  """
  if not layout.is_local(directory):
    return
  try:
    names = os.listdir(directory)
  except (FileNotFoundError, NotADirectoryError):
    return
  for name in filter(_NAME.fullmatch, names):
    _remove(Path(directory, name))


def _remove(path):
  """Makes all names in a directory void, in one moment, and deletes it."""
  grave = path.with_name(_PREFIX + secrets.token_hex(8))
  try:
    path.rename(grave)
  except FileNotFoundError:
    return  # Another one was faster.
  # Clients of a network file system may know the directory by another name than
  # its own. The owner's file goes first: without it nothing is committed that
  # gets its name after the list is made.
  (grave / _OWNER).unlink(missing_ok=True)
  for name in os.listdir(grave):
    with contextlib.suppress(FileNotFoundError):
      (grave / name).rename(grave / secrets.token_hex(8))
  shutil.rmtree(grave, ignore_errors=True)
