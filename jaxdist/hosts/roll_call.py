"""Who is there: found over a plain socket, before JAX connects.

JAX ends a process, with no error to catch, if others do not come to its
coordinator in time. Here each of them learns instead who is missing.
"""

import contextlib
import json
import socket
import time
from collections.abc import Iterator

from jaxdist.hosts.errors import DesyncError, MissingProcessError

_RETRY_SECONDS = 0.05
# For one line from who connects, so that a stranger cannot hold the call up.
_LINE_SECONDS = 1.0
_LINE_BYTES = 4096


def split_address(address: str) -> tuple[str, int]:
  """``host:port`` or ``[host]:port`` as two.

  Raises:
    ValueError: it is neither.
  """
  host, colon, port = address.rpartition(':')
  host = host.removeprefix('[').removesuffix(']')
  if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
    raise ValueError(f'an address must be HOST:PORT, got {address!r}.')
  return host, int(port)


def join_address(host: str, port: int) -> str:
  """The inverse of :func:`split_address`."""
  return f'[{host}]:{port}' if ':' in host else f'{host}:{port}'


def resolve(host: str, port: int) -> str:
  """The first IP address that a host's name has on this machine.

  Raises:
    OSError: it has none.
  """
  found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
  return found[0][4][0]


def is_loopback(host: str) -> bool:
  """Whether an IP address is reached from its own machine only."""
  return host.startswith('127.') or host in ('::1', '::ffff:127.0.0.1')


def is_own(host: str) -> bool:
  """Whether this machine has an IP address, and can listen there.

  >>> is_own('127.0.0.1'), is_own('203.0.113.7')
  (True, False)
  """
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  with socket.socket(family) as tried:
    try:
      tried.bind((host, 0))
    except OSError:
      return False
  return True


def call(
  address: str,
  bind_host: str | None,
  processes: int,
  process: int,
  seconds: float,
) -> str:
  """Waits until all processes are there. **On the wire:** a line from each.

  Args:
    address: ``host:port`` of process 0.
    bind_host: the IP address that process 0 listens on; not read by others.
    processes: how many there should be.
    process: which of them this is.
    seconds: how long to wait.

  Returns:
    The IP address by which this process reaches process 0.

  Raises:
    MissingProcessError: naming those who did not come; on all who did.
    DesyncError: processes were started with other numbers; on all of them.
    OSError: process 0 cannot listen at its address.
  """
  host, port = split_address(address)
  me = {
    'process': process,
    'processes': processes,
    'host': socket.gethostname(),
  }
  if process == 0:
    verdict = _hold(bind_host, port, me, seconds)
    own_host = bind_host
  else:
    verdict, own_host = _answer(host, port, me, seconds)
  if 'desync' in verdict:
    raise DesyncError(verdict['desync'])
  if 'missing' in verdict:
    raise MissingProcessError(verdict['missing'])
  return own_host


def _hold(bind_host, port, me, seconds):
  """Process 0: collects answers and tells all what came of it."""
  end = time.monotonic() + seconds
  family = socket.AF_INET6 if ':' in bind_host else socket.AF_INET
  with contextlib.ExitStack() as stack:
    try:
      server = socket.create_server(
        (bind_host, port), family=family, backlog=me['processes']
      )
    except OSError as error:
      raise OSError(
        error.errno,
        f'process 0 cannot listen at {join_address(bind_host, port)} '
        f'({error.strerror}): coordinator_bind_address must be a free port of '
        'an address of this machine',
      ) from error
    stack.enter_context(server)
    members = {0: me}
    connections = []
    desync = None
    while len(members) < me['processes'] and desync is None:
      if (left := end - time.monotonic()) <= 0:
        break
      server.settimeout(left)
      with contextlib.suppress(TimeoutError):
        connection, _ = server.accept()
        stack.enter_context(connection)
        member = _read(connection, min(_LINE_SECONDS, left))
        if not _is_member(member, me):  # A stranger.
          continue
        connections.append(connection)
        desync = _disagreement(members, member)
        members.setdefault(member['process'], member)
    missing = sorted(set(range(me['processes'])) - set(members))
    if desync:
      verdict = {'desync': desync}
    elif missing:
      verdict = {'missing': _missing(members, missing, seconds)}
      if is_loopback(bind_host):
        verdict['missing'] += (
          f' Process 0 listens at {bind_host}, which only processes on its own '
          'machine reach: give coordinator_address, or in /etc/hosts its '
          'name, an address that the others reach.'
        )
    else:
      verdict = {}
    for connection in connections:
      with contextlib.suppress(OSError):  # It is gone: JAX will find out.
        connection.sendall(json.dumps(verdict).encode() + b'\n')
    # Who closes first keeps the port busy for a while, so let it be them.
    for connection in connections:
      with contextlib.suppress(OSError):
        connection.recv(1)
  return verdict


def _is_member(member, me):
  """Whether an answer is of the kind that this process would give."""
  kinds = lambda x: {name: type(value) for name, value in x.items()}
  return member is not None and kinds(member) == kinds(me)


def _disagreement(members, member):
  """What the newest member says that does not fit the others, if anything."""
  first = members[0]
  if member['processes'] != first['processes']:
    return (
      f'num_processes must be the same for all, but is {first["processes"]} '
      f'for process 0 on {first["host"]} and {member["processes"]} for process '
      f'{member["process"]} on {member["host"]}.'
    )
  same = members.get(member['process'])
  if same:
    return (
      f'process_id must be another for each process, but is '
      f'{member["process"]} for one on {same["host"]} and one on '
      f'{member["host"]}.'
    )
  return None


def _missing(members, missing, seconds):
  there = ', '.join(f'{i} on {members[i]["host"]}' for i in sorted(members))
  return (
    f'processes {missing} of {len(members) + len(missing)} did not come within '
    f'{seconds:g} s; there are {there}.'
  )


def _answer(host, port, me, seconds):
  """Another process: calls process 0 until it answers."""
  start = time.monotonic()
  reason = 'it does not answer'
  for left in _until(start + seconds):
    try:
      connection = socket.create_connection((host, port), timeout=left)
    except OSError as error:
      reason = str(error)
      continue
    with connection, contextlib.suppress(OSError):
      own_host = connection.getsockname()[0]
      connection.sendall(json.dumps(me).encode() + b'\n')
      # Its own wait may have begun when this one connected.
      verdict = _read(connection, seconds + _LINE_SECONDS)
      if verdict is not None:
        return verdict, own_host
      reason = 'something else listens there'
  raise MissingProcessError(
    f'process {me["process"]} did not find process 0 at '
    f'{join_address(host, port)} within {seconds:g} s: {reason}.'
  )


def _until(end: float) -> Iterator[float]:
  """Seconds left, again and again with a pause between, until none are."""
  while (left := end - time.monotonic()) > 0:
    yield left
    time.sleep(_RETRY_SECONDS)


def _read(connection, seconds):
  """A line of JSON, an object; None if there comes something else, or late."""
  data = b''
  end = time.monotonic() + seconds
  try:
    while not data.endswith(b'\n') and len(data) < _LINE_BYTES:
      connection.settimeout(max(end - time.monotonic(), 0.001))
      if not (more := connection.recv(_LINE_BYTES)):
        break
      data += more
    found = json.loads(data)
  except (OSError, ValueError):
    return None
  return found if isinstance(found, dict) else None
