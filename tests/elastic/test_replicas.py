"""Elastic replicas as real processes: killed, stopped and woken."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pools
import pytest

import jaxdist as jd

pytest.importorskip('ray', reason='needs jaxdist[ray]')

from jaxdist import elastic

START = np.ones(5, np.float32)
DEADLINE = 3.0
# Changes of size one are added up in float32, and a sum may end near zero.
ROUNDED = {'rtol': 1e-5, 'atol': 1e-5}


def coordinator(seconds, slowed=None, **options):
  build = functools.partial(pools.telling, seconds=seconds, slowed=slowed)
  defaults = {'replicas': 4, 'outer': optax.sgd(1.0), 'every': 1}
  defaults |= {'deadline': DEADLINE, 'staleness': pools.STALENESS}
  options = defaults | options
  return elastic.Coordinator(build, START, **options)


def run_until(rounds, reports, done, most=60.0):
  """Rounds until something is so."""
  ends = time.monotonic() + most
  while not done():
    assert time.monotonic() < ends, reports[-1]
    reports.append(next(rounds))


def kinds(reports, replica):
  return [
    (event.kind, event.incarnation)
    for report in reports
    for event in report.events
    if event.replica == replica
  ]


def test_signals(cluster):
  with coordinator(0.2, quorum=2, max_staleness=4) as outer:
    rounds = outer.rounds(10**6)
    reports = [next(rounds)]
    assert reports[0].fresh == (0, 1, 2, 3)
    pids = [seat.pid for seat in outer.seats]
    # Two at once; one that is woken in time, one that is not.
    os.kill(pids[0], signal.SIGKILL)
    os.kill(pids[1], signal.SIGKILL)
    os.kill(pids[2], signal.SIGSTOP)
    os.kill(pids[3], signal.SIGSTOP)
    reports.append(next(rounds))
    os.kill(pids[2], signal.SIGCONT)
    seats = lambda: [(seat.incarnation, seat.pid > 0) for seat in outer.seats]
    run_until(rounds, reports, lambda: seats()[3][0] == 2)
    os.kill(pids[3], signal.SIGCONT)  # A zombie.
    everyone = lambda: reports[-1].fresh == (0, 1, 2, 3)
    run_until(rounds, reports, everyone)
    assert seats() == [(2, True), (2, True), (1, True), (2, True)]
    assert not set(pids[:2] + pids[3:]) & {seat.pid for seat in outer.seats}
    params = outer.params
  for replica in (0, 1):
    assert kinds(reports, replica) == [('ready', 1), ('died', 1), ('ready', 2)]
  assert kinds(reports, 2) == [('ready', 1), ('late', 1)]
  assert kinds(reports, 3)[:2] == [('ready', 1), ('fenced', 1)]
  assert all(report.seconds < DEADLINE + 3 for report in reports)
  # What is said to have counted did, once, and nothing else.
  np.testing.assert_allclose(params, START + pools.moved(reports), **ROUNDED)


@pytest.mark.slow
def test_a_replica_is_ten_times_slower(cluster):
  """What the others still get done, beside as many without it."""
  rates = {}
  for replicas, slowed in ((3, None), (4, 3)):
    with coordinator(
      0.5, slowed, replicas=replicas, quorum=3, max_staleness=12
    ) as outer:
      rounds = outer.rounds(31)
      reports = [next(rounds)]  # All have started, and been there once.
      began = time.monotonic()
      reports += rounds
      seconds = time.monotonic() - began
      params, counts = outer.params, outer.counts
    np.testing.assert_allclose(params, START + pools.moved(reports), **ROUNDED)
    fresh = sum(len(set(report.fresh) - {slowed}) for report in reports[1:])
    rates[replicas] = fresh / seconds
    late = [report.late for report in reports if report.late]
    waits = sorted(report.seconds for report in reports)
    print(f'{replicas}: {rates[replicas]:.2f} changes/s, {counts}, {late}')
    print('rounds of', ', '.join(f'{wait:.2f}' for wait in waits), 's')
  assert counts['late'] == len(late) >= 2  # Each of its changes, once.
  assert set().union(*late) == {3}
  assert rates[4] > 0.7 * rates[3]


DIES = """
import sys
from pathlib import Path

import test_replicas

directory = Path(sys.argv[1])
with test_replicas.coordinator(
  0.05, replicas=2, directory=directory, options={'num_cpus': 0}
) as outer:
  for report in outer.rounds(10**6):
    if report.round == 0:
      print(*(seat.pid for seat in outer.seats), flush=True)
    print(report.round, flush=True)
"""


def test_the_coordinator_is_killed(tmp_path):
  here = str(Path(__file__).parent)
  path = os.pathsep.join([here, *sys.path])
  process = subprocess.Popen(
    [sys.executable, '-c', DIES, tmp_path],
    env={**os.environ, 'PYTHONPATH': path, 'JAX_PLATFORMS': 'cpu'},
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    pids = list(map(int, process.stdout.readline().split()))
    last = [int(process.stdout.readline()) for _ in range(12)][-1]
  finally:
    process.kill()
    process.wait()
    process.stdout.close()
  committed = jd.latest_step(tmp_path)
  # Round r is saved as r + 1, and the one before has been committed.
  assert last <= committed
  for _ in range(100):
    if not any(map(alive, pids)):
      break
    time.sleep(0.1)
  assert not any(map(alive, pids)), 'replicas outlive their coordinator'
  with coordinator(0, replicas=2, directory=tmp_path, pool=pools.Here) as outer:
    assert outer.round == committed
    reports = list(outer.rounds(committed + 3))
    assert [r.round - committed for r in reports] == [0, 1, 2]
  want = START + np.sum(
    [
      (pools.change(0, round) + pools.change(1, round)) / 2
      for round in range(committed + 3)
    ],
    axis=0,
  )
  np.testing.assert_allclose(outer.params, want, rtol=1e-5)


WITHOUT_RAY = """
import sys

sys.modules['ray'] = None  # As if it were not installed.
import jaxdist

try:
  import jaxdist.elastic
except ImportError as error:
  print(error)
"""


def test_without_ray():
  said = subprocess.run(
    [sys.executable, '-c', WITHOUT_RAY],
    env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)},
    capture_output=True,
    text=True,
    check=True,
  ).stdout
  assert said == "jaxdist.elastic needs Ray: pip install 'jaxdist[ray]'.\n"


def alive(pid):
  try:
    return 'Z' not in Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2]
  except OSError:
    return False


def test_many_devices_inside():
  """Parameters may be cut over the devices of a replica."""
  mesh = jax.make_mesh((8,), ('fsdp',))
  cut = jax.NamedSharding(mesh, jax.P('fsdp'))
  params = np.arange(1024, dtype=np.float32)

  def build(replica):
    step = jax.jit(lambda x: x - 0.1 * (x - replica), out_shardings=cut)
    return elastic.Program(
      lambda params, step: None,
      lambda params, state, number: (step(params), state, np.float32(0)),
    )

  with elastic.Coordinator(
    build,
    params,
    replicas=2,
    outer=optax.sgd(1.0),
    every=2,
    deadline=30.0,
    compressor=jd.top_k(0.5),
    pool=pools.Here,
  ) as outer:
    list(outer.rounds(1))
    assert all(seat.owed > 0 for seat in outer.seats)
  moved = outer.params != params
  assert 512 <= np.sum(moved) <= 1023
  want = params - 0.19 * (params - 0.5)
  np.testing.assert_allclose(outer.params[-400:], want[-400:], rtol=1e-5)
