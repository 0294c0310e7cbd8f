"""Processes, one a host, that carry out what they are told together.

They stay from one task to the next, so that what they have imported, connected
and compiled is there.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from netns import Hosts

_LAST_WORDS = 2000


class Crew:
  """One process on each host, inside of a ``with`` block.

  Args:
    hosts: where they run.
    script: a Python file that calls :func:`serve`.
    told: arguments for its ``start``, beside ``host`` and ``hosts``.
    environment: of the processes, beside this one's.
    logs: folder for what they print.
  """

  def __init__(
    self,
    hosts: Hosts,
    script: Path,
    told: dict[str, Any],
    environment: dict[str, str],
    logs: Path,
  ):
    self.name = script.stem
    logs.mkdir(parents=True, exist_ok=True)
    self.logs = [
      logs / f'{self.name}.{i}.log' for i in range(len(hosts.addresses))
    ]
    self.members = []
    with contextlib.ExitStack() as stack:
      stack.callback(self.close)
      for i, log in enumerate(self.logs):
        place = {'host': i, 'hosts': len(self.logs)}
        command = [sys.executable, str(script), json.dumps({**told, **place})]
        with log.open('w') as errors:
          self.members.append(
            subprocess.Popen(
              hosts.on(i, command),
              stdin=subprocess.PIPE,
              stdout=subprocess.PIPE,
              stderr=errors,
              env={**os.environ, **environment},
              # Ctrl-C is for the one who commands them.
              start_new_session=True,
            )
          )
      stack.pop_all()

  def __enter__(self) -> 'Crew':
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def close(self) -> None:
    """Ends them at once."""
    for member in self.members:
      member.kill()
      member.communicate()

  def ask(self, task: dict[str, Any], seconds: float) -> list[Any]:
    """Has all carry out a task.

    Args:
      task: arguments of the function that they serve.
      seconds: how long it may take.

    Returns:
      What the function returned, host by host.

    Raises:
      RuntimeError: one of them failed, with its last words, or was too slow.
    """
    for member in self.members:
      with contextlib.suppress(BrokenPipeError):  # Its end says more.
        member.stdin.write(json.dumps(task).encode() + b'\n')
        member.stdin.flush()
    end = time.monotonic() + seconds
    return [json.loads(self._line(i, end)) for i in range(len(self.members))]

  def _line(self, host, end):
    stdout, line = self.members[host].stdout, b''
    while not line.endswith(b'\n'):
      left = end - time.monotonic()
      if left <= 0 or not select.select([stdout], [], [], left)[0]:
        raise RuntimeError(self._report(host, 'does not answer'))
      more = os.read(stdout.fileno(), 1 << 16)
      if not more:
        raise RuntimeError(self._report(host, 'ended'))
      line += more
    return line

  def _report(self, host, what):
    words = self.logs[host].read_text(errors='replace')[-_LAST_WORDS:]
    return f'{self.name} on host {host} {what}. Its last words:\n{words}'


def serve(start: Callable[..., Callable[..., Any]]) -> None:
  """For the scripts: answers tasks until the input ends.

  The process ends when the one who commands it does. Of the cores it takes its
  host's share, as if there were no others. What it prints goes to the log,
  since libraries print too.

  Args:
    start: from what it was told to the function that carries out a task.
  """
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  set_parent_death_signal = 1
  ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
  told = json.loads(sys.argv[1])
  cores = sorted(os.sched_getaffinity(0))
  os.sched_setaffinity(0, own_cores(cores, told['host'], told['hosts']))
  function = start(**told)
  for line in sys.stdin:
    answers.write(json.dumps(function(**json.loads(line))) + '\n')
    answers.flush()


def own_cores(cores: list[int], host: int, hosts: int) -> list[int]:
  """The share of a host, of as many cores as there are.

  >>> own_cores([0, 1, 2, 3], 1, 2), own_cores([0, 1], 3, 4)
  ([2, 3], [1])
  """
  share = max(len(cores) // hosts, 1)
  first = host * share % len(cores)
  return cores[first : first + share]
