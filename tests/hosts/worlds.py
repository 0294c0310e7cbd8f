"""Real processes for the tests, none of which outlives its test."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from jaxdist.hosts.world import LAUNCHED, TIMEOUT

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
# For what takes seconds on a quiet machine.
LIMIT = 240


class World:
  """Processes that run one script of this folder, each with its own output.

  The script says that it is ready, and waits for all others, before it joins
  them: what imports take is not measured.
  """

  def __init__(self, script, processes, out, timeout, *arguments, start=None):
    self.out = out
    out.mkdir(exist_ok=True)
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      address = f'127.0.0.1:{free.getsockname()[1]}'
    self.members = {}
    for rank in range(processes) if start is None else start:
      with (out / f'{rank}.out').open('w') as output:
        self.members[rank] = subprocess.Popen(
          [sys.executable, FOLDER / script, out, *map(str, arguments)],
          stdout=output,
          stderr=subprocess.STDOUT,
          env={
            **os.environ,
            'PYTHONPATH': str(ROOT),
            'JAX_PLATFORMS': 'cpu',
            LAUNCHED: f'{address} {processes} {rank} 0',
            TIMEOUT: str(timeout),
          },
        )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for member in self.members.values():
      member.kill()
      member.wait()

  def said(self, rank):
    """What a process has printed."""
    return (self.out / f'{rank}.out').read_text()

  def wait_for(self, name, ranks=None):
    """Waits until each process has left a file of this name."""
    end = time.monotonic() + LIMIT
    for rank in self.members if ranks is None else ranks:
      member = self.members[rank]
      while not (self.out / f'{rank}.{name}').exists():
        assert member.poll() is None, self.said(rank)
        assert time.monotonic() < end, self.said(rank)
        time.sleep(0.01)

  def go(self):
    """Lets them join each other, all at once."""
    self.wait_for('ready')
    (self.out / 'go').touch()

  def end(self, ranks=None, seconds=LIMIT):
    """Waits for processes to end; how long each took."""
    start = time.monotonic()
    took = {}
    for rank in sorted(self.members if ranks is None else ranks):
      left = seconds - (time.monotonic() - start)
      try:
        self.members[rank].wait(max(left, 0.01))
      except subprocess.TimeoutExpired:
        raise AssertionError(
          f'process {rank} still waits: {self.said(rank)}'
        ) from None
      took[rank] = time.monotonic() - start
    return took

  def send(self, rank, number):
    os.kill(self.members[rank].pid, number)
    if number == signal.SIGKILL:
      self.members[rank].wait()

  def results(self):
    """What each process wrote before it ended well."""
    for rank, member in self.members.items():
      assert member.returncode == 0, self.said(rank)
    return {
      rank: json.loads((self.out / f'{rank}.json').read_text())
      for rank in self.members
    }


def get_ready(out):
  """For the scripts: all have imported what they need."""
  rank = os.environ[LAUNCHED].split()[2]
  (out / f'{rank}.ready').touch()
  while not (out / 'go').exists():
    time.sleep(0.005)
