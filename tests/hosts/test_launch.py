"""The launcher: what it starts, stops, starts again and says."""

import os
import signal
import sys
import threading
import time

import pytest
import worlds

from jaxdist.hosts import launcher

# All have said something before one of them fails, or is asked to end.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
_, _, rank, restarts = os.environ['JAXDIST_LAUNCHED'].split()
what = sys.argv[1]
if what == 'signals':
  seen = lambda number, _: sys.exit(0)
  signal.signal(signal.SIGINT, seen)
  signal.signal(signal.SIGTERM, seen)
if what == 'deaf':
  signal.signal(signal.SIGINT, signal.SIG_IGN)
print('hello', rank, restarts, flush=True)
Path(sys.argv[2], f'{rank}.{restarts}').touch()
while len(list(Path(sys.argv[2]).glob(f'*.{restarts}'))) < 3:
  time.sleep(0.01)
if what == 'once' and restarts == '0':
  if rank == '1':
    sys.exit(7)
  time.sleep(1000)
if what == 'refused' and rank == '0':
  sys.exit(2)
if what == 'crash':
  if rank == '2':
    os.kill(os.getpid(), signal.SIGSEGV)
  os.kill(os.getpid(), signal.SIGSTOP)
if what in ('signals', 'deaf', 'sleep'):
  time.sleep(1000)
"""


@pytest.fixture
def launch(tmp_path, capfd, monkeypatch):
  """Runs the script in three processes; the exit status and what was said."""
  monkeypatch.setattr(launcher, '_LAST_WORDS_SECONDS', 0.3)

  def run(what, restarts=0, numbers=()):
    for path in tmp_path.iterdir():
      path.unlink()

    def send():
      end = time.monotonic() + worlds.LIMIT
      while len(list(tmp_path.iterdir())) < 3 and time.monotonic() < end:
        time.sleep(0.01)
      for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.2)

    sender = threading.Thread(target=send)
    sender.start()
    command = [sys.executable, '-c', SCRIPT, what, str(tmp_path)]
    start = time.monotonic()
    code = launcher.run(command, 3, 30.0, restarts)
    seconds = time.monotonic() - start
    sender.join()
    said = capfd.readouterr()
    return code, said.out, said.err, seconds

  return run


def test_output_tells_processes_apart(launch):
  code, out, err, _ = launch('nothing')
  assert code == 0
  assert out == 'hello 0 0\n'
  assert sorted(err.splitlines()) == ['[1] hello 1 0', '[2] hello 2 0']


def test_failed_world_begins_anew_as_often_as_allowed(launch):
  code, out, err, _ = launch('once', restarts=2)
  assert code == 0
  assert out == 'hello 0 0\nhello 0 1\n'
  assert 'process 1 failed with exit status 7' in err
  assert 'restart 1 of 2' in err and 'restart 2' not in err
  assert launch('once')[0] == 7


def test_refused_arguments_are_no_reason_to_restart(launch):
  code, out, err, _ = launch('refused', restarts=3)
  assert code == 2
  assert out == 'hello 0 0\n'
  assert 'failed with exit status 2' in err and 'restart' not in err


def test_crash_ends_also_who_stands_still(launch):
  code, _, err, seconds = launch('crash', restarts=1)
  assert code == 128 + signal.SIGSEGV
  assert err.count('process 2 was ended by SIGSEGV') == 2
  assert seconds < 20


@pytest.mark.parametrize(
  'what, numbers, expected',
  [
    ('signals', [signal.SIGTERM], 0),
    ('signals', [signal.SIGINT], 130),
    ('sleep', [signal.SIGTERM], 143),
    ('sleep', [signal.SIGINT], 130),
    ('deaf', [signal.SIGINT, signal.SIGINT], 137),
  ],
)
def test_signals_reach_all_and_are_no_reason_to_restart(
  launch, what, numbers, expected
):
  code, out, _, _ = launch(what, restarts=3, numbers=numbers)
  assert code == expected
  assert out == 'hello 0 0\n'
