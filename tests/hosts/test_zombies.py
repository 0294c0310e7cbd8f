"""A process that was given up wakes up beside those that took its place.

Where :mod:`jaxdist.launch` began anew it was killed before; elsewhere nobody
may have done so.
"""

import random
import signal
import time

import numpy as np
import pytest
import worlds
from test_faults import BOUND, SAID, TIMEOUT

import jaxdist as jd

# Of those that took its place, if it could commit what it had been saving.
REFUSALS = (
  'step 2 is in',
  'step must be larger than that of the newest checkpoint',
  'step 2 was not saved in',
)


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(7))
@pytest.mark.parametrize('victim, holds', [(0, False), (1, False), (0, True)])
def test_a_zombie_neither_counts_nor_saves(victim, holds, seed, tmp_path):
  rng = random.Random(seed)
  folder = tmp_path / 'saved'
  make = lambda name, *arguments: worlds.World(
    'zombies.py', 2, tmp_path / name, TIMEOUT, folder, *arguments
  )
  with make('old', 1, 10**6, int(holds)) as old, make('new', 2, 15, 0) as new:
    new.wait_for('ready')
    old.go()
    old.wait_for('saved')
    if holds:  # All is written, and not yet committed.
      old.wait_for('held', [0])
    else:
      time.sleep(rng.uniform(0, 0.5))
    old.send(victim, signal.SIGSTOP)
    old.end([1 - victim], BOUND)
    (old.out / 'released').touch()
    before = jd.latest_step(folder)
    new.go()
    # It wakes up while they restore, or while they save.
    new.wait_for(rng.choice(['counted', 'saved']))
    time.sleep(rng.uniform(0, 0.2))
    old.send(victim, signal.SIGCONT)
    took = old.end([victim], BOUND)
    said = old.said(victim)
    assert old.members[victim].returncode != 0, said
    assert any(word in said for word in SAID), said
    new.end()
    codes = [member.returncode for member in new.members.values()]
    words = new.said(0) + new.said(1)
  print('ended after', took, 'and the others with', codes)
  like = np.zeros((2, 2000), np.float32)
  last = jd.latest_step(folder)
  if any(codes):  # At the one moment at which it can save.
    assert holds and all(codes), words
    assert any(refusal in words for refusal in REFUSALS), words
    assert last == before or jd.checkpoint_metadata(folder)['world'] == 1
  else:
    assert last == before + 15
  for step in range(1, last + 1):
    world = jd.checkpoint_metadata(folder, step)['world']
    assert world == (1 if step <= before or any(codes) else 2)
    rows = jd.restore(folder, like, step=step)
    assert (rows[:, 0] == world).all() and (rows[:, 1:] == step).all()
