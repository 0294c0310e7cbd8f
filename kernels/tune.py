"""Finds the sizes of the kernels' tiles: fills the data of ``tiles.py``.

``python -m jaxdist.kernels.tune --tpu v5e`` compiles the kernels, which needs
no TPU, and takes the tiles with the least time: that of the bundles or that of
the bytes, whichever is longer, and that of the first and the last step's
transfers, which nothing hides. ``python -m jaxdist.kernels.tune``, on a machine
with a TPU, runs them and takes the time. Both start from the tiles that are
used now, and double and halve them for as long as that helps. What gains less
than 2% is not written down.
"""

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import statistics
import sys
from collections.abc import Callable

import jax

from jaxdist.kernels import bench, schedule, tiles

SIZE = 1024  # Of the rows that are tuned for.
LEAST_STEP = 2**18  # 1 MiB, below which transfers don't reach full speed.
GAIN = 0.98  # Of the time before, at most: else nothing is written down.
REPEATS = 7

Seconds = Callable[[bench.Case, tiles.Tiles], float]


def scheduled(
  folder: str, chip: schedule.Chip, case: bench.Case, sizes: tiles.Tiles
) -> float:
  """The time that a schedule says."""
  try:
    count = schedule.bundles(folder, chip, case.function, *case.arrays)
  except jax.errors.JaxRuntimeError:  # It does not fit into the chip's memory.
    return math.inf
  steps = max(1, math.prod(case.shape) // sizes.step)
  memory = case.num_bytes / chip.bandwidth
  return max(count / chip.clock, memory) + memory / steps


def measured(case: bench.Case, sizes: tiles.Tiles) -> float:
  """The median time on this machine."""
  del sizes
  arrays = [bench.drawn(array, case.shape[1]) for array in case.arrays]
  try:
    compiled = jax.jit(case.function).lower(*arrays).compile()
  except jax.errors.JaxRuntimeError:
    return math.inf
  run = functools.partial(bench.call, compiled, *arrays)
  run()
  return statistics.median(bench.seconds(run) for _ in range(REPEATS))


def climb(
  start: tiles.Tiles, seconds: Callable[[tiles.Tiles], float]
) -> tuple[tiles.Tiles, float, float]:
  """Doubles and halves each size for as long as that takes less time.

  Args:
    start: where to begin.
    seconds: what tiles take.

  Returns:
    The best, or the first if they are not much better; what the first take, and
    what these take.
  """
  first = seconds(start)
  best, least = start, first
  for field, change in ('chunk', 2), ('chunk', 0.5), ('step', 2), ('step', 0.5):
    while True:
      sizes = {'step': best.step, 'chunk': best.chunk}
      sizes[field] = int(sizes[field] * change)
      low = max(LEAST_STEP, sizes['chunk'])
      if not low <= sizes['step'] <= tiles.MOST or sizes['chunk'] < tiles.LEAST:
        break
      trial = dataclasses.replace(best, **sizes)
      time = seconds(trial)
      if time >= least:
        break
      best, least = trial, time
  return (best, first, least) if least < GAIN * first else (start, first, first)


def tune(kind: str, only: str, seconds: Seconds) -> dict[str, tiles.Tiles]:
  """The best tiles of the kernels for which others are better than now.

  Args:
    kind: of device, as JAX calls it.
    only: an expression that is found in the names of operations.
    seconds: what an operation takes with some tiles.

  Returns:
    Entries for the file of that kind.
  """
  by_kernel = {}
  for case in bench.cases('tpu', SIZE, only):
    with tiles.watched() as found:
      jax.eval_shape(case.function, *case.arrays)
    for kernel in found:
      by_kernel.setdefault(kernel, []).append(case)

  def total(cases, sizes):
    with tiles.watched(forced=sizes):
      return sum(seconds(case, sizes) for case in cases)

  better = {}
  for kernel in sorted(by_kernel):
    now = tiles.find(kernel, kind)
    best, first, least = climb(now, functools.partial(total, by_kernel[kernel]))
    print(
      f'{kernel:32} {now.step:>8} {now.chunk:>6} {1e6 * first:>9.1f} us  '
      f'{best.step:>8} {best.chunk:>6} {1e6 * least:>9.1f} us',
      flush=True,
    )
    # What is right as it is must not get what is better for others like it.
    if best != now or any(kernel.startswith(f'{other} ') for other in better):
      better[kernel] = best
  return better


def write(path: pathlib.Path, better: dict[str, tiles.Tiles]) -> None:
  """Adds entries to a file; a line each, in order of the alphabet."""
  entries = tiles.read(path) if path.exists() else {}
  lines = [
    f'  {json.dumps(name)}: '
    + json.dumps({'step': one.step, 'chunk': one.chunk})
    for name, one in sorted((entries | better).items())
  ]
  path.write_text('{\n' + ',\n'.join(lines) + '\n}\n')


def main(argv: list[str] | None = None) -> None:
  """Tunes for a kind of device, and writes its file."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--tpu', choices=schedule.CHIPS, help='read schedules')
  parser.add_argument(
    '--only',
    default='',
    help='operations in whose names this expression is found',
  )
  options = parser.parse_args(argv)
  if options.tpu:
    chip, folder = schedule.CHIPS[options.tpu], schedule.prepare()
    kind = schedule.device(chip).device_kind
    seconds = functools.partial(scheduled, folder, chip)
  else:
    kind, seconds = jax.devices()[0].device_kind, measured
    if jax.default_backend() != 'tpu':
      parser.error(f'--tpu must name a TPU, as this machine has none: {kind}')
  better = tune(kind, options.only, seconds)
  if better:
    write(tiles.path(kind), better)
    print(f'wrote {tiles.path(kind)}')


if __name__ == '__main__':
  main(sys.argv[1:])
