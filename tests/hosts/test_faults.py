"""What becomes of the others when something happens to one process.

Every wait is bounded: within twice the timeout and 2 seconds each of them has
ended with an error that says why.
"""

import signal
import time

import pytest
import worlds

TIMEOUT = 3
BOUND = 2 * TIMEOUT + 2
SIGNALS = {'kill': signal.SIGKILL, 'stop': signal.SIGSTOP}
SAID = (
  'Gloo',  # An exchange failed.
  'MissingProcessError',
  'JAX distributed service detected fatal errors',  # JAX ended it.
)


def strike(kind, victim, processes, out):
  """Seconds from the fault to the end of each other process."""
  arguments = ('faults.py', processes, out, TIMEOUT, kind, victim)
  if kind == 'absent':
    others = [rank for rank in range(processes) if rank != victim]
    with worlds.World(*arguments, start=others) as world:
      world.go()
      took = world.end(seconds=BOUND)
  else:
    with worlds.World(*arguments) as world:
      others = [rank for rank in world.members if rank != victim]
      world.go()
      world.wait_for('running')
      time.sleep(0.2)
      if kind in SIGNALS:
        world.send(victim, SIGNALS[kind])
      else:
        (out / 'now').touch()
      took = world.end(others, BOUND)
      if kind == 'stop':  # It wakes up, and ends too.
        world.send(victim, signal.SIGCONT)
        world.end([victim], BOUND)
        others.append(victim)
  for rank in others:
    said = world.said(rank)
    assert world.members[rank].returncode != 0, said
    assert any(word in said for word in SAID), said
  if kind == 'raise':
    assert "KeyError: 'a bug'" in world.said(victim)
  return took


def test_killed_process_ends_all_at_2_and_4(tmp_path):
  strike('kill', 3, 4, tmp_path / 'four')
  strike('kill', 0, 2, tmp_path / 'two')


def test_stopped_process_ends_the_other(tmp_path):
  strike('stop', 1, 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('processes', [2, 4, 5])
@pytest.mark.parametrize(
  'kind', ['absent', 'kill', 'stop', 'raise', 'leave', 'hang', 'late']
)
@pytest.mark.parametrize('victim', [0, -1])
def test_each_fault_ends_all_in_time(kind, victim, processes, tmp_path):
  took = strike(kind, victim % processes, processes, tmp_path)
  print(f'{kind} {victim % processes} of {processes}: {took}')
