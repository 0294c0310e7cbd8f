"""Sizes of the kernels' tiles: data, by kind of device.

``tuned/`` has a file for each kind of device that was tuned, and
``default.json``. A kernel gets the first entry that there is for it:

1. in the file of the kind itself: that of ``TPU v5 lite`` is
   ``tpu-v5-lite.json``;
2. in that of its family, the kind without its last words: ``tpu-v5.json``;
3. in ``default.json``, as where the kind is not known.

Within a file likewise: ``quantize int8 stochastic`` before ``quantize int8``
before ``quantize``. ``python -m jaxdist.kernels.tune`` writes the files, and
``python -m jaxdist.kernels.bench --tpu v5e`` says which entries were used.
"""

import contextlib
import contextvars
import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator

import jax

FOLDER = pathlib.Path(__file__).parent / 'tuned'
LEAST, MOST = 2**11, 2**22  # Numbers: two registers, and 16 MiB.
KERNELS = ('dequantize', 'hadamard', 'quantize', 'scatter', 'top_k')
SPELLINGS = {
  'TPU v5e': 'TPU v5 lite',
  'TPU v5p': 'TPU v5',
  'TPU v6e': 'TPU v6 lite',
}


@dataclasses.dataclass(frozen=True)
class Tiles:
  """How a kernel cuts up its work; numbers are of 32 bits, in whole rows.

  Attributes:
    step: numbers of each array that are in memory at a time, in a grid step.
    chunk: numbers that are in registers at a time.
    source: the file and the entry that say so.
  """

  step: int
  chunk: int
  source: str

  def __post_init__(self):
    for field in ('step', 'chunk'):
      value = getattr(self, field)
      if not isinstance(value, int) or value & (value - 1):
        raise ValueError(
          f'{self.source}: {field} must be a power of two, got {value!r}.'
        )
    if not LEAST <= self.chunk <= self.step <= MOST:
      raise ValueError(
        f'{self.source}: {LEAST} <= chunk <= step <= {MOST} must hold, got '
        f'chunk {self.chunk} and step {self.step}.'
      )


@dataclasses.dataclass(frozen=True)
class _Watch:
  forced: Tiles | None
  found: dict[str, Tiles]


_watch = contextvars.ContextVar('watch', default=None)


def path(kind: str) -> pathlib.Path:
  """The file of a kind of device; it need not be there."""
  name = SPELLINGS.get(kind, kind)
  return FOLDER / f'{name.lower().replace(" ", "-")}.json'


def find(kernel: str, kind: str) -> Tiles:
  """The tiles of a kernel on a kind of device, see above.

  Args:
    kernel: its name and what it does, such as ``quantize int8 stochastic``.
    kind: what JAX calls the device; empty if that is not known.

  Returns:
    The tiles.

  Raises:
    ValueError: if a file is not as it should be.

  Examples:
    >>> find('hadamard', 'TPU v9').source
    'default: hadamard'
  """
  watch = _watch.get() or _Watch(None, {})
  tiles = watch.forced or _lookup(kernel, SPELLINGS.get(kind, kind))
  watch.found[kernel] = tiles
  return tiles


@contextlib.contextmanager
def watched(forced: Tiles | None = None) -> Iterator[dict[str, Tiles]]:
  """Lists what the kernels that are traced meanwhile find, by kernel.

  Args:
    forced: what all of them find, in place of the files' entries.

  Yields:
    The list, which fills.
  """
  jax.clear_caches()  # A program that was traced before would not look again.
  watch = _Watch(forced, {})
  token = _watch.set(watch)
  try:
    yield watch.found
  finally:
    _watch.reset(token)
    if forced:
      jax.clear_caches()


@functools.cache
def _lookup(kernel, kind):
  for name in (*_general(kind), 'default'):
    entries = read(path(name)) if path(name).exists() else {}
    for entry in _general(kernel):
      if entry in entries:
        return entries[entry]
  raise ValueError(f'{path("default")} must have an entry for {kernel!r}.')


def _general(name):
  """The name, then without its last words."""
  words = name.split()
  return [' '.join(words[:i]) for i in range(len(words), 0, -1)]


def read(file: pathlib.Path) -> dict[str, Tiles]:
  """The entries of a file.

  Raises:
    ValueError: if one is not as it should be; names it, and the rule.
  """
  try:
    entries = json.loads(file.read_text())
  except json.JSONDecodeError as error:
    raise ValueError(f'{file} must be JSON: {error}.') from None
  if not isinstance(entries, dict):
    raise ValueError(f'{file} must hold entries by name, got {entries!r}.')
  tiles = {}
  for name, entry in entries.items():
    source = f'{file.stem}: {name}'
    if name.split(' ')[0] not in KERNELS:
      raise ValueError(f'{source}: the first word must be one of {KERNELS}.')
    if not isinstance(entry, dict) or entry.keys() != {'step', 'chunk'}:
      raise ValueError(f"{source} must have 'step' and 'chunk', got {entry}.")
    tiles[name] = Tiles(**entry, source=source)
  return tiles
