"""Counts and saves each count, with the number of the world that counted."""

import os
import sys
import time
from pathlib import Path

import jax
import numpy as np
import worlds
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxdist as jd

out, folder = map(Path, sys.argv[1:3])
name, steps = map(int, sys.argv[3:5])
holds = sys.argv[5]
rename = os.rename


def held(source, target):
  """Stands still before the second checkpoint gets its name."""
  is_tmp, is_here = '-tmp' in str(source), Path(target).parent == folder
  is_moment = is_tmp if holds == 'written' else not is_tmp and is_here
  if (out / '0.1').exists() and is_moment:
    (out / '0.held').touch()
    while not (out / 'released').exists():
      time.sleep(0.001)
  rename(source, target)


worlds.get_ready(out)
world = jd.initialize()
mesh = jax.make_mesh((world.processes,), ('w',), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, PartitionSpec('w'))
rows = np.zeros((world.processes, 2000), np.float32)
rows = jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__)


@jax.jit
def count(rows):
  """One more everywhere, by an exchange; a row begins with the world."""
  rows = rows + jax.numpy.ones_like(rows).mean(axis=0)
  return jax.lax.with_sharding_constraint(rows.at[:, 0].set(name), sharding)


if holds != 'nowhere' and world.process == 0:
  os.rename = held
saver = jd.Saver(folder, keep=1000)
first = jd.latest_step(folder) or 0
(out / f'{world.process}.first').write_text(str(first))
if first:
  rows = jd.restore(folder, rows)
for step in range(first + 1, first + steps + 1):
  rows = count(rows)
  jax.block_until_ready(rows)
  (out / f'{world.process}.counted').touch()
  saver.save(step, rows, metadata={'world': name})
  saver.wait()
  (out / f'{world.process}.{step}').touch()
  (out / f'{world.process}.saved').touch()
