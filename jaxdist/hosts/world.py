"""Joining a world of several processes, with every wait bounded."""

import atexit
import contextlib
import ctypes
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax

from jaxdist import compat
from jaxdist.hosts import agreement, roll_call

# What the launcher tells its members: the coordinator's address, how many
# processes there are, which this is, and how many worlds failed before.
LAUNCHED = 'JAXDIST_LAUNCHED'
TIMEOUT = 'JAXDIST_TIMEOUT'
TIMEOUT_SECONDS = 30.0
# Set by Open MPI, by MPICH and its kin, by srun and by torchrun.
_COUNTS = (
  'OMPI_COMM_WORLD_SIZE',
  'PMI_SIZE',
  'SLURM_STEP_NUM_TASKS',
  'WORLD_SIZE',
)
_LAST_WORDS_MILLISECONDS = 1000
_COLLECTIVE_FLAG = '--xla_cpu_collective_timeout_seconds'


class World(NamedTuple):
  """The processes that train together.

  Attributes:
    process: which of them this is, from 0.
    processes: how many there are.
    restarts: how often :mod:`jaxdist.launch` has begun anew after a failure,
      and Slurm has requeued the job, together; if not 0, go on from the last
      checkpoint.
  """

  process: int = 0
  processes: int = 1
  restarts: int = 0


class _Member(NamedTuple):
  coordinator_address: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  local_device_ids: Sequence[int] | None = None


def initialize(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  local_device_ids: Sequence[int] | None = None,
  coordinator_bind_address: str | None = None,
  timeout: float | None = None,
) -> World:
  """Joins the processes of this run, wherever they are; call it first.

  What is not given comes from :mod:`jaxdist.launch`, or from what JAX detects:
  TPU pods (also on GKE), Slurm, Open MPI, Kubernetes. Where nothing tells of
  other processes, this one is alone, and nothing is set up.

  No wait is longer than ``timeout`` in what follows, so that a process that
  is missing, killed or stopped leaves no other waiting:

  - here, for all to come: :class:`jaxdist.MissingProcessError`;
  - in an exchange between CPUs: ``jax.errors.JaxRuntimeError`` (from JAX 0.10
    also ValueError), and at once if the connection breaks;
  - at the end, for all to leave; a process that fails does not wait;
  - anywhere else, and on GPUs and TPUs also in an exchange: JAX aborts a
    process that has not heard of another for twice as long, or at once if
    process 0 is gone.

  Process 0 listens at ``coordinator_address`` and nowhere else. The processes
  trust each other and their network: nothing is encrypted.

  Args:
    coordinator_address: ``host:port`` of process 0, as others reach it.
    num_processes: how many there are.
    process_id: which of them this is, from 0.
    local_device_ids: the GPUs of this process; ``None``: one a process under
      Slurm and MPI, else all.
    coordinator_bind_address: where process 0 listens instead, such as
      ``0.0.0.0:1234`` behind a translated address.
    timeout: longest wait in seconds; ``None``: what the launcher was told, or
      30. A process that compiles, reads data or saves for longer than the
      others counts as stopped.

  Returns:
    The :class:`World`.

  Raises:
    MissingProcessError: if processes do not come in time, naming them.
    DesyncError: if two claim the same place, or expect other numbers.
    ValueError: if an argument is out of range, or some but not all are known.
    OSError: if process 0 cannot listen at its address.

  Examples:
    >>> import jaxdist as jd
    >>> jd.initialize()
    World(process=0, processes=1, restarts=0)
  """
  seconds = _seconds(timeout)
  restarts = int(os.environ.get('SLURM_RESTART_COUNT', 0))
  coordinator_address = coordinator_address or os.environ.get(
    'JAX_COORDINATOR_ADDRESS'
  )
  member = _Member(
    coordinator_address, num_processes, process_id, local_device_ids
  )
  if None in member[:3] and (launched := os.environ.get(LAUNCHED)):
    address, *numbers = launched.split()
    count, index, begun_anew = map(int, numbers)
    restarts += begun_anew
    member = _Member(address, count, index, local_device_ids)
    _end_with_launcher()
  elif None in member[:3]:
    member = _Member(*compat.detect_cluster(*member, math.ceil(seconds)))
  if member[:3] == (None, None, None):
    _check_alone()
    return World(restarts=restarts)
  _check(member)
  if member.num_processes == 1:
    return World(restarts=restarts)
  bind_address = coordinator_bind_address or _bind_address(member)
  bind_host, port = roll_call.split_address(bind_address)
  own_host = roll_call.call(
    member.coordinator_address,
    bind_host,
    member.num_processes,
    member.process_id,
    seconds,
  )
  _show_gloo_the_way(own_host)
  agreement.timeout = seconds
  flags = os.environ.get('XLA_FLAGS', '')
  if _COLLECTIVE_FLAG not in flags:
    flag = f'{_COLLECTIVE_FLAG}={math.ceil(seconds)}'
    os.environ['XLA_FLAGS'] = f'{flags} {flag}'.strip()
  jax.distributed.initialize(
    **member._asdict(),
    cluster_detection_method='deactivate',
    coordinator_bind_address=roll_call.join_address(bind_host, port),
    initialization_timeout=math.ceil(seconds),
    shutdown_timeout_seconds=math.ceil(seconds),
    # The last resort: an exchange that fails says more.
    heartbeat_timeout_seconds=math.ceil(2 * seconds),
  )
  atexit.register(_leave)
  return World(member.process_id, member.num_processes, restarts)


def _leave():
  """After an error, ends this process without waiting for the others to end.

  JAX would wait for them, who may wait for this one, and then abort it with a
  page of text behind the error.
  """
  if not hasattr(sys, 'last_value') or not jax.distributed.is_initialized():
    return
  if 'Gloo' in str(sys.last_value):
    print(
      'jaxdist: an exchange failed: another process is gone, or kept this one '
      f'waiting for {agreement.timeout:g} s. What it says itself is the cause.',
      file=sys.stderr,
    )
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    # With process 0 goes the service, and with it all others, at once: if they
    # failed too, let them say so.
    compat.coordination_client().wait_at_barrier(
      'jaxdist/failed', _LAST_WORDS_MILLISECONDS
    )
  logging.shutdown()
  sys.stdout.flush()
  sys.stderr.flush()
  interrupted = isinstance(sys.last_value, KeyboardInterrupt)
  os._exit(128 + signal.SIGINT if interrupted else 1)


def _seconds(timeout):
  if timeout is None:
    timeout = float(os.environ.get(TIMEOUT, TIMEOUT_SECONDS))
  if not 1 <= timeout < math.inf:
    raise ValueError(f'timeout must be at least 1 second, got {timeout}.')
  return timeout


def _check_alone():
  """Refuses to train alone, many times over, what many were started for."""
  for name in _COUNTS:
    if int(os.environ.get(name, 1)) > 1:
      raise ValueError(
        f'coordinator_address, num_processes and process_id must be given: '
        f'{name} tells of {os.environ[name]} processes, but JAX does not know '
        f'this launcher.'
      )


def _check(member):
  for name, value in member._asdict().items():
    if value is None and name != 'local_device_ids':
      raise ValueError(
        f'{name} must be given: nothing here tells it, but other arguments or '
        'the environment tell of several processes.'
      )
  if not 0 <= member.process_id < member.num_processes:
    raise ValueError(
      f'process_id must be from 0 to num_processes - 1, got '
      f'{member.process_id} and {member.num_processes}.'
    )


def _bind_address(member):
  """Where process 0 listens: at the address that the others are given."""
  host, port = roll_call.split_address(member.coordinator_address)
  if member.process_id == 0:
    host = roll_call.resolve(host, port)
  return roll_call.join_address(host, port)


def _show_gloo_the_way(own_host):
  """Gives gloo an address that others reach where it would take another.

  It listens at what the machine's name resolves to. On many systems that is
  127.0.1.1; in a network namespace it may be an address outside of it.
  """
  try:
    by_name = roll_call.resolve(socket.gethostname(), 0)
  except OSError:
    by_name = None
  if not roll_call.is_loopback(own_host) and (
    by_name is None
    or roll_call.is_loopback(by_name)
    or not roll_call.is_own(by_name)
  ):
    compat.set_gloo_host(own_host)


def _end_with_launcher():
  """Ends this process when the launcher dies, even of SIGKILL (on Linux)."""
  if sys.platform == 'linux':
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
