"""The folder that a comparison leaves, and how it goes on from one."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import statistics
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxdist as jd


@dataclasses.dataclass
class Run:
  """One training run, finished or not.

  Attributes:
    name: the method's name.
    lines: metrics of each step so far, as in ``metrics.jsonl``.
    traffic: what a worker sends in a step, once warm-ups are over.
  """

  name: str
  lines: list[dict[str, Any]]
  traffic: jd.Traffic

  @property
  def val_loss(self) -> float | None:
    """The last validation loss, in nats a byte."""
    return next(
      (line['val_loss'] for line in reversed(self.lines) if 'val_loss' in line),
      None,
    )

  @property
  def bytes_a_step(self) -> float:
    """That a worker has sent, on average."""
    return self.lines[-1]['bytes_sent'] / self.lines[-1]['step']

  @property
  def step_seconds(self) -> float:
    """Median time of a step."""
    return statistics.median(line['step_seconds'] for line in self.lines)

  @property
  def seconds(self) -> float:
    """Time in all: compiling, training, evaluating, saving."""
    return self.lines[-1]['seconds']


class Folder:
  """Reads and writes the results in ``--out``.

  ========================  ==============================================
  ``settings.json``         the configuration, and what it resolved to
  ``metrics.jsonl``         one line a step; null is no finite number
  ``checkpoints/METHOD/``   the training state
  ``METHOD.traffic.json``   what the compiled step sends
  ``report.html``           plots and a table
  ========================  ==============================================

  Of several processes all save checkpoints, and the first writes the rest.
  """

  def __init__(self, path: Path, keep_going: bool = False, writes: bool = True):
    self.path = path
    self.keep_going = keep_going
    self.writes = writes
    self.metrics = path / 'metrics.jsonl'
    self.settings = path / 'settings.json'
    self._unwritten = []

  def checkpoints(self, name: str) -> Path:
    """Where the checkpoints of a run are."""
    return self.path / 'checkpoints' / name

  @property
  def begun(self) -> bool:
    """Whether it holds a comparison."""
    return self.settings.exists()

  def begun_by(self, launch: str) -> bool:
    """Whether the comparison was begun by this launch, see place.launch."""
    return self.begun and (
      json.loads(self.settings.read_text()).get('launch') == launch
    )

  def check(
    self, settings: dict[str, Any], resume: bool, overwrite: bool
  ) -> None:
    """Refuses what would lose or mix results; changes nothing.

    Args:
      settings: all that decides the numbers.
      resume: go on.
      overwrite: begin anew even if there are results.

    Raises:
      ValueError: results would be lost, or mixed, or there are none.
    """
    if resume:
      if not self.begun:
        raise ValueError(
          f'--resume must find a comparison in --out, got {self.path}: '
          'nothing was begun there.'
        )
      before = json.loads(self.settings.read_text())
      # As it was read: tuples are lists.
      for name, value in json.loads(json.dumps(settings)).items():
        if before.get(name) != value:
          raise ValueError(
            f'--resume must keep the settings, got another {name}: '
            f'{before.get(name)} before, {value} now.'
          )
      for path in (self.path / 'checkpoints').glob('*'):
        step = jd.latest_step(path) or 0
        lines = self.load_lines(path.name)
        if [line['step'] for line in lines[:step]] != list(range(1, step + 1)):
          raise ValueError(
            f'--resume must find all steps in {self.metrics}, but some of the '
            f'{step} of {path.name} are missing: begin anew with --overwrite.'
          )
      return
    if self.begun and not overwrite:
      raise ValueError(
        f'--out must not hold results, got {self.path}: add --resume to go on '
        'with them or --overwrite to replace them.'
      )

  def begin(self, settings: dict[str, Any], launch: str) -> None:
    """Makes room for a comparison."""
    if self.writes:
      self.clear()
      text = json.dumps({**settings, 'launch': launch}, indent=2)
      replace(self.settings, text + '\n')

  def clear(self) -> None:
    """Removes what an earlier comparison left, and nothing else."""
    shutil.rmtree(self.path / 'checkpoints', ignore_errors=True)
    for path in [
      self.settings,
      self.metrics,
      self.path / 'report.html',
      *self.path.glob('*.traffic.json'),
    ]:
      path.unlink(missing_ok=True)

  def save_traffic(self, run: Run) -> None:
    """Keeps what the compiled step sends."""
    if self.writes:
      replace(self._traffic(run.name), run.traffic.to_json() + '\n')

  def load(self, name: str) -> Run:
    """A run that was finished before."""
    traffic = jd.Traffic.from_json(self._traffic(name).read_text())
    return Run(name, self.load_lines(name), traffic)

  def load_lines(self, name: str | None = None) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``, of one run or all."""
    if not self.metrics.exists():
      return []
    # A crash may have cut the last line off.
    whole = self.metrics.read_text().rpartition('\n')[0]
    lines = map(from_line, whole.splitlines())
    return [line for line in lines if name in (None, line['run'])]

  def _traffic(self, name: str) -> Path:
    return self.path / f'{name}.traffic.json'

  def truncate(self, name: str, step: int) -> list[dict[str, Any]]:
    """Drops what a run wrote after its checkpoint.

    Args:
      name: the run.
      step: the checkpoint's step.

    Returns:
      The lines that the run keeps.
    """
    kept = [
      line
      for line in self.load_lines()
      if line['run'] != name or line['step'] <= step
    ]
    if self.writes:
      replace(self.metrics, ''.join(map(as_line, kept)))
    return [line for line in kept if line['run'] == name]

  def append(self, line: dict[str, Any], sync: bool) -> None:
    """Writes one line of metrics; ``sync`` also brings it to the disk.

    What could not be written before is written first.
    """
    if not self.writes:
      return
    self._unwritten.append(as_line(line))
    size = self.metrics.stat().st_size if self.metrics.exists() else 0
    with self._going_on():
      try:
        with self.metrics.open('a') as file:
          file.writelines(self._unwritten)
          if sync:
            file.flush()
            os.fsync(file.fileno())
      except OSError:
        with contextlib.suppress(OSError):
          os.truncate(self.metrics, size)  # No half a line.
        raise
      self._unwritten = []

  def save(self, saver: jd.Saver, step: int, state: Any) -> None:
    """Saves a checkpoint of a run."""
    with self._going_on():
      saver.save(step, state)
      saver.wait()

  @contextlib.contextmanager
  def _going_on(self) -> Iterator[None]:
    """Turns what the file system refuses into a warning, if asked."""
    try:
      yield
    except OSError as error:
      if not self.keep_going:
        raise
      warnings.warn(f'{error} Training goes on.', stacklevel=4)


def as_line(line: dict[str, Any]) -> str:
  return json.dumps(plain(line), allow_nan=False) + '\n'


def from_line(text: str) -> dict[str, Any]:
  """The inverse of :func:`as_line`; what was no finite number is NaN."""
  found = json.loads(text)
  return {k: math.nan if v is None else v for k, v in found.items()}


def plain(value: Any) -> Any:
  """For JSON, which has no NaN: None in the place of what is not finite."""
  if isinstance(value, dict):
    return {k: plain(v) for k, v in value.items()}
  if isinstance(value, list):
    return list(map(plain, value))
  is_number = not isinstance(value, float) or math.isfinite(value)
  return value if is_number else None


def replace(path: Path, text: str) -> None:
  """Writes a file whole or not at all."""
  temporary = path.with_name(path.name + '.tmp')
  temporary.write_text(text, encoding='utf-8')
  os.replace(temporary, path)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
  """Makes the folder and keeps other processes out of it.

  Args:
    path: the folder.

  Yields:
    Nothing; the lock goes when the process does, whatever ends it.

  Raises:
    ValueError: it cannot be made, or another process holds it.
  """
  try:
    path.mkdir(parents=True, exist_ok=True)
    # Kept on leaving: deleting a lock file lets two processes in.
    file = (path / '.lock').open('a+')
  except OSError as error:
    raise ValueError(
      f'--out must be a folder to write to, got {path}: {error.strerror}.'
    ) from error
  with file:
    try:
      lock(file)
    except OSError as error:
      raise ValueError(
        f'--out must not be in use, got {path}: another process is writing '
        'to it.'
      ) from error
    yield


def lock(file) -> None:
  """Takes a lock or raises OSError, at once."""
  try:
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except ModuleNotFoundError:
    import msvcrt

    file.seek(0)
    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
