"""Ten ways in which one process differs; each must be an error on all."""

import errno
import json
import os
import socket
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import worlds
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxdist as jd
from jaxdist.checkpoint import layout
from jaxdist.hosts.world import LAUNCHED

out = Path(sys.argv[1])
worlds.get_ready(out)
world = jd.initialize(timeout=60.0)
is_odd = world.process == world.processes - 1
devices = np.array(jax.devices())
errors = {}


def mesh_of(devices):
  return Mesh(devices, ('data',), axis_types=(AxisType.Auto,))


def put(x, mesh, spec):
  return jax.make_array_from_callback(
    x.shape, NamedSharding(mesh, spec), x.__getitem__
  )


def began():
  global start
  start = time.monotonic()


def attempt(name, run):
  began()
  try:
    run()
    errors[name] = 'delivered', '', 0
  except Exception as error:
    kind = type(error).__name__
    errors[name] = kind, str(error), time.monotonic() - start


# What a worker exchanges, usually and on the odd process.
usual = lambda x: lax.psum(x[:8], 'data').sum() + lax.psum(x[8:], 'data').max()
odd = {
  'order': lambda x: (
    lax.psum(x[8:], 'data').max() + lax.psum(x[:8], 'data').sum()
  ),
  'dtype': usual,
  'op': lambda x: lax.psum(x[:8], 'data').sum() + lax.pmax(x[8:], 'data').max(),
  'length': lambda x: (
    lax.psum(x[:7], 'data').sum() + lax.psum(x[7:], 'data').max()
  ),
  'kind': lambda x: (
    lax.psum(x[:8], 'data').sum() + lax.all_gather(x[8:], 'data').max()
  ),
  'extra': lambda x: usual(x) + lax.psum(x[0], 'data'),
}


def exchange(name):
  mesh = mesh_of(devices)
  worker = odd[name] if is_odd else usual
  dtype = np.int32 if is_odd and name == 'dtype' else np.float32
  x = put(np.ones(16 * len(devices), dtype), mesh, PartitionSpec('data'))
  step = jax.jit(
    jax.shard_map(
      lambda x: worker(x)[None],
      mesh=mesh,
      in_specs=PartitionSpec('data'),
      out_specs=PartitionSpec('data'),
      check_vma=False,
    )
  )
  jd.assert_same_program(step, x)
  jax.block_until_ready(step(x))


def train(rate=0.1, names=('a', 'b'), mesh=None, first=0, code=None):
  mesh = mesh or mesh_of(devices)
  params = {name: np.ones(32, np.float32) for name in names}
  loss = lambda p, x: sum(jnp.mean(p[name] * x) for name in names)
  tx = optax.chain(
    jd.error_feedback(jd.mean('data', code or jd.sign(block_size=128))),
    optax.sgd(rate),
  )
  state = jd.init(tx, params, mesh=mesh, axis='data')
  step = jd.train_step(loss, tx, mesh=mesh, axis='data')
  count = put(np.asarray(first, np.int32), mesh, PartitionSpec())
  batch = put(np.ones(len(devices), np.float32), mesh, PartitionSpec('data'))
  began()  # What came before has to be compiled.
  state, _ = step(state._replace(step=count), batch)
  jax.block_until_ready(state)
  return state, step, batch


for name in odd:
  attempt(name, lambda name=name: exchange(name))
for name, options in {
  'step': {'first': 1},
  'mesh': {'mesh': mesh_of(devices[::-1])},
  'config': {'rate': 0.2},
  'code': {'code': jd.quantize(bits=8, block_size=128)},
  'treedef': {'names': ('a', 'c')},
}.items():
  options = options if is_odd else {}
  attempt(name, lambda options=options: train(**options))

# The same world still works, and is right.
state, step, batch = train()
if world.process == 0:  # Which may ask for a table alone.
  assert jd.traffic(step, state, batch).bytes_a_step > 0
right = [float(x[0]) for x in jax.tree.leaves(jax.device_get(state.params))]
began()
for _ in range(20):
  jd.assert_same('a fact', {'number': 1})
seconds = (time.monotonic() - start) / 20

# Process 0 listens at the address that it was given, and at no other.
port = int(os.environ[LAUNCHED].split()[0].rpartition(':')[2])
heard = {}
for host in ('127.0.0.1', '127.0.0.2'):
  with socket.socket() as other:
    heard[host] = other.connect_ex((host, port)) == 0

# One cannot list checkpoints, and all hear of it.
if world.process == 0:

  def refuse(directory):
    raise PermissionError(errno.EACCES, 'Permission denied')

  layout.checkpoints = refuse
attempt('restore', lambda: jd.restore(out, np.zeros(3)))
attempt('save', lambda: jd.save(out, 1, np.zeros(3)))

# One comes too late for a fact, and hears of it all the same.
jd.hosts.agreement.timeout = 1.0
if is_odd:
  time.sleep(1.5)
attempt('missing', lambda: jd.assert_same('a late fact', {'number': 1}))
jd.hosts.agreement.timeout = 60.0
result = {'heard': heard, 'errors': errors, 'right': right, 'seconds': seconds}
(out / f'{world.process}.json').write_text(json.dumps(result))
