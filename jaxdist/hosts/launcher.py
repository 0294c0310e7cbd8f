"""Starts, watches, stops and restarts the processes of a world."""

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from jaxdist.hosts.world import LAUNCHED, TIMEOUT

_POLL_SECONDS = 0.02
# Of argparse, tyro and shells: the command line was wrong, and stays so.
_USAGE_ERROR = 2
# After one has failed, for the others to say what they saw of it.
_LAST_WORDS_SECONDS = 2.0


def run(
  command: Sequence[str], processes: int, timeout: float, restarts: int
) -> int:
  """Runs a command in several processes, again if one of them fails.

  The output of process 0 is passed on as it is, that of the others line by
  line, to the error output, behind their numbers. SIGINT and SIGTERM go to all
  processes; the second of them ends them at once.

  Args:
    command: what each runs.
    processes: how many.
    timeout: what :func:`jaxdist.initialize` in them is told, in seconds.
    restarts: how often to begin anew after a failure. Exit status 2 is none:
      by convention it says that the command line was refused, and it would be
      again.

  Returns:
    The exit status: 0 if all processes ended well, 130 if they were asked to
    by SIGINT, else that of the first to fail, plus 128 for a signal.
  """
  with _Signals() as signals:
    for restart in range(restarts + 1):
      world = _World(command, processes, timeout, restart)
      try:
        code = world.watch(signals.seen)
      finally:
        world.kill()
      if code is None:
        return 128 + signal.SIGINT if signal.SIGINT in signals.seen else 0
      if signals.seen or code == _USAGE_ERROR:
        break
      if restart < restarts:
        _say(f'restart {restart + 1} of {restarts}')
  return code if code > 0 else 128 - code


class _Signals:
  """Remembers what this process was asked, and asks the members."""

  def __init__(self):
    self.seen = []

  def __enter__(self):
    self.before = {
      number: signal.signal(number, lambda number, _: self.seen.append(number))
      for number in (signal.SIGINT, signal.SIGTERM)
    }
    return self

  def __exit__(self, *_):
    for number, handler in self.before.items():
      signal.signal(number, handler)


class _World:
  """Processes that live and die together."""

  def __init__(self, command, processes, timeout, restart):
    address = f'127.0.0.1:{_free_port()}'
    self.code = None
    self.pumps = []
    self.members = []
    for rank in range(processes):
      first = rank == 0
      member = subprocess.Popen(
        command,
        env={
          'JAX_LOCAL_DEVICE_IDS': str(rank),  # GPUs only.
          **os.environ,
          LAUNCHED: f'{address} {processes} {rank} {restart}',
          TIMEOUT: str(timeout),
        },
        stdin=subprocess.DEVNULL,
        stdout=None if first else subprocess.PIPE,
        stderr=None if first else subprocess.STDOUT,
        # Ctrl-C at a terminal is for the launcher to pass on, once.
        start_new_session=True,
      )
      self.members.append(member)
      if not first:
        pump = threading.Thread(
          target=_pump, args=(member.stdout, rank), daemon=True
        )
        pump.start()
        self.pumps.append(pump)

  def watch(self, signals):
    """Waits for the end, and passes signals on as they come.

    Returns:
      The exit code of the first process to fail; None if none did.
    """
    passed_on = 0
    end = math.inf
    while any(member.poll() is None for member in self.members):
      for number in signals[passed_on:]:
        passed_on += 1
        for member in self.members:
          member.send_signal(number if passed_on == 1 else signal.SIGKILL)
      if self.failed(signals) and end == math.inf:
        end = time.monotonic() + _LAST_WORDS_SECONDS
      if time.monotonic() > end:
        self.kill()
      time.sleep(_POLL_SECONDS)
    return self.failed(signals)

  def failed(self, signals):
    """Exit code of the process that failed first, if one did."""
    # Who is asked to end may say so.
    well = {0, *(128 + number for number in signals)}
    for rank, member in enumerate(self.members):
      if self.code is None and member.poll() not in {None, *well}:
        self.code = member.returncode
        _say(f'process {rank} {_ending(self.code)}')
    return self.code

  def kill(self):
    """Ends all processes, also stopped ones, and waits for their output."""
    for member in self.members:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(member.pid, signal.SIGKILL)  # And what it started.
    for member in self.members:
      member.wait()
    for pump in self.pumps:
      pump.join(_LAST_WORDS_SECONDS)


def _pump(lines, rank):
  with lines:
    for line in lines:
      text = line.decode(errors='replace').rstrip('\n')
      # In one piece, or those of two processes mix.
      sys.stderr.write(f'[{rank}] {text}\n')
      sys.stderr.flush()


def _free_port():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return free.getsockname()[1]


def _ending(code):
  if code > 0:
    return f'failed with exit status {code}'
  return f'was ended by {signal.Signals(-code).name}'


def _say(words):
  print(f'jaxdist.launch: {words}.', file=sys.stderr, flush=True)
