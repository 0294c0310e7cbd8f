"""The launcher: what it starts, stops, starts again and says."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import worlds

import jaxdist as jd
from jaxdist.hosts import launcher

# Each says how far it is, so that nothing is asked of one that cannot hear.
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
Path(sys.argv[2], rank).touch()
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
def launch(tmp_path, capfd):
  """Runs the script in three processes; the exit status and what was said."""

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


# The main job.


class Job:
  """The recipe over several processes, with a tiny model."""

  def __init__(self, folder, processes, *arguments, restarts=0):
    self.out = folder / 'out'
    text = folder / 'text'
    if not text.exists():
      text.mkdir()
      for i in range(25):
        (text / f'{i}.txt').write_text(f'Some words, file {i}. ' * 40)
    launch = ['-m', 'jaxdist.launch', '--processes', processes]
    launch += ['--restarts', restarts, '--timeout', worlds.LIMIT]
    command = [sys.executable, *launch, worlds.ROOT / 'recipes/lm.py']
    command += ['--out', self.out, '--data', text, '--steps', 40, '--batch', 2]
    command += ['--length', 16, '--layers', 1, '--width', 16, '--heads', 2]
    command += ['--every-eval', 10, '--check-sync', 10, *arguments]
    self.said = folder / f'said.{time.monotonic_ns()}'
    with self.said.open('w') as file:
      self.launcher = subprocess.Popen(
        [str(word) for word in command],
        stdout=file,
        stderr=subprocess.STDOUT,
        env={
          **os.environ,
          'PYTHONPATH': str(worlds.ROOT),
          'JAX_PLATFORMS': 'cpu',
          'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
        },
      )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    # The members end with it.
    self.launcher.kill()
    self.launcher.wait()

  def lines(self):
    """The metrics of each step so far, without times."""
    with contextlib.suppress(FileNotFoundError):
      whole = (self.out / 'metrics.jsonl').read_text().rpartition('\n')[0]
      return {
        (line['run'], line['step']): (line['loss'], line.get('val_loss'))
        for line in map(json.loads, whole.splitlines())
      }
    return {}

  def wait_for(self, run, step):
    """Waits until a run has a step's metrics."""
    end = time.monotonic() + worlds.LIMIT
    while (run, step) not in (lines := self.lines()):
      assert self.launcher.poll() is None, self.said.read_text()
      assert time.monotonic() < end, self.said.read_text()
      time.sleep(0.005)
    return lines

  def members(self):
    """The process ids of the processes."""
    pid = self.launcher.pid
    children = Path(f'/proc/{pid}/task/{pid}/children')
    return [int(child) for child in children.read_text().split()]

  def end(self):
    """The exit status, and what was said."""
    code = self.launcher.wait(worlds.LIMIT)
    return code, self.said.read_text()

  def checkpoint(self, run):
    return jd.latest_step(self.out / 'checkpoints' / run)


linux = pytest.mark.skipif(
  sys.platform != 'linux', reason='finds processes in /proc'
)


@linux
def test_main_job_survives_a_kill_and_ends_well_when_asked(tmp_path):
  options = ['--method', 'dense', '--workers', 2]
  with Job(tmp_path, 2, *options, restarts=1) as job:
    job.wait_for('dense', 12)
    victim = job.members()[1]
    os.kill(victim, signal.SIGKILL)
    while victim in job.members():
      time.sleep(0.01)
    before = job.lines()
    last = max(step for _, step in before)
    after = job.wait_for('dense', last + 2)
    # It went on from a checkpoint, and steps taken twice gave the same.
    assert {key: after[key] for key in before} == before
    # One of them is asked, all stop.
    os.kill(job.members()[1], signal.SIGTERM)
    code, said = job.end()
    assert code == 0, said
    assert 'process 1 was ended by SIGKILL' in said
    assert 'restart 1 of 1' in said and 'Saved. To go on' in said, said
    steps = [step for _, step in job.lines()]
    assert steps == list(range(1, job.checkpoint('dense') + 1))
    assert last < job.checkpoint('dense') < 40, 'it ended before it was asked'


@linux
@pytest.mark.slow
@pytest.mark.parametrize('processes', [2, 4])
def test_broken_runs_give_the_losses_of_an_unbroken_one(processes, tmp_path):
  method = 'local-sgd'
  options = ['--method', method, '--workers', 4]
  lines = {}
  for name, count in (('alone', 1), ('unbroken', processes)):
    folder = tmp_path / name
    folder.mkdir()
    with Job(folder, count, *options) as job:
      code, said = job.end()
      assert code == 0, said
      lines[name] = job.lines()
  folder = tmp_path / 'broken'
  folder.mkdir()
  with Job(folder, processes, *options, restarts=2) as job:
    job.wait_for('dense', 13)
    os.kill(job.members()[-1], signal.SIGKILL)
    job.wait_for(method, 12)
    os.kill(job.members()[0], signal.SIGKILL)
    job.wait_for(method, 23)
    job.launcher.send_signal(signal.SIGTERM)
    code, said = job.end()
    assert code == 0, said
    assert said.count('was ended by SIGKILL') == 2, said
    stopped = job.checkpoint(method)
    assert 23 <= stopped < 37
  with Job(folder, processes, *options, '--resume') as job:
    job.wait_for(method, stopped + 2)
    members = job.members()
    job.launcher.kill()
    job.launcher.wait()
    end = time.monotonic() + 20
    while any(Path(f'/proc/{member}').exists() for member in members):
      assert time.monotonic() < end, 'a member outlives its launcher'
      time.sleep(0.1)
  with Job(folder, processes, *options, '--resume') as job:
    code, said = job.end()
    assert code == 0, said
    lines['broken'] = job.lines()
  assert lines['broken'] == lines['unbroken']
  assert len(lines['alone']) == len(lines['unbroken']) == 80
  difference = max(
    abs(lines['alone'][key][0] - lines['unbroken'][key][0])
    for key in lines['alone']
  )
  print(f'{processes} processes and 1 differ by {difference:.1e} in loss')
  # Sums are taken in another order, and training amplifies the last bit.
  assert difference < 1e-3
