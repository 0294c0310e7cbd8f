"""A Ray cluster of two machines, played by two raylets; one of them is lost."""

import os
import signal
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

pytest.importorskip('ray', reason='needs jaxdist[ray]')

import ray

from jaxdist import elastic

DEADLINE = 3.0
# Too large to travel with Ray's own messages: it has to be fetched.
START = np.zeros(500_000, np.float32)


def build(replica):
  def step(params, state, step):
    time.sleep(0.3)
    return jax.tree.map(lambda x: x + 1, params), state, np.float32(0)

  return elastic.Program(lambda params, step: None, step)


def with_children(pid):
  """A process and all that it has begun."""
  found = [pid]
  for task in Path(f'/proc/{pid}/task').iterdir():
    for child in (task / 'children').read_text().split():
      found += with_children(int(child))
  return found


@pytest.fixture
def far(monkeypatch):
  """The other machine's raylet; each has room for two replicas."""
  from ray.cluster_utils import Cluster

  monkeypatch.setenv('PYTHONPATH', os.pathsep.join(sys.path))
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    head = {'num_cpus': 2, 'include_dashboard': False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    node = cluster.add_node(num_cpus=2)
    ray.init(cluster.address, log_to_driver=False, logging_level='ERROR')
  (raylet,) = node.all_processes['raylet']
  yield raylet.process.pid
  ray.shutdown()
  cluster.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGSTOP, signal.SIGKILL])
def test_a_machine_is_lost(number, far):
  with elastic.Coordinator(
    build,
    START,
    replicas=4,
    outer=optax.sgd(1.0),
    every=1,
    deadline=DEADLINE,
    quorum=2,
    options={'num_cpus': 1},
  ) as outer:
    rounds = outer.rounds(10**6)
    reports = [next(rounds) for _ in range(3)]
    assert reports[-1].fresh == (0, 1, 2, 3)
    lost = with_children(far)
    there = [i for i, seat in enumerate(outer.seats) if seat.pid not in lost]
    assert len(there) == 2
    time.sleep(0.25)
    for pid in lost:
      os.kill(pid, number)
    try:
      reports += [next(rounds) for _ in range(20)]
    finally:
      for pid in lost:
        if number == signal.SIGSTOP:
          os.kill(pid, signal.SIGKILL)
  seconds = [report.seconds for report in reports]
  print('rounds of', ', '.join(f'{x:.2f}' for x in seconds), 's')
  assert max(seconds) < DEADLINE + 2
  for report in reports[4:]:
    assert set(there) <= set(report.fresh)
