"""The same numbers over two processes as in one."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

# Some devices, in one process or divided among two.
PROGRAM = """
import json, sys
import jax
jax.config.update('jax_platforms', 'cpu')
name, devices, rank, processes, port = (
  sys.argv[1], *map(int, sys.argv[2:])
)
jax.config.update('jax_num_cpu_devices', devices // processes)
if processes > 1:
  address = f'127.0.0.1:{port}'
  jax.distributed.initialize(
    address, processes, rank, coordinator_bind_address=address,
    cluster_detection_method='deactivate', initialization_timeout=60,
  )
import jax.numpy as jnp, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import jaxdist as jd

code = jd.top_k(0.1, block_size=128)
tx = {
  'feedback': optax.chain(
    jd.error_feedback(jd.mean('data', code, 'two_shot')), optax.adam(0.01)
  ),
  'local': jd.local_sgd(
    optax.adam(0.01), jd.mean('data', jd.sign(block_size=128)), every=2
  ),
}[name]
mesh = jax.make_mesh((devices,), ('data',), axis_types=(AxisType.Auto,))
params = {'w': np.linspace(-1, 1, 600, dtype=np.float32).reshape(30, 20)}
state = jd.init(tx, params, mesh=mesh, axis='data')
step = jd.train_step(
  lambda p, x: jnp.mean((x @ p['w']) ** 2), tx, mesh=mesh, axis='data'
)
sharding = NamedSharding(mesh, PartitionSpec('data'))
rng = np.random.default_rng(0)
for _ in range(4):
  x = rng.normal(size=(8, 30)).astype(np.float32)
  batch = jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])
  state, metrics = step(state, batch)
  jax.block_until_ready(state)
jd.assert_in_sync(state)
mean = jd.mean_params(state)['w'].addressable_shards[0].data
print('RESULT', json.dumps(np.asarray(mean).tolist()))
if processes > 1:
  jax.distributed.shutdown()
"""


def run(name, devices, processes):
  """What each process ends with."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  members = [
    subprocess.Popen(
      [
        *(sys.executable, '-c', PROGRAM, name),
        *map(str, (devices, rank, processes, port)),
      ],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      cwd=Path(__file__).parents[1],
    )
    for rank in range(processes)
  ]
  results = []
  try:
    for member in members:
      out, err = member.communicate(timeout=240)
      assert member.returncode == 0, err[-3000:]
      (line,) = (x for x in out.splitlines() if x.startswith('RESULT'))
      results.append(json.loads(line.removeprefix('RESULT')))
  finally:
    for member in members:
      member.kill()
  return results


# Two devices exchange in another way if they are of two processes.
@pytest.mark.parametrize(
  ('name', 'devices'), [('feedback', 4), ('local', 4), ('feedback', 2)]
)
def test_two_processes_are_one(name, devices):
  (alone,) = run(name, devices, 1)
  first, second = run(name, devices, 2)
  assert first == second
  flat = lambda rows: [x for row in rows for x in row]
  # Adam blows the last bit of a gradient up; sums run in another order.
  assert flat(first) == pytest.approx(flat(alone), rel=2e-5, abs=1e-5)
