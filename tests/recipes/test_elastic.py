"""Some seconds of chaos: the language model, and faults of all kinds."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import pytest

pytest.importorskip('ray', reason='needs jaxdist[ray]')

import chaos
import elastic
import elastic_report

SEED = 7
PATH = os.pathsep.join(sys.path)


def test_schedule_has_all_kinds():
  faults = chaos.schedule(SEED, 4, 1200, 20)
  assert 50 <= len(faults) <= 70
  assert {fault.kind for fault in faults} == set(chaos.KINDS)
  assert faults == chaos.schedule(SEED, 4, 1200, 20)
  assert faults != chaos.schedule(SEED + 1, 4, 1200, 20)
  several = [f for f in faults if f.kind == 'kill several']
  assert {len(fault.replicas) for fault in several} == {2, 3}


@pytest.mark.parametrize(
  'minutes, fault_every',
  [(0.2, 2.0), pytest.param(1.0, 5.0, marks=pytest.mark.slow)],
)
def test_chaos(minutes, fault_every, tmp_path):
  data, out = tmp_path / 'text', tmp_path / 'out'
  data.write_text('Some words, and again: the quick brown fox. ' * 2000)
  flags = {
    'replicas': 3,
    'chaos': SEED,
    'minutes': minutes,
    'fault-every': fault_every,
    'out': out,
    'data': data,
    'every': 5,
    'deadline': 6.0,
    'length': 32,
    'layers': 1,
    'width': 16,
    'heads': 2,
  }
  words = [f'--{name}={value}' for name, value in flags.items()]
  ended = subprocess.run(
    # Without the type checks of the tests, which cannot be pickled.
    [sys.executable, chaos.__file__.replace('chaos', 'elastic')]
    + [*words, '--no-compare'],
    env={
      **os.environ,
      'PYTHONPATH': PATH,
      'JAX_PLATFORMS': 'cpu',
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=300,
  )
  print(ended.stdout)
  assert ended.returncode == 0
  assert f'from seed {SEED}' in ended.stdout
  results = json.loads((out / 'runs.json').read_text())
  (run,) = results['runs']
  counts = run['counts']
  assert counts['given'] == sum(
    counts.get(name, 0)
    for name in ('fresh', 'late', 'stale', 'unsound', 'lost')
  )
  for line in run['lines']:
    assert line['round_seconds'] < flags['deadline'] + 3
  faults = run['faults']
  assert all(fault['done'] is not None for fault in faults)
  assert {'nan', 'garbage', 'slow', 'kill'} <= {f['kind'] for f in faults}
  assert len(results['findings']['costs']) == len(faults)
  # It learnt.
  losses = [line['val_loss'] for line in run['lines'] if 'val_loss' in line]
  assert losses[-1] < math.log(256) - 0.05
  assert 'What faults cost' in (out / 'report.html').read_text()
  config = elastic.Config(out=out)
  with pytest.raises(ValueError, match='--out must not hold results'):
    elastic.check(config)
  elastic.check(dataclasses.replace(config, overwrite=True))


def costs(kind, events, incarnation=1):
  fault = {'done': 10.0, 'kind': kind, 'lasts': 0.0, 'hit': [[0, incarnation]]}
  keys = ('seconds', 'kind', 'replica', 'incarnation', 'detail', 'lost')
  lines = [{'seconds': 12.0, 'round_seconds': 4.0}]
  events = [dict(zip(keys, event, strict=True)) for event in events]
  run = {'lines': lines, 'faults': [fault], 'events': events}
  return elastic_report.costs(run)[0]


def test_costs():
  killed = costs(
    'kill',
    [
      (5.0, 'late', 0, 1, 'of round 1', 0.0),
      (11.0, 'died', 0, 1, '', 0.25),
      (11.5, 'damaged', 1, 1, '', 0.0),
      (17.0, 'ready', 0, 2, '', 0.0),
    ],
  )
  assert killed['outcome'] == 'died and was replaced'
  assert killed['changes_lost'] == 1 and killed['residual_lost'] == 0.25
  assert killed['back_seconds'] == 7.0 and killed['round_seconds'] == 4.0
  late = costs('slow', [(13.0, 'late', 0, 1, 'of round 2', 0.0)])
  assert late['outcome'] == 'came late (of round 2) and counted less'
  assert late['changes_lost'] == 0 and late['back_seconds'] is None
  assert costs('stop', [])['outcome'] == 'nothing was lost'
