"""Comparing methods: what is run, kept and reported. Nothing is trained."""

import json
import math
import re
import sys
from types import SimpleNamespace

import compare
import compared
import compared_plots
import lm
import numpy as np
import outer
import pytest
import record

import jaxdist as jd
from jaxdist.accounting.schedule import Schedule

TINY = ('--steps', 4, '--every-eval', 2, '--workers', 2, '--width', 32)
# What a method's worker sends each step, and in every fourth.
SENT = {'dense': (1000.0, 0.0), 'diloco': (0.0, 80.0), 'co2': (0.0, 400.0)}


def traffic(name):
  def row(sent, times, schedule):
    about = ('float32', (3,), 12, sent, 'data', 'inside a host', 2, times, '')
    return jd.Collective('all-reduce', *about, schedule=schedule)

  always, rarely = SENT[name]
  return jd.Traffic(
    (row(always, 1.0, 'main'), row(rarely, 0.25, 'branch')),
    work=jd.Traffic(()).work._replace(seconds=1e-3),
    schedules=tuple(
      Schedule(each, 'program', 1e-3, ()) for each in ('main', 'branch')
    ),
  )


def run(name, seed, steps=4):
  """As if lm.train had trained it."""
  lines = [
    {'step': i + 1, 'loss': 3.0, 'step_seconds': 0.1, 'skipped': 0}
    for i in range(steps)
  ]
  for i in range(1, steps, 2):
    lines[i]['val_loss'] = 4.0 - i / 4 + 0.1 * list(SENT).index(name) + seed
  if name == 'co2' and seed:
    lines[-1]['val_loss'] = math.nan  # It diverged.
  return record.Run(name, lines, traffic(name))


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
  """Runs compare.py in this process; tells what it trained and said."""
  trained = []
  interrupt = SimpleNamespace(asked=False)

  def train(config, name, data, watch):
    trained.append((name, config.seed))
    whole = run(name, config.seed)
    for i, line in enumerate(whole.lines):
      if watch(line):
        return record.Run(name, whole.lines[: i + 1], whole.traffic)
    return whole

  monkeypatch.setattr(lm, 'train', train)
  monkeypatch.setattr(compare, 'Interrupt', lambda *args: interrupt)
  monkeypatch.setattr(compare, 'prepare_devices', lambda workers: None)
  monkeypatch.setattr(compare.jax.config, 'update', lambda *args: None)
  text = tmp_path / 'text'
  text.write_text('some words ' * 400)

  def command(*arguments, asked=False, main=compare.main):
    trained.clear()
    interrupt.asked = asked
    monkeypatch.setattr(
      sys, 'argv', ['it', *map(str, ('--data', text, *TINY, *arguments))]
    )
    code = None
    try:
      main()
    except SystemExit as stopped:
      code = stopped.code
    said = capsys.readouterr()
    return list(trained), code, said.out + said.err

  return command


def test_runs_are_made_once_and_more_can_be_asked_for(command, tmp_path):
  where = ('--out', tmp_path / 'out', '--methods')
  trained, code, _ = command(*where, 'dense', 'diloco', '--seeds', 1)
  assert code is None
  assert trained == [('dense', 0), ('diloco', 0)]
  trained, _, said = command(*where, 'dense', 'diloco', 'co2', '--seeds', 2)
  assert trained == [
    ('co2', 0), ('dense', 1), ('diloco', 1), ('co2', 1)
  ]  # fmt: skip
  assert 'diloco' in said and '2 seeds, 4 steps' in said
  numbers = json.loads((tmp_path / 'out/results.json').read_text())['methods']
  assert numbers['diloco']['losses'] == [[3.85, 3.35], [4.85, 4.35]]
  assert numbers['co2']['losses'][1] == [4.95, None]
  assert 'NaN' not in (tmp_path / 'out/runs/co2.1.json').read_text()
  assert numbers['diloco']['bytes_a_step'] == 20
  assert numbers['diloco']['peak_bytes'] == 80
  # 1000 bytes at 100 Mbit/s beside a millisecond of compute at half rate.
  seconds = numbers['dense']['step_seconds_by_mbits']
  assert seconds['100.0'] == pytest.approx(2e-3 + 8e-5)
  page = (tmp_path / 'out/report.html').read_text()
  assert page.count('<svg') == 6
  assert 'Within 3% of that loss diloco sends least: 20 B, 50x fewer' in page
  assert not re.search(r'https?:|<script|<link|@import', page)


def test_stopped_run_is_made_again(command, tmp_path):
  where = ('--out', tmp_path / 'out', '--methods', 'dense', '--seeds', 1)
  trained, code, said = command(*where, asked=True)
  assert (trained, code) == ([], 130) and 'To go on' in said
  assert not list((tmp_path / 'out/runs').iterdir())
  trained, code, _ = command(*where)
  assert (trained, code) == ([('dense', 0)], None)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--methods', 'dens'], 'Did you mean dense?'),
    (['--methods', 'dense', 'dense'], 'must name some, each once'),
    (['--seeds', 0], '--seeds must be at least 1, got 0.'),
    (['--mbits', 0], '--mbits must be positive, got [0.0].'),
    (['--steps', 0], '--steps must be at least 1, got 0.'),
  ],
)
def test_bad_input_is_refused(arguments, message, command, tmp_path):
  trained, code, _ = command('--out', tmp_path / 'out', *arguments)
  assert message in code and not trained


def test_other_settings_are_not_mixed(command, tmp_path):
  where = ('--out', tmp_path / 'out', '--methods', 'dense', '--seeds', 1)
  command(*where)
  _, code, _ = command(*where, '--batch', 3)
  assert 'got another batch: 4 before, 3 now' in code


def test_claims_are_judged_by_loss_bytes_and_peak():
  def one(name, losses):
    sends = traffic(name)
    sent = np.array([4 * sends.bytes_a_step])
    losses = np.array(losses)[:, None]
    return compared.Compared(name, np.array([4]), losses, sends, sent, {}, 0)

  diloco, dense = one('diloco', [1.0, 2.0]), one('dense', [1.0, 1.98])
  claim = outer.Claim('words', 'diloco', 'dense', 1.02, fewer=50, peak=12)
  found = outer.judge(claim, diloco, dense)
  assert found['above, %'] == '+0.51 ± 0.51'
  assert (found['fewer bytes'], found['fewer at the peak']) == (50, 12.5)
  assert found['holds'] is True
  for other, holds in (
    ({'factor': 1.01}, None),  # Within two standard errors.
    ({'factor': 0.99}, False),
    ({'fewer': 51}, False),
    ({'peak': 13}, False),
  ):
    fields = {**vars(claim), **other}
    assert outer.judge(outer.Claim(**fields), diloco, dense)['holds'] is holds
  assert compared_plots.front([dense, diloco]) == [dense, diloco]
  assert compared_plots.front([one('dense', [1.1, 2.0]), diloco]) == [diloco]
