"""Exchanges without end, until something happens to one of the processes."""

import sys
import time
from pathlib import Path

import jax
import numpy as np
import worlds
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxdist as jd

out, kind, victim = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
worlds.get_ready(out)
world = jd.initialize()
mesh = jax.make_mesh((world.processes,), ('w',), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, PartitionSpec('w'))
ones = np.ones(world.processes, np.float32)
x = jax.make_array_from_callback(ones.shape, sharding, ones.__getitem__)
total = jax.jit(
  jax.shard_map(
    lambda x: jax.lax.psum(x[0], 'w'),
    mesh=mesh,
    in_specs=PartitionSpec('w'),
    out_specs=PartitionSpec(),
  )
)
assert float(total(x)) == world.processes
(out / f'{world.process}.running').touch()
while True:
  if world.process == victim and (out / 'now').exists():
    if kind == 'raise':
      raise KeyError('a bug')
    if kind == 'leave':
      break
    if kind == 'hang':
      time.sleep(1000)
    if kind == 'late':  # For what the others compare.
      time.sleep(1000)
  if kind == 'late':
    jd.assert_same('a fact', {'number': 1})
    time.sleep(0.01)
  else:
    assert float(total(x)) == world.processes
