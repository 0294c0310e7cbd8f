"""Slow links: real ones between two hosts, and the arithmetic of the report."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import crew
import jax
import links
import links_found
import links_goals
import lm
import methods
import netns
import numpy as np
import optax
import pytest
from flax import nnx
from links_found import Found, Measured
from model import Transformer, next_byte_loss

import jaxdist as jd
from jaxdist.accounting.schedule import Schedule

ROOT = Path(__file__).parents[2]
LIMIT = 240
TINY = (
  *('--rates', '100mbit', '--rounds', '1', '--methods', 'dense', '--no-torch'),
  *('--steps', '6', '--every-eval', '2', '--batch', '1', '--length', '16'),
  *('--layers', '1', '--width', '32', '--heads', '2', '--exchange-mb', '0.2'),
)


def test_a_rate_is_bits_a_second():
  rates = ('10mbit', '1.5gbit', '64kbit')
  assert [*map(netns.bits_per_second, rates)] == [1e7, 1.5e9, 64e3]
  for bad in ('10', '10mb', '0mbit', '-1gbit', 'infgbit', '1 gbit'):
    with pytest.raises(ValueError, match=r'--rates must be like 100mbit'):
      netns.bits_per_second(bad)


@pytest.mark.parametrize(
  'broken, said',
  [
    (('netns.sys.platform', 'darwin'), 'need Linux, this is darwin'),
    (('netns.os.geteuid', lambda: 1000), 'made by root only'),
    (('netns.shutil.which', lambda tool: None), 'ip and tc must be installed'),
  ],
)
def test_without_what_it_needs_nothing_is_made(
  broken, said, monkeypatch, tmp_path
):
  if sys.platform == 'linux':
    monkeypatch.setattr('netns.os.geteuid', lambda: 0)
    monkeypatch.setattr('netns.shutil.which', lambda tool: tool)
  monkeypatch.setattr(*broken)
  monkeypatch.setattr('netns.subprocess.run', pytest.fail)
  out = tmp_path / 'out'
  monkeypatch.setattr(sys, 'argv', ['links.py', '--out', str(out)])
  with pytest.raises(SystemExit, match=said):
    links.main()
  assert not out.exists()


@pytest.mark.parametrize(
  'changed, said',
  [
    ({'hosts': 5}, '--hosts must be from 2 to 4, got 5'),
    ({'rounds': 0}, '--rounds must be at least 1, got 0'),
    ({'rates': ()}, '--rates must name some, each once'),
    ({'rates': ('1gbit', '1000mbit')}, '--rates must name some, each once'),
    ({'methods': ('dense', 'dense')}, '--methods must name some, each once'),
    ({'methods': ('dens',)}, 'Did you mean dense'),
    ({'exchange_mb': 0.0}, '--exchange-mb must be positive, got 0'),
    ({'width': 60}, '--width must be an even multiple of --heads'),
  ],
)
def test_settings_that_cannot_work_are_refused(changed, said, monkeypatch):
  monkeypatch.setattr(netns, 'check', lambda: None)
  with pytest.raises(ValueError, match=said):
    links.check(links.Config(**changed))


def test_hosts_divide_the_cores():
  cores = [0, 1, 2, 3, 6]
  assert [crew.own_cores(cores, i, 2) for i in (0, 1)] == [[0, 1], [2, 3]]
  assert [crew.own_cores([4, 5], i, 4) for i in range(4)] == [[4], [5]] * 2


def found(name, step_seconds, losses, rate='100mbit', sent=1514.0):
  """Two rounds of two stretches of ten steps; each step fills packets."""
  per_step = np.array([[1.0, 1.0], [2.0, 2.0]]) * step_seconds
  stretches = np.full((2, 2), 10 * sent)
  row = jd.Collective(
    *('all-reduce', 'uint32', (362,), 1448, 1448.0, 'data'),
    *('between hosts', 2, 1.0, ''),
    schedule='main',
  )
  traffic = jd.Traffic(
    (row,), schedules=(Schedule('main', 'program', 0.0, ()),)
  )
  return Found(
    rate,
    name,
    np.array([10, 20]),
    10 * per_step,
    stretches,
    stretches / 1514,
    np.array([losses, losses]),
    None if name in links_found.PEERS else traffic,
  )


def test_time_to_a_loss_is_on_a_line_between_validations():
  clock, losses = np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.5, 1.5])
  assert links_found.time_to(2.0, clock, losses) == 2.5
  # It begins with all bytes alike.
  half = (math.log(256) + 3) / 2
  assert links_found.time_to(half, clock, losses) == pytest.approx(0.5)
  assert links_found.time_to(6.0, clock, losses) == 0
  assert links_found.time_to(1.0, clock, losses) == math.inf


def test_figures_of_a_comparison():
  limit = found('no exchange', 0.01, [3.0, 2.0])
  own = found('dense', 0.015, [3.0, 2.0])
  ddp = found('torch DDP', 0.06, [3.0, 2.0])
  assert own.over(limit) == pytest.approx(1.5)
  assert own.agreement == pytest.approx(1.0)  # Of 1514 bytes 66 are headers.
  assert own.busy == pytest.approx(1514 * 8 / 1e8 / 0.0225, rel=0.2)
  assert links_found.sooner(own, ddp) == pytest.approx(4)
  # The other's last loss is worse, and is what both reach.
  worse = found('torch DDP', 0.06, [3.0, 2.5])
  assert links_found.sooner(own, worse) == pytest.approx(1.2 / 0.225)
  nan = found('torch PowerSGD', 0.06, [3.0, math.nan])
  assert links_found.sooner(own, nan) is None

  params = {'w': jax.ShapeDtypeStruct((384,), np.float32)}
  link = jd.Link(12.5e6 * links_found.CARRIED, 1e-4)
  measured = Measured(2, params, [limit, own, ddp, nan], [], {'100mbit': link})
  # 384 numbers, in two rounds.
  step = 0.015 + 2e-4 + 1536 / link.bytes_per_second
  assert measured.predictions(own)[0] == pytest.approx(step)
  assert measured.predictions(limit) == (None, None)
  verdicts = {row[0]: row[2:] for row in links_goals.goals(measured)}
  assert verdicts['step over the limit, 100mbit'] == ('1.5 (dense)', False)
  assert verdicts['sooner than torch DDP, 100mbit'] == (
    '4 (dense); without exchange 6',
    False,
  )
  assert 'sooner than torch PowerSGD, 100mbit' not in verdicts
  assert verdicts['interface and jd.traffic'][1]


def test_the_peer_learns_the_same():
  torch = pytest.importorskip('torch')
  peer = pytest.importorskip('peer')
  config = lm.Config(steps=20, layers=1, width=16, heads=2)
  graphdef, params = nnx.split(Transformer(1, 16, 2, nnx.Rngs(0)), nnx.Param)
  flat = nnx.to_flat_state(params)
  names = ['.'.join(map(str, path)) for path, _ in flat]
  leaves = map(np.asarray, jax.tree.leaves(flat))
  other = peer.Transformer(dict(zip(names, leaves, strict=True)), 1, 2)
  optimizer = peer.Muon(other.parameters())
  peak = methods.find('dense').learning_rate
  tx = methods.muon(lm.schedule(config, peak))

  @jax.jit
  def step(params, state, rows):
    loss = lambda p: next_byte_loss(nnx.merge(graphdef, p), rows)
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  state = tx.init(params)
  rng = np.random.default_rng(0)
  losses, others = [], []
  for index in range(12):
    rows = rng.integers(97, 105, (2, 33)).astype(np.uint8)
    params, state, loss = step(params, state, rows)
    other.zero_grad()
    other_loss = other(torch.from_numpy(rows))
    other_loss.backward()
    optimizer.step(peer.rate_at(index, config.steps, peak))
    losses.append(float(loss))
    others.append(other_loss.item())
  assert losses[-1] < losses[0] - 0.5
  np.testing.assert_allclose(others, losses, rtol=1e-4)


@pytest.fixture
def hosts_possible():
  try:
    netns.check()
    with netns.Hosts(2):
      pass
  except (ValueError, OSError) as error:
    pytest.skip(str(error))


def start(out):
  environment = {
    **os.environ,
    'PYTHONPATH': str(ROOT),
    'COLUMNS': '200',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
  }
  return subprocess.Popen(
    [sys.executable, ROOT / 'recipes/links.py', *TINY, '--out', out],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    env=environment,
  )


def namespaces_of(*makers):
  listed = subprocess.run(
    ['ip', 'netns', 'list'], capture_output=True, text=True, check=True
  )
  made = [f'jaxdist-links-{maker.pid}-' for maker in makers]
  return [x for x in listed.stdout.split() if x.startswith(tuple(made))]


def carried(out, run):
  """Bytes a step in the packets of host 0, by stretch of two steps."""
  path = out / f'runs/{run["rate"]}.0.{run["name"]}.json'
  host = json.loads(path.read_text())['hosts'][0]
  packets = netns.HEADER_BYTES * np.array(host['packets'])
  return (np.array(host['bytes']) - packets) / 2


def test_two_hosts_over_a_slow_link(hosts_possible, tmp_path):
  dead = subprocess.Popen(['true'])
  dead.wait()
  subprocess.run(
    ['ip', 'netns', 'add', f'jaxdist-links-{dead.pid}-0'], check=True
  )
  # Ctrl-C after the first measurement.
  stopped = start(tmp_path)
  first = tmp_path / 'runs/100mbit.link.json'
  end = time.monotonic() + LIMIT
  while not first.exists():
    assert stopped.poll() is None, stopped.stdout.read()
    assert time.monotonic() < end
    time.sleep(0.05)
  stopped.send_signal(signal.SIGINT)
  said, _ = stopped.communicate(timeout=LIMIT)
  assert stopped.returncode == 130 and 'To go on' in said, said
  assert namespaces_of(dead, stopped) == []

  before = first.stat().st_mtime_ns
  whole = start(tmp_path)
  said, _ = whole.communicate(timeout=LIMIT)
  assert whole.returncode == 0, said
  assert namespaces_of(whole) == []
  assert first.stat().st_mtime_ns == before
  numbers = json.loads((tmp_path / 'results.json').read_text())
  limit, dense = numbers['runs']
  assert (limit['name'], dense['name']) == ('no exchange', 'dense')
  # What the interface counted, against the program. On a busy machine TCP may
  # send a packet again, so that a stretch has more; none has less.
  silent, busy = carried(tmp_path, limit), carried(tmp_path, dense)
  assert min(busy) == pytest.approx(dense['traffic_a_step'], rel=0.05)
  assert np.mean(busy) == pytest.approx(dense['carried_a_step'])
  assert min(silent) < 0.02 * min(busy)
  assert np.isfinite(dense['losses']).all()
  # No faster than the link: 5% are rounds of timers.
  step = min(dense['step_seconds'])
  assert step > 0.95 * 8 * dense['traffic_a_step'] / 1e8
  assert 'Slow links, measured' in (tmp_path / 'report.html').read_text()
