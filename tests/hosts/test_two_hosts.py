"""Two hosts on one machine: network namespaces with a cable between them."""

import os
import shutil
import subprocess
import sys

import pytest
import worlds

HOSTS = {'jaxdist-a': '10.99.7.1', 'jaxdist-b': '10.99.7.2'}
SCRIPT = """
import socket, sys
import jax, numpy as np
import jaxdist as jd
rank = int(sys.argv[1])
world = jd.initialize('10.99.7.1:9911', 2, rank, timeout=60.0)
heard = {}
for host in ('10.99.7.1', '127.0.0.1'):
  with socket.socket() as other:
    heard[host] = other.connect_ex((host, 9911)) == 0
mesh = jax.make_mesh((2,), ('w',), axis_types=(jax.sharding.AxisType.Auto,))
sharding = jax.NamedSharding(mesh, jax.sharding.PartitionSpec('w'))
x = jax.make_array_from_callback((2,), sharding, lambda i: np.ones(1))
print('RESULT', heard, float(jax.jit(lambda x: x.sum())(x)))
"""


def ip(*words):
  subprocess.run(['ip', *words], check=True)


@pytest.fixture
def hosts():
  """Their names resolve to what the machine's own does, mostly a loopback."""
  try:
    for name in HOSTS:
      ip('netns', 'add', name)
    a, b = HOSTS
    ip(*f'link add va netns {a} type veth peer name vb netns {b}'.split())
    for (name, address), link in zip(HOSTS.items(), ('va', 'vb'), strict=True):
      ip('-n', name, 'addr', 'add', f'{address}/24', 'dev', link)
      ip('-n', name, 'link', 'set', link, 'up')
      ip('-n', name, 'link', 'set', 'lo', 'up')
    yield
  finally:
    for name in HOSTS:
      subprocess.run(['ip', 'netns', 'del', name], check=False)


@pytest.mark.slow
@pytest.mark.skipif(
  sys.platform != 'linux' or os.getuid() != 0 or shutil.which('ip') is None,
  reason='makes network namespaces, as root on Linux with iproute2',
)
def test_hosts_find_each_other_whatever_their_names_resolve_to(hosts):
  members = [
    subprocess.Popen(
      ['ip', 'netns', 'exec', name, sys.executable, '-c', SCRIPT, str(rank)],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      env={
        **os.environ,
        'PYTHONPATH': str(worlds.ROOT),
        'JAX_PLATFORMS': 'cpu',
      },
    )
    for rank, name in enumerate(HOSTS)
  ]
  try:
    for rank, member in enumerate(members):
      said, _ = member.communicate(timeout=worlds.LIMIT)
      assert member.returncode == 0, said
      # It listens at its address, and not at all others.
      heard = {'10.99.7.1': True, '127.0.0.1': False}
      assert f'RESULT {heard} 2.0' in said, (rank, said)
  finally:
    for member in members:
      member.kill()
      member.wait()
