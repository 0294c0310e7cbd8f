"""Trains on four devices, of one process or, as a script, of two."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxdist as jd

DEVICES = 4
SPECS = {'w': P(None, 'fsdp')}


def feedback():
  code = jd.top_k(0.1, block_size=128)
  return optax.chain(
    jd.error_feedback(jd.mean('data', code, 'two_shot')), optax.adam(0.01)
  )


def local():
  code = jd.sign(block_size=128)
  return jd.local_sgd(optax.adam(0.01), jd.mean('data', code), every=2)


def plain():
  return optax.chain(jd.communicate(jd.mean('data')), optax.adam(0.01))


# How it is trained, workers, devices of each.
CASES = {
  'feedback': (feedback, 4, 1),
  'local': (local, 4, 1),
  # Two devices exchange in another way if they are of two processes.
  'feedback of two': (feedback, 2, 1),
  'cut by the partitioner': (plain, 2, 2),
}


def train(name, devices):
  """The mean parameters at the end, as this process has them.

  Args:
    name: of a case.
    devices: four, in the order of their processes.
  """
  make, workers, inside = CASES[name]
  devices = devices[:: DEVICES // (workers * inside)]
  mesh = Mesh(
    np.reshape(devices, (workers, inside)),
    ('data', 'fsdp'),
    axis_types=(AxisType.Auto,) * 2,
  )
  cut = {} if inside == 1 else {'specs': SPECS}
  arguments = {'mesh': mesh, 'axis': 'data', **cut}
  params = {'w': np.linspace(-1, 1, 600, dtype=np.float32).reshape(30, 20)}
  tx = make()
  state = jd.init(tx, params, **arguments)
  step = jd.train_step(
    lambda p, x: jnp.mean((x @ p['w']) ** 2),
    tx,
    batch_spec=P('fsdp'),
    **arguments,
  )
  sharding = NamedSharding(mesh, P(('data', 'fsdp')))
  rng = np.random.default_rng(0)
  for _ in range(4):
    x = rng.normal(size=(8, 30)).astype(np.float32)
    batch = jax.make_array_from_callback(x.shape, sharding, x.__getitem__)
    state, _ = step(state, batch)
    jax.block_until_ready(state)
  jd.assert_in_sync(state)
  mean = jd.mean_params(state)['w']
  whole = np.full(mean.shape, np.nan)
  for part in mean.addressable_shards:
    whole[part.index] = part.data
  return whole


def main(rank, port):
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', DEVICES // 2)
  address = f'127.0.0.1:{port}'
  jax.distributed.initialize(
    address,
    2,
    rank,
    coordinator_bind_address=address,
    cluster_detection_method='deactivate',
    initialization_timeout=60,
  )
  results = {name: train(name, jax.devices()).tolist() for name in CASES}
  print('RESULT', json.dumps(results))
  jax.distributed.shutdown()


if __name__ == '__main__':
  main(*map(int, sys.argv[1:]))
