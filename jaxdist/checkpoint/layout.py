"""What lies where in the directory of a run's checkpoints."""

import contextlib
import errno
import json
import logging
import operator
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, SupportsIndex

import jax
from orbax.checkpoint import v1 as ocp

from jaxdist.digest import digest
from jaxdist.hosts import agreement

# 1 had no digests.
_FORMAT = 2
# What a step's directory holds: arrays, and JSON.
ARRAYS = 'state'
RECORD = 'jaxdist'


# What Orbax, TensorStore and JSON raise where files are damaged or gone.
UNREADABLE = (
  ocp.errors.InvalidLayoutError,
  FileNotFoundError,
  NotADirectoryError,
  LookupError,
  TypeError,
  ValueError,
)


class CorruptCheckpointError(ValueError):
  """A checkpoint is not what was saved: damaged, or parts of it are gone."""


def latest_step(directory: str | os.PathLike) -> int | None:
  """The step of the newest committed checkpoint.

  Args:
    directory: what was given to :func:`save`.

  Returns:
    The largest step, or ``None`` if there is no checkpoint or no directory. It
    is not read: after :func:`restore`, it is the step that was restored.

  Examples:
    >>> import jaxdist as jd
    >>> print(jd.latest_step('/no/such/directory'))
    None
  """
  return max(checkpoints(directory), default=None)


def checkpoint_metadata(
  directory: str | os.PathLike, step: SupportsIndex | None = None
) -> dict[str, Any]:
  """What :func:`save` was told to remember.

  Args:
    directory: what was given to :func:`save`.
    step: which checkpoint; ``None`` is the newest committed one.

  Returns:
    The ``metadata`` of that checkpoint, empty if none was given.

  Raises:
    FileNotFoundError: if there is no checkpoint, or none of that step.
    CorruptCheckpointError: if it was not written by :func:`save`, or was
      damaged.

  Examples:
    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> import jaxdist as jd
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   jd.save(directory, 1, jnp.ones(2), metadata={'batches_read': 32})
    ...   jd.checkpoint_metadata(directory, step=1)
    {'batches_read': 32}
  """
  paths = checkpoints(directory)
  step = max(paths, default=None) if step is None else operator.index(step)
  check_there(directory, paths, step)
  return read_record(paths[step])['metadata']


def absolute(directory: str | os.PathLike) -> str:
  """The directory as Orbax wants it."""
  directory = os.fspath(directory)
  return os.path.abspath(directory) if is_local(directory) else directory


def is_local(directory: str) -> bool:
  """Whether it is of a file system, and not of a store of objects."""
  return '://' not in directory


def step_name(step: int) -> str:
  """The name of a checkpoint's directory."""
  return ocp.path.step.standard_name_format().build_name(step)


def checkpoints(directory: str | os.PathLike) -> dict[int, Any]:
  """The paths of the committed checkpoints of a directory, by step."""
  steps = ocp.path.step.standard_name_format().find_all(absolute(directory))
  return {step.step: step.path for step in steps}


def listed(directory: str | os.PathLike) -> dict[int, Any]:
  """The checkpoints that the first process sees; others may see an older list.

  Network file systems keep listings for a while.

  Raises:
    OSError: the first process cannot list them; on all processes.
    MissingProcessError: if another process does not call this in time.
  """
  if jax.process_count() == 1:
    return checkpoints(directory)
  try:
    steps = agreement.from_first(
      'a list of checkpoints', lambda: sorted(checkpoints(directory))
    )
  except OSError as error:
    raise OSError(
      error.errno,
      f'process 0 cannot list {absolute(directory)}: {error.strerror}.',
    ) from error
  root = ocp.path.Path(absolute(directory))
  return {step: root / step_name(step) for step in steps}


def check_there(
  directory: str | os.PathLike, paths: dict[int, Any], step: int | None
) -> None:
  """Raises FileNotFoundError if a checkpoint is not there."""
  directory = absolute(directory)
  if not paths:
    raise FileNotFoundError(f'there is no checkpoint in {directory}.')
  if step not in paths:
    raise FileNotFoundError(
      f'there is no checkpoint of step {step} in {directory}, only of '
      f'{", ".join(map(str, sorted(paths)))}.'
    )


def context() -> ocp.Context:
  """How Orbax is to save and load."""
  context = ocp.Context()
  context.pytree.loading.partial_load = True
  # What cannot be made in a thread would be waited for in others.
  context.asynchronous.create_directories_asynchronously = False
  # By itself Orbax takes a dict of numbers and strings for a tree of arrays.
  registry = ocp.handlers.local_registry()
  registry.add(ocp.handlers.JsonHandler, checkpointable_name=RECORD)
  context.checkpointables.registry = registry
  return context


@contextlib.contextmanager
def without_pages() -> Iterator[None]:
  """Keeps back the tracebacks that Orbax logs of an error that it raises."""

  def is_other(record):
    path = pathlib.Path(record.pathname).as_posix()
    return record.name != 'asyncio' and '/orbax/' not in path

  loggers = [logging.getLogger(name) for name in ('absl', 'asyncio')]
  for logger in loggers:
    logger.addFilter(is_other)
  try:
    yield
  finally:
    for logger in loggers:
      logger.removeFilter(is_other)


def make_record(leaves: list[dict], metadata: dict[str, Any]) -> dict[str, Any]:
  """What lies beside the arrays, with a digest of itself.

  Args:
    leaves: JSON for each leaf of the state.
    metadata: the user's JSON.
  """
  record = {'format': _FORMAT, 'leaves': leaves, 'metadata': metadata}
  return record | {'digest': _digest(record)}


def system_numbers(error: BaseException) -> list[int]:
  """The system's error numbers, which TensorStore has in its words only."""
  return [int(x) for x in re.findall(r"os_error_code='(\d+)'", str(error))]


def raise_if_refused(error: BaseException, path: os.PathLike) -> None:
  """Raises if the file system refused to read: that is no damage.

  Raises:
    OSError: with that number.
  """
  cause = error
  while cause is not None:
    for number in system_numbers(cause):
      if number not in (errno.ENOENT, errno.ENOTDIR):
        raise OSError(
          number, f'{path} cannot be read: {os.strerror(number)}.'
        ) from error
    cause = cause.__cause__ or cause.__context__


def read_record(path: os.PathLike) -> dict[str, Any]:
  """The record of a checkpoint.

  Raises:
    CorruptCheckpointError: if it is not there or not as it was written.
    ValueError: if it is of another format.
  """
  try:
    with context():
      record = ocp.load_checkpointables(path, {RECORD: None})[RECORD]
    version = record['format']
    sealed = record.pop('digest', None)
  except UNREADABLE as error:
    raise_if_refused(error, path)
    raise CorruptCheckpointError(
      f'{path} was not written by jaxdist.save, or is not whole.'
    ) from error
  is_sealed = sealed == _digest(record)
  if version == _FORMAT and is_sealed:
    return record
  if is_sealed or (version == 1 and sealed is None):
    raise ValueError(
      f'{path} has format {version}; this version of jaxdist reads format '
      f'{_FORMAT}.'
    )
  raise CorruptCheckpointError(
    f'{path} is damaged: the record of its leaves is not as it was written.'
  )


def _digest(record):
  return digest(json.dumps(record, sort_keys=True).encode()).hex()
