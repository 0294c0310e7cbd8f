"""A process that was given up wakes up beside those that took its place.

Where :mod:`jaxdist.launch` began anew it was killed before; elsewhere nobody
may have done so.
"""

import os
import random
import signal
import time

import numpy as np
import pytest
import worlds
from test_faults import BOUND, SAID, TIMEOUT

import jaxdist as jd


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(7))
@pytest.mark.parametrize(
  'victim, holds',
  [(0, 'nowhere'), (1, 'nowhere'), (0, 'written'), (0, 'whole')],
)
def test_a_zombie_neither_counts_nor_saves(victim, holds, seed, tmp_path):
  rng = random.Random(seed)
  folder = tmp_path / 'saved'
  make = lambda name, *arguments: worlds.World(
    'zombies.py', 2, tmp_path / name, TIMEOUT, folder, *arguments
  )
  with (
    make('old', 1, 10**6, holds) as old,
    make('new', 2, 15, 'nowhere') as new,
  ):
    new.wait_for('ready')
    old.go()
    old.wait_for('saved')
    if holds != 'nowhere':
      old.wait_for('held', [0])
    else:
      time.sleep(rng.uniform(0, 0.5))
    old.send(victim, signal.SIGSTOP)
    old.end([1 - victim], BOUND)
    (old.out / 'released').touch()
    new.go()
    # It wakes up while they join, take over and restore, or while they save.
    if moment := rng.choice(['', 'counted', 'saved']):
      new.wait_for(moment)
      time.sleep(rng.uniform(0, 0.2))
    else:
      time.sleep(rng.uniform(0, 3))
    old.send(victim, signal.SIGCONT)
    took = old.end([victim], BOUND)
    said = old.said(victim)
    assert old.members[victim].returncode != 0, said
    assert any(word in said for word in SAID), said
    new.end()
    for rank, member in new.members.items():
      assert member.returncode == 0, new.said(rank)
    firsts = {(new.out / f'{rank}.first').read_text() for rank in range(2)}
  (before,) = map(int, firsts)
  print('woken', moment, 'ended after', took)
  like = np.zeros((2, 2000), np.float32)
  steps = range(1, before + 16)
  names = filter(str.isdigit, os.listdir(folder))
  assert sorted(map(int, names)) == list(steps)
  for step in steps:
    world = jd.checkpoint_metadata(folder, step)['world']
    assert world == (1 if step <= before else 2)
    rows = jd.restore(folder, like, step=step)
    assert (rows[:, 0] == world).all() and (rows[:, 1:] == step).all()
