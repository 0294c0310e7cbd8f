"""Times of TPU kernels from their schedules, with no TPU.

A TPU executes bundles of instructions in the order that the compiler wrote
down, one a cycle, while transfers run beside them. A kernel whose bundles take
less time than its bytes is as fast as memory lets it be. The compiler's dump
lists the bundles; loops count by the trips that their exit tests name. What is
not seen: waits for a transfer that is late, and bundles that a branch skips.
"""

import dataclasses
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
  """A TensorCore with the memory of those that work with it.

  Attributes:
    topology: the smallest that the compiler knows.
    flops: a core's peak rate in bfloat16, a second.
    bandwidth: of the memory, bytes a second.
    mxus: matrix units.
    mxu_size: their rows and columns.
  """

  topology: str
  flops: float
  bandwidth: float
  mxus: int
  mxu_size: int

  @property
  def clock(self) -> float:
    """Cycles a second: each matrix unit does 2 size**2 operations in one."""
    return self.flops / (self.mxus * 2 * self.mxu_size**2)


# Rates from the pages of the Cloud TPU versions; a chip of v4, v5p and tpu7x
# is two cores. The compiler takes those of v5p as one device and gives each
# half of a kernel's grid, while both move bytes; of the others it takes one.
CHIPS = {
  'v4': Chip('v4:2x2x1', 137.5e12, 614e9, 4, 128),
  'v5e': Chip('v5e:2x2', 197e12, 819e9, 4, 128),
  'v5p': Chip('v5p:2x2x1', 229.5e12, 2765e9, 4, 128),
  'v6e': Chip('v6e:2x2', 918e12, 1640e9, 4, 256),
  'tpu7x': Chip('tpu7x:2x2x1', 1153.5e12, 3690e9, 4, 256),
}

_BUNDLE = re.compile(r'\s*0x([0-9a-f]+)\s+(LB)?')
_START = re.compile(r'Start(?:/End)?(?: empty)? region (\d+)')
_TEST = re.compile(
  r'(%p\w+) = scmp\.ge\.s32\.totalorder (?:\(\S+\), )?\S+, (\d+) '
  r'/\* loop exit test \*/'
)
_BRANCH = re.compile(r'sbr\.rel \(!(%p\w+)\) target = \$region(\d+)')


def prepare() -> str:
  """Makes the compiler for TPUs write its schedules down.

  To be called before it is first used in the process.

  Returns:
    The folder that they come to.
  """
  folder = tempfile.mkdtemp(prefix='schedules-')
  os.environ |= {
    'TPU_SKIP_MDS_QUERY': '1',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # It only compiles here.
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
    'LIBTPU_INIT_ARGS': (
      f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true'
    ),
  }
  jax.config.update('jax_platforms', 'cpu')
  return folder


def count_bundles(text: str) -> int:
  """Bundles that run in a kernel's whole grid.

  Args:
    text: the compiler's ``final_bundles`` of one kernel.

  Returns:
    The count. The outermost loop is the grid's, which makes two rounds more
    than it has steps: one to start the first transfers and one to end the last.
  """
  starts, trips, loops, places = {}, {}, [], []
  for line in text.splitlines():
    match = _BUNDLE.match(line)
    if match is None:
      continue
    place = int(match[1], 16)
    places.append(place)
    if match[2]:
      starts |= dict.fromkeys(_START.findall(line), place)
    trips |= {test: int(count) for test, count in _TEST.findall(line)}
    for test, region in _BRANCH.findall(line):
      if region in starts:  # Backwards, to where a loop begins.
        loops.append((starts[region], place, trips[test]))
  if loops:
    start, end, steps = max(loops, key=lambda loop: loop[1] - loop[0])
    loops.remove((start, end, steps))
    loops.append((start, end, steps - 2))
  return sum(
    math.prod(times for start, end, times in loops if start <= place <= end)
    for place in places
  )


def device(chip: Chip) -> Any:
  """One core that is not there."""
  from jax.experimental import topologies

  return topologies.get_topology_desc(
    platform='tpu', topology_name=chip.topology
  ).devices[0]


def compile_for(
  chip: Chip, function: Callable[..., Any], *arrays: jax.ShapeDtypeStruct
) -> Any:
  """Compiles a function for one core that is not there."""
  # In a manual region kernels are told which chip they are for.
  mesh = jax.sharding.Mesh([device(chip)], ('chip',))
  everywhere = jax.sharding.PartitionSpec()
  place = jax.sharding.NamedSharding(mesh, everywhere)
  arrays = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arrays
  )
  manual = jax.shard_map(
    function,
    mesh=mesh,
    in_specs=everywhere,
    out_specs=everywhere,
    check_vma=False,  # It is only compiled: nothing is sent, or runs.
  )
  return jax.jit(manual).lower(*arrays).compile()


def bundles(
  folder: str,
  chip: Chip,
  function: Callable[..., Any],
  *arrays: jax.ShapeDtypeStruct,
) -> int:
  """Bundles of the one kernel in a function.

  Args:
    folder: what :func:`prepare` returned.
    chip: what to compile for.
    function: calls the kernel.
    *arrays: shapes and dtypes of what it takes.

  Returns:
    How many run.
  """
  before = set(pathlib.Path(folder).iterdir())
  text = compile_for(chip, function, *arrays).as_text()
  names = re.findall(
    r'%([\w.]+) = [^=]* custom-call\([^=]*custom_call_target="tpu_custom_call"',
    text,
  )
  if len(names) != 1:
    raise ValueError(f'function must have one kernel, it has {names}.')
  written = set(pathlib.Path(folder).iterdir()) - before
  (path,) = (
    path
    for path in written
    if f'-{names[0]}-' in path.name
    and path.name.endswith('-final_bundles.txt')
    and 'schedule-analysis' not in path.name
  )
  return count_bundles(path.read_text())
