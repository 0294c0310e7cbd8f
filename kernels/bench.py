"""How fast the operations are.

``python -m jaxdist.kernels.bench --tpu v5e`` reads the time of each kernel for
TPUs from its schedule, on a machine without one: bundles, the time that they
take, the time that memory takes, the ratio, and which entry of which file of
``tuned/`` sized the tiles. Below 1 memory is the limit.

``python -m jaxdist.kernels.bench --gpu h100`` compiles the forms in XLA for a
GPU, on a machine without one, and counts what their programs read and write:
bytes of all arguments and results, bytes moved, and the share of the first in
the second, above which no form in XLA gets of the memory's rate.

``python -m jaxdist.kernels.bench`` times what this machine runs. Each time is
the median of runs that take turns with a copy of the rows, which moves 8 bytes
a number. Bytes are those of all arguments and results, once. Beside it stand
the definition, where another form runs, and torch's top-k of the same rows,
where torch is installed.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import math
import pathlib
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist.accounting import gpus, hlo, topology_mesh, traffic
from jaxdist.kernels import schedule, shapes, tiles
from jaxdist.kernels.hadamard import api as rotation
from jaxdist.kernels.pack.api import num_words
from jaxdist.kernels.quantize import api as quantization
from jaxdist.kernels.quantize.formats import FORMATS
from jaxdist.kernels.top_k import api as selection


@dataclasses.dataclass(frozen=True)
class Case:
  """An operation on arrays of one shape.

  Attributes:
    op: its name and static arguments.
    shape: of the rows.
    function: calls it.
    arrays: shapes and dtypes of what it takes.
  """

  op: str
  shape: tuple[int, int]
  function: Callable[..., Any]
  arrays: tuple[jax.ShapeDtypeStruct, ...]

  @property
  def num_bytes(self) -> int:
    """Bytes read once and written once: all arguments and results."""
    results = jax.eval_shape(self.function, *self.arrays)
    leaves = jax.tree.leaves((self.arrays, results))
    return sum(
      math.prod(x.shape) * x.dtype.itemsize
      for x in leaves
      if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    )


def floats(*shape: int) -> jax.ShapeDtypeStruct:
  """A shape of float32 numbers."""
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _key() -> jax.ShapeDtypeStruct:
  return jax.eval_shape(lambda: jax.random.key(0))


def quantize_cases(implementation: str | None, size: int) -> Iterator[Case]:
  """Quantization in all formats, with feedback, and the mean of payloads."""
  rows = shapes.NUMBERS // size
  x, options = floats(rows, size), {'implementation': implementation}
  key = _key()
  for name, code in FORMATS.items():
    for random in [False, True][: 1 + code.stochastic]:

      def encode(x, key, name=name, random=random):
        own = key if random else None
        return quantization.quantize(x, name, key=own, **options)

      def feed_back(x, residual, key, name=name, random=random):
        own = key if random else None
        return quantization.quantize_with_feedback(
          x, residual, name, key=own, **options
        )

      label = f'{name}, stochastic' if random else name
      yield Case(f'quantize {label}', x.shape, encode, (x, key))
      yield Case(f'with feedback {label}', x.shape, feed_back, (x, x, key))
    for workers in shapes.WORKERS:

      def mean(words, scale, name=name):
        return quantization.dequantize_mean(words, scale, name, size, **options)

      words = (workers, rows, num_words(size, code.bits))
      arrays = jax.ShapeDtypeStruct(words, jnp.uint32), floats(workers, rows, 1)
      yield Case(f'mean of {workers} {name}', x.shape, mean, arrays)


def top_k_cases(implementation: str | None, size: int) -> Iterator[Case]:
  """Selection with feedback and without, and the mean of payloads."""
  rows = shapes.NUMBERS // size
  x, options = floats(rows, size), {'implementation': implementation}
  for k in shapes.KEPT:
    select = functools.partial(selection.top_k, k=k, **options)
    feed_back = functools.partial(selection.top_k_with_feedback, k=k, **options)
    yield Case(f'top-{k}', x.shape, select, (x,))
    yield Case(f'with feedback top-{k}', x.shape, feed_back, (x, x))
    for workers in shapes.WORKERS:
      mean = functools.partial(selection.scatter_mean, size=size, **options)
      values = floats(workers, rows, k)
      arrays = values, jax.ShapeDtypeStruct(values.shape, jnp.uint32)
      yield Case(f'mean of {workers} top-{k}', x.shape, mean, arrays)


def long_row_cases(implementation: str | None, size: int) -> Iterator[Case]:
  """Selection of one number of a hundred from all; no kernel's work."""
  del size
  if implementation != 'tpu':
    k = shapes.NUMBERS // 100
    select = functools.partial(
      selection.top_k, k=k, implementation=implementation
    )
    x = floats(1, shapes.NUMBERS)
    yield Case(f'top-{k}', x.shape, select, (x,))


def rotate_cases(implementation: str | None, size: int) -> Iterator[Case]:
  """Rotation."""
  x, key = floats(shapes.NUMBERS // size, size), _key()
  turn = functools.partial(rotation.rotate, implementation=implementation)
  yield Case('rotate', x.shape, turn, (x, key))


def cases(implementation: str | None, size: int, only: str) -> Iterator[Case]:
  """The operations in whose names ``only`` is found, on rows of a size."""
  for some in (quantize_cases, top_k_cases, long_row_cases, rotate_cases):
    for case in some(implementation, size):
      if re.search(only, case.op):
        yield case


def tpu_table(generation: str, size: int, only: str) -> list[dict[str, Any]]:
  """A row for each kernel: its schedule against its bytes."""
  chip, folder = schedule.CHIPS[generation], schedule.prepare()
  table = []
  for case in cases('tpu', size, only):
    with tiles.watched() as found:
      count = schedule.bundles(folder, chip, case.function, *case.arrays)
    ((_, used),) = found.items()
    compute = count / chip.clock
    memory = case.num_bytes / chip.bandwidth
    row = {
      'op': case.op,
      'shape': case.shape,
      'bundles': count,
      'bytes': case.num_bytes,
      'compute_us': compute * 1e6,
      'memory_us': memory * 1e6,
      'ratio': compute / memory,
      'tiles': used.source,
    }
    table.append(row)
    print(
      f'{row["op"]:34} {"x".join(map(str, row["shape"])):>12} '
      f'{count:>10,} {row["compute_us"]:>10.1f} {row["memory_us"]:>10.1f} '
      f'{row["ratio"]:>6.2f}  {row["tiles"]}',
      flush=True,
    )
  return table


def gpu_table(gpu: str, size: int, only: str) -> list[dict[str, Any]]:
  """A row for each operation: what its program moves against its bytes."""
  mesh = topology_mesh(f'{gpu}:1', {'gpu': 1})
  placed = functools.partial(
    jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec())
  )
  table = []
  for case in cases('xla', size, only):
    arrays = [placed(x.shape, x.dtype) for x in case.arrays]
    compiled = jax.jit(case.function).lower(*arrays).compile()
    row = {
      'op': case.op,
      'shape': case.shape,
      'bytes': case.num_bytes,
      'moved': int(traffic(compiled).work.num_bytes),
    }
    row['share'] = row['bytes'] / row['moved']
    table.append(row)
    print(
      f'{row["op"]:34} {"x".join(map(str, row["shape"])):>12} '
      f'{row["bytes"]:>13,} {row["moved"]:>13,} {row["share"]:>6.2f}',
      flush=True,
    )
  return table


def call(function: Callable[..., Any], *arrays: jax.Array) -> None:
  """Calls a function and waits for what it returns."""
  jax.block_until_ready(function(*arrays))


def seconds(function: Callable[[], Any]) -> float:
  """What a call takes."""
  start = time.perf_counter()
  function()
  return time.perf_counter() - start


def drawn(array: jax.ShapeDtypeStruct, limit: int) -> jax.Array:
  """Numbers for an argument; integers are places in a row, or codes."""
  key = jax.random.key(0)
  if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
    return key
  if array.dtype == jnp.uint32:
    # Different within a row, for those that are places.
    column = jax.lax.broadcasted_iota(jnp.uint32, array.shape, 2)
    return column * jnp.uint32(limit // array.shape[2])
  return jax.random.normal(key, array.shape, array.dtype)


def _torch_top_k(case: Case) -> Callable[[], Any] | None:
  """The same selection by torch, if it is one and torch is there."""
  if (
    not case.op.startswith('top-') or importlib.util.find_spec('torch') is None
  ):
    return None
  import torch

  k = int(case.op.removeprefix('top-'))
  x = torch.randn(case.shape)

  def run():
    return x.gather(1, x.abs().topk(k, dim=1).indices)

  return run


def _opcodes(compiled: Any) -> list[str]:
  """What a program does; the same for the definition under two names."""
  program = hlo.parse(compiled.as_text())
  return [
    instruction.opcode
    for computation in program.computations.values()
    for instruction in computation.instructions.values()
  ]


def timed_table(
  implementation: str | None, size: int, only: str, repeats: int
) -> list[dict[str, Any]]:
  """A row for each operation: its time on this machine beside a copy's."""
  table = []
  for case, plain in zip(
    cases(implementation, size, only), cases('xla', size, only), strict=True
  ):
    arrays = [drawn(array, case.shape[1]) for array in case.arrays]
    try:
      compiled, definition = (
        jax.jit(one.function).lower(*arrays).compile() for one in (case, plain)
      )
    except (NotImplementedError, ValueError) as error:  # It has no such form.
      print(f'{case.op:34} {error}')
      continue
    x = jnp.ones(case.shape)
    copy = jax.jit(jnp.copy).lower(x).compile()
    runs = {
      'ms': functools.partial(call, compiled, *arrays),
      'copy_ms': functools.partial(call, copy, x),
    }
    if _opcodes(definition) != _opcodes(compiled):
      runs['definition_ms'] = functools.partial(call, definition, *arrays)
    peer = _torch_top_k(case)
    if peer is not None:
      runs['torch_ms'] = peer
    times = {name: [] for name in runs}
    for _ in range(repeats + 1):  # The first round warms up.
      for name, run in runs.items():
        times[name].append(1e3 * seconds(run))
    row = {'op': case.op, 'shape': case.shape, 'bytes': case.num_bytes}
    row |= {name: statistics.median(all_[1:]) for name, all_ in times.items()}
    row['gb_per_s'] = case.num_bytes / row['ms'] / 1e6
    row['of_copy_rate'] = (
      row['gb_per_s'] * row['copy_ms'] * 1e6 / (8 * math.prod(case.shape))
    )
    table.append(row)
    print(
      f'{row["op"]:34} {"x".join(map(str, row["shape"])):>12} '
      f'{row["bytes"]:>13,} {row["ms"]:>8.1f} {row["copy_ms"]:>8.1f} '
      f'{row.get("definition_ms", math.nan):>10.1f} '
      f'{row.get("torch_ms", math.nan):>8.1f} {row["gb_per_s"]:>6.1f} '
      f'{row["of_copy_rate"]:>6.2f}',
      flush=True,
    )
  return table


def main(argv: list[str] | None = None) -> None:
  """Prints the table, and writes it."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  what = parser.add_mutually_exclusive_group()
  what.add_argument('--tpu', choices=schedule.CHIPS, help='read schedules')
  what.add_argument('--gpu', choices=gpus.GPUS, help='count bytes moved')
  what.add_argument('--implementation', help='the form that is timed')
  parser.add_argument(
    '--only',
    default='',
    help='operations in whose names this expression is found',
  )
  parser.add_argument(
    '--size', type=int, choices=shapes.SIZES, default=1024, help='of a row'
  )
  parser.add_argument('--repeats', type=int, default=7, help='of timed runs')
  parser.add_argument('--json', type=pathlib.Path, help='also write it there')
  options = parser.parse_args(argv)
  if options.tpu:
    print(
      f'{"op":34} {"shape":>12} {"bundles":>10} {"compute us":>10} '
      f'{"memory us":>10} {"ratio":>6}  tiles'
    )
    table = tpu_table(options.tpu, options.size, options.only)
  elif options.gpu:
    print(f'{"op":34} {"shape":>12} {"bytes":>13} {"moved":>13} {"share":>6}')
    table = gpu_table(options.gpu, options.size, options.only)
  else:
    print(
      f'{"op":34} {"shape":>12} {"bytes":>13} {"ms":>8} {"copy ms":>8} '
      f'{"definition":>10} {"torch ms":>8} {"GB/s":>6} {"share":>6}'
    )
    table = timed_table(
      options.implementation, options.size, options.only, options.repeats
    )
  if options.json:
    options.json.write_text(json.dumps(table, indent=1) + '\n')


if __name__ == '__main__':
  main(sys.argv[1:])
