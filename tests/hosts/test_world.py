"""Where a process learns who it is, and what it tells JAX."""

import os
import socket

import jax
import pytest
from jax._src.clusters import cloud_tpu_cluster

import jaxdist as jd
from jaxdist import compat
from jaxdist.hosts import agreement, roll_call, world

CLUSTERS = (
  *('SLURM_', 'OMPI_', 'PMI_', 'WORLD_SIZE', 'TPU_', 'MEGASCALE_'),
  *('KUBERNETES_', 'JAXDIST_', 'JAX_COORDINATOR_'),
)


@pytest.fixture
def joined(monkeypatch):
  """What JAX and the roll call are told, in place of joining anybody."""
  for name in list(os.environ):
    if name.startswith(CLUSTERS):
      monkeypatch.delenv(name)
  monkeypatch.setenv('XLA_FLAGS', '--of_the_user')
  monkeypatch.setattr(agreement, 'timeout', agreement.timeout)
  told = {}

  def call(address, bind_host, processes, process, seconds):
    told['call'] = address, bind_host, processes, process, seconds
    return '127.0.0.1'

  monkeypatch.setattr(roll_call, 'call', call)
  monkeypatch.setattr(roll_call, 'resolve', lambda host, port: '10.0.0.1')
  monkeypatch.setattr(
    jax.distributed, 'initialize', lambda **arguments: told.update(arguments)
  )
  monkeypatch.setattr(world.atexit, 'register', lambda function: None)
  return told


def set_environment(monkeypatch, **variables):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)


def test_alone_where_nothing_tells_of_others(joined):
  assert jd.initialize() == jd.World(0, 1, 0)
  assert not joined
  assert os.environ['XLA_FLAGS'] == '--of_the_user'


def test_unknown_launcher_is_no_reason_to_train_alone(joined, monkeypatch):
  set_environment(monkeypatch, PMI_SIZE='4', PMI_RANK='1')
  with pytest.raises(ValueError, match='PMI_SIZE tells of 4 processes, but'):
    jd.initialize()
  # Given what it does not tell, all is well.
  assert jd.initialize('node:80', 4, 1) == jd.World(1, 4, 0)


def test_one_timeout_bounds_all_waits(joined):
  assert jd.initialize('node:80', 4, 0, timeout=7.5) == jd.World(0, 4, 0)
  assert joined == {
    # Process 0 listens where it is told to be found, and nowhere else.
    'call': ('node:80', '10.0.0.1', 4, 0, 7.5),
    'coordinator_address': 'node:80',
    'coordinator_bind_address': '10.0.0.1:80',
    'num_processes': 4,
    'process_id': 0,
    'local_device_ids': None,
    'cluster_detection_method': 'deactivate',
    'initialization_timeout': 8,
    'shutdown_timeout_seconds': 8,
    'heartbeat_timeout_seconds': 15,
  }
  assert agreement.timeout == 7.5
  flag = '--xla_cpu_collective_timeout_seconds=8'
  assert os.environ['XLA_FLAGS'] == f'--of_the_user {flag}'


def test_bind_address_can_be_another(joined):
  jd.initialize('node:80', 4, 0, coordinator_bind_address='0.0.0.0:81')
  assert joined['call'] == ('node:80', '0.0.0.0', 4, 0, 30.0)
  assert joined['coordinator_bind_address'] == '0.0.0.0:81'


def test_launcher_tells(joined, monkeypatch):
  monkeypatch.setattr(world, '_end_with_launcher', lambda: None)
  set_environment(
    monkeypatch,
    JAXDIST_LAUNCHED='127.0.0.1:81 3 2 1',
    JAXDIST_TIMEOUT='4',
  )
  assert jd.initialize() == jd.World(2, 3, 1)
  assert joined['call'][0] == '127.0.0.1:81'
  assert joined['heartbeat_timeout_seconds'] == 8
  monkeypatch.setenv('JAXDIST_LAUNCHED', '127.0.0.1:81 1 0 2')
  assert jd.initialize() == jd.World(0, 1, 2)
  # The launcher in a job that Slurm has begun anew: both count.
  monkeypatch.setenv('SLURM_RESTART_COUNT', '3')
  assert jd.initialize() == jd.World(0, 1, 5)


def test_slurm_tells(joined, monkeypatch):
  set_environment(
    monkeypatch,
    SLURM_JOB_ID='4096',
    SLURM_STEP_NODELIST='node[001-004]',
    SLURM_NTASKS='8',
    SLURM_PROCID='5',
    SLURM_LOCALID='1',
    SLURM_RESTART_COUNT='3',
  )
  assert jd.initialize() == jd.World(5, 8, 3)
  assert joined['coordinator_address'] == 'node001:61440'
  assert joined['local_device_ids'] == [1]


def test_open_mpi_tells(joined, monkeypatch):
  set_environment(
    monkeypatch,
    OMPI_MCA_orte_hnp_uri='1531576320.0;tcp://10.96.0.1,10.148.0.1:34911',
    OMPI_COMM_WORLD_SIZE='2',
    OMPI_COMM_WORLD_RANK='1',
    OMPI_COMM_WORLD_LOCAL_RANK='0',
  )
  assert jd.initialize() == jd.World(1, 2, 0)
  assert joined['coordinator_address'].startswith('10.96.0.1:')


def test_tpu_pod_tells(joined, monkeypatch):
  # Two slices of two hosts, as GKE describes them.
  monkeypatch.setattr(cloud_tpu_cluster, 'running_in_cloud_tpu_vm', True)
  monkeypatch.setattr(socket, 'gethostbyname', lambda host: '10.0.0.1')
  set_environment(
    monkeypatch,
    TPU_WORKER_HOSTNAMES='job-1-0,job-1-1',
    TPU_WORKER_ID='1',
    TPU_SKIP_MDS_QUERY='1',
    MEGASCALE_COORDINATOR_ADDRESS='job-0-0:8080',
    MEGASCALE_NUM_SLICES='2',
    MEGASCALE_SLICE_ID='1',
  )
  assert jd.initialize() == jd.World(3, 4, 0)
  assert joined['coordinator_address'] == 'job-0-0:8482'


@pytest.mark.parametrize(
  'arguments, message',
  [
    ({'coordinator_address': 'node:80'}, 'num_processes must be given'),
    ({'num_processes': 2, 'process_id': 0}, 'coordinator_address must be'),
    (
      {'coordinator_address': 'a:1', 'num_processes': 2, 'process_id': 2},
      'process_id must be from 0 to num_processes - 1, got 2 and 2',
    ),
    (
      {'coordinator_address': 'node', 'num_processes': 2, 'process_id': 1},
      "an address must be HOST:PORT, got 'node'",
    ),
    ({'timeout': 0.5}, 'timeout must be at least 1 second, got 0.5'),
  ],
)
def test_arguments_that_cannot_work_are_refused(joined, arguments, message):
  with pytest.raises(ValueError, match=message):
    jd.initialize(**arguments)
  assert not joined


@pytest.mark.parametrize(
  'own, by_name, expected',
  [
    ('10.0.0.2', '127.0.1.1', ['10.0.0.2']),
    ('10.0.0.2', '10.0.0.3', []),
    ('10.0.0.2', '203.0.113.7', ['10.0.0.2']),
    ('127.0.0.1', '127.0.0.1', []),
  ],
)
def test_gloo_is_told_where_the_name_is_of_no_use(
  own, by_name, expected, joined, monkeypatch
):
  told = []
  monkeypatch.setattr(compat, 'set_gloo_host', told.append)
  monkeypatch.setattr(roll_call, 'resolve', lambda host, port: by_name)
  monkeypatch.setattr(roll_call, 'call', lambda *arguments: own)
  monkeypatch.setattr(roll_call, 'is_own', lambda host: host[:4] != '203.')
  jd.initialize('node:80', 2, 1)
  assert told == expected
