"""The language-model recipe over several processes, which are ended by force.

What they go on to is bit for bit what they would have come to.
"""

import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import lm
import pytest
import record
import text

import jaxdist as jd

ROOT = Path(__file__).parents[2]
# Seconds for what takes ten on a quiet machine.
LIMIT = 240
STEPS = 60
TINY = {
  'steps': STEPS,
  'batch': 2,
  'length': 16,
  'layers': 1,
  'width': 16,
  'heads': 2,
  'every_eval': 10,
  'check_sync': 10,
}
pytestmark = pytest.mark.skipif(
  sys.platform != 'linux', reason='finds processes in /proc'
)


def make_text(folder):
  path = folder / 'text'
  if not path.exists():
    path.mkdir()
    for i in range(25):
      (path / f'{i}.txt').write_text(f'Some words, file {i}. ' * 40)
  return path


def without_times(lines):
  """What counts of the metrics, by run and step."""
  return {
    (line['run'], line['step']): (line['loss'], line.get('val_loss'))
    for line in lines
  }


def unbroken(folder):
  """What this process comes to, which nobody breaks off."""
  data = text.load(make_text(folder))
  run = lm.train(lm.Config(workers=2, **TINY), 'dense', data)
  return without_times(run.lines)


class Job:
  """The recipe over several processes, with a tiny model."""

  def __init__(self, folder, processes, *arguments, restarts=0):
    self.out = folder / 'out'
    launch = ['-m', 'jaxdist.launch', '--processes', processes]
    launch += ['--restarts', restarts, '--timeout', LIMIT]
    command = [sys.executable, *launch, ROOT / 'recipes/lm.py', *arguments]
    command += ['--out', self.out, '--data', make_text(folder)]
    for name, value in TINY.items():
      command += [f'--{name.replace("_", "-")}', value]
    self.said = folder / f'said.{time.monotonic_ns()}'
    with self.said.open('w') as file:
      self.launcher = subprocess.Popen(
        [str(word) for word in command],
        stdout=file,
        stderr=subprocess.STDOUT,
        env={
          **os.environ,
          'PYTHONPATH': str(ROOT),
          'JAX_PLATFORMS': 'cpu',
          'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
          # Whoever begins anew does not compile again.
          'JAX_COMPILATION_CACHE_DIR': str(folder / 'compiled'),
          'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
          'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
        },
      )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    # The members end with it.
    self.launcher.kill()
    self.launcher.wait()

  def lines(self):
    """The metrics of each step so far."""
    return without_times(record.Folder(self.out).load_lines())

  def wait_for(self, run, step):
    """Waits until a run has a step's metrics."""
    end = time.monotonic() + LIMIT
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
    code = self.launcher.wait(LIMIT)
    return code, self.said.read_text()

  def checkpoint(self, run):
    return jd.latest_step(self.out / 'checkpoints' / run)


def test_main_job_goes_on_bit_for_bit(compile_fast, tmp_path):
  options = ['--method', 'dense', '--workers', 2]
  with Job(tmp_path, 2, *options, restarts=1) as job:
    job.wait_for('dense', 12)
    victim = job.members()[1]
    os.kill(victim, signal.SIGKILL)
    while victim in job.members():
      time.sleep(0.01)
    last = max(step for _, step in job.lines())
    # It has begun anew, and is asked to end.
    job.wait_for('dense', last + 2)
    job.launcher.send_signal(signal.SIGTERM)
    code, said = job.end()
    assert code == 0, said
    assert 'process 1 was ended by SIGKILL' in said
    assert 'restart 1 of 1' in said and 'Saved. To go on' in said, said
    stopped = job.checkpoint('dense')
    assert list(job.lines()) == [('dense', i + 1) for i in range(stopped)]
    assert last < stopped < STEPS, 'it ended before it was asked'
  with Job(tmp_path, 2, *options, '--resume') as job:
    job.wait_for('dense', stopped + 2)
    # One of them is asked, all stop.
    os.kill(job.members()[1], signal.SIGTERM)
    code, said = job.end()
    assert code == 0, said
    assert 'Saved. To go on' in said, said
    steps = [step for _, step in job.lines()]
    assert steps == list(range(1, job.checkpoint('dense') + 1))
  # A sum of two has one order: one process gives the same bits.
  assert job.lines() == dict(islice(unbroken(tmp_path).items(), len(steps)))


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
    assert 23 <= stopped < STEPS - 3
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
  assert len(lines['alone']) == len(lines['unbroken']) == 2 * STEPS
  difference = max(
    abs(lines['alone'][key][0] - lines['unbroken'][key][0])
    for key in lines['alone']
  )
  print(f'{processes} processes and 1 differ by {difference:.1e} in loss')
  # Sums are taken in another order, and training amplifies the last bit.
  assert difference < 1e-3
