"""Text to train on: Python's own source, or files of the user's."""

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

# Not part of every installation, or different in each.
SKIPPED_FOLDERS = {'site-packages', 'dist-packages', 'test', 'tests'}
SKIPPED_FILES = '_sysconfigdata'

# One file in so many is kept for validation.
HELD_OUT_EVERY = 20


class Text(NamedTuple):
  """Bytes to train on, bytes to validate on, and where they come from."""

  train: np.ndarray
  validation: np.ndarray
  source: str

  def __str__(self) -> str:
    # The digest tells texts apart that differ in any byte.
    digest = hashlib.sha256(self.train)
    digest.update(self.validation)
    return (
      f'{self.source}, {len(self.train):,} bytes and '
      f'{len(self.validation):,} for validation (sha256 '
      f'{digest.hexdigest()[:12]})'
    )


def standard_library() -> list[Path]:
  """The source files of the running Python's standard library, sorted."""
  root = Path(sysconfig.get_path('stdlib'))
  return [
    path
    for path in sorted(root.rglob('*.py'))
    if not SKIPPED_FOLDERS & set(path.relative_to(root).parts)
    and not path.name.startswith(SKIPPED_FILES)
  ]


def user_files(data: Path) -> list[Path]:
  """A file, or the files in a folder that are not hidden, sorted."""
  if data.is_file():
    return [data]
  if not data.is_dir():
    raise ValueError(
      f'--data must be a file or a folder, got {data}: there is neither.'
    )

  def hidden(path):
    return any(part.startswith('.') for part in path.relative_to(data).parts)

  return [p for p in sorted(data.rglob('*')) if p.is_file() and not hidden(p)]


def split(files: list[bytes]) -> tuple[bytes, bytes]:
  """Holds every twentieth file out, or the last tenth if files are few."""
  if len(files) < HELD_OUT_EVERY:
    joined = b'\n'.join(files)
    cut = len(joined) * 9 // 10
    return joined[:cut], joined[cut:]
  held_out = files[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
  train = [
    content
    for i, content in enumerate(files)
    if i % HELD_OUT_EVERY != HELD_OUT_EVERY // 2
  ]
  return b'\n'.join(train), b'\n'.join(held_out)


def load(data: Path | None) -> Text:
  """Reads and splits the text.

  Args:
    data: a file or folder of the user's; ``None`` for the standard library.

  Returns:
    A :class:`Text`.

  Raises:
    ValueError: ``data`` is missing or cannot be read.
  """
  files = standard_library() if data is None else user_files(data)
  contents = []
  for path in files:
    try:
      content = path.read_bytes()
    except OSError as error:
      raise ValueError(
        f'--data must be readable, got {path}: {error.strerror}.'
      ) from error
    if b'\0' not in content[:8192]:  # Git's test for a binary file.
      contents.append(content)
  train, validation = split(contents)
  return Text(
    train=np.frombuffer(train, np.uint8),
    validation=np.frombuffer(validation, np.uint8),
    source='Python standard library' if data is None else str(data),
  )


class Windows:
  """Rows of ``length + 1`` bytes that follow each other in the text.

  The last byte of a row is the first of the next, so that each byte is
  predicted once. Random access is all that Grain needs of a source.
  """

  def __init__(self, text: np.ndarray, length: int):
    self.text, self.length = text, length

  def __len__(self) -> int:
    return max(0, (len(self.text) - 1) // self.length)

  def __getitem__(self, index) -> np.ndarray:
    start = int(index) * self.length
    return self.text[start : start + self.length + 1]


def training_batches(
  text: Text, length: int, rows: int, seed: int
) -> grain.MapDataset:
  """An endless sequence of shuffled batches: ``batches[step]``.

  A batch follows from its step alone, so resuming needs no more than the step.

  Args:
    text: what to read.
    length: bytes to predict in each row.
    rows: rows in a batch, over all workers.
    seed: order of the rows; each pass over the text has another one.

  Returns:
    A dataset of ``uint8[rows, length + 1]``.
  """
  source = grain.MapDataset.source(Windows(text.train, length))
  return source.shuffle(seed).repeat().batch(rows)


def validation_rows(
  text: Text, length: int, divisor: int, most: int = 256
) -> np.ndarray:
  """Windows spread evenly over the validation text.

  Args:
    text: what to read.
    length: bytes to predict in each row.
    divisor: the number of rows is a multiple of it.
    most: about how many rows to take, if there are as many.

  Returns:
    ``uint8[rows, length + 1]``.
  """
  windows = Windows(text.validation, length)
  rows = max(min(most, len(windows)) // divisor, 1) * divisor
  return np.stack([windows[i * len(windows) // rows] for i in range(rows)])


def check(text: Text, length: int, rows: int, divisor: int) -> None:
  """Refuses a text that fills no batch, or too little to validate on.

  Args:
    text: what was loaded.
    length: bytes to predict in each row.
    rows: rows in a training batch.
    divisor: fewest rows to validate on.

  Raises:
    ValueError: with what is missing.
  """
  for part, content, need in (
    ('training', text.train, rows * length + 1),
    ('validation', text.validation, divisor * length + 1),
  ):
    if len(content) < need:
      raise ValueError(
        f'--data must hold at least {need:,} bytes for {part}, got '
        f'{len(content):,} from {text.source}.'
      )
