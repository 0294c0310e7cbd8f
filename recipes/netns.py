"""Several hosts on one machine, with a slow link for each: Linux, as root.

A host is a network namespace. All are connected by a bridge in a namespace of
its own, so that nothing of the machine's own network is touched, and nothing
leaves it. What a host sends and what it receives are each held to a rate by a
token bucket::

  host 0  eth0 =====.          tc tbf on eth0: what the host sends
                     bridge
  host 1  eth0 ====='          tc tbf on the bridge's end: what it receives
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_PREFIX = 'jaxdist-links'
DEVICE = 'eth0'
_UNITS = {'kbit': 1e3, 'mbit': 1e6, 'gbit': 1e9}
# Ethernet, IPv4 and TCP with timestamps; and a whole packet.
HEADER_BYTES = 14 + 20 + 32
PACKET_BYTES = 14 + 1500
# Of what may follow at once after a pause: a link has none, timers need some.
_BURST_SECONDS = 5e-4
_LEAST_BURST = 2 * PACKET_BYTES + 72
# How long what was sent may wait in front of the link before it is dropped.
_QUEUE = '20ms'


def bits_per_second(rate: str) -> float:
  """A rate such as ``'100mbit'``.

  >>> bits_per_second('1.5gbit')
  1500000000.0
  """
  found = re.fullmatch(r'(\d+(?:\.\d+)?)(kbit|mbit|gbit)', rate)
  if not found or not float(found[1]) > 0:
    raise ValueError(
      f'--rates must be like 100mbit or 1gbit, greater than 0, got {rate!r}.'
    )
  return float(found[1]) * _UNITS[found[2]]


def check() -> None:
  """Refuses a machine where hosts cannot be made; makes nothing.

  Raises:
    ValueError: with what is missing.
  """
  if sys.platform != 'linux':
    raise ValueError(f'network namespaces need Linux, this is {sys.platform}.')
  missing = [tool for tool in ('ip', 'tc') if shutil.which(tool) is None]
  if missing:
    raise ValueError(
      f'{" and ".join(missing)} must be installed (package iproute2).'
    )
  if os.geteuid() != 0:
    raise ValueError(
      f'network namespaces are made by root only: run it with sudo -E '
      f'{sys.executable}.'
    )


def sent() -> tuple[int, int]:
  """Bytes and packets that the host of this process has sent so far."""
  folder = Path('/sys/class/net', DEVICE, 'statistics')
  read = lambda name: int((folder / name).read_text())
  return read('tx_bytes'), read('tx_packets')


class Hosts:
  """Hosts that are there inside of a ``with`` block.

  At its end their namespaces are removed and all links with them, as are those
  of a process that was killed before it could do so.
  """

  def __init__(self, count: int):
    self.addresses = [f'10.99.0.{i + 1}' for i in range(count)]
    self._names = [f'{_PREFIX}-{os.getpid()}-{i}' for i in range(count)]
    self._hub = f'{_PREFIX}-{os.getpid()}-hub'

  def __enter__(self) -> 'Hosts':
    remove_leftovers()
    try:
      self._make()
    except BaseException:
      self.__exit__()
      raise
    return self

  def __exit__(self, *_) -> None:
    for name in (*self._names, self._hub):
      if name in _namespaces():
        _run('ip', 'netns', 'del', name)

  def _make(self):
    _run('ip', 'netns', 'add', self._hub)
    _run('ip', '-n', self._hub, *['link', 'add', 'hub', 'type', 'bridge'])
    _run('ip', '-n', self._hub, *['link', 'set', 'hub', 'up'])
    for i, (name, address) in enumerate(
      zip(self._names, self.addresses, strict=True)
    ):
      _run('ip', 'netns', 'add', name)
      inside = lambda *words, name=name: _run('ip', '-n', name, *words)
      inside(
        *f'link add {DEVICE} type veth peer name port{i} netns'.split(),
        self._hub,
      )
      inside('addr', 'add', f'{address}/24', 'dev', DEVICE)
      inside('link', 'set', DEVICE, 'up')
      inside('link', 'set', 'lo', 'up')
      _run(
        *f'ip -n {self._hub} link set port{i} master hub up'.split(),
      )

  def limit(self, rate: float) -> None:
    """Holds what each host sends, and what it receives, to bits a second."""
    burst = max(_LEAST_BURST, rate / 8 * _BURST_SECONDS)
    ends = [(name, DEVICE) for name in self._names]
    ends += [(self._hub, f'port{i}') for i in range(len(self._names))]
    for name, device in ends:
      _run(
        *f'tc -n {name} qdisc replace dev {device} root tbf'.split(),
        *f'rate {rate:.0f}bit burst {burst:.0f}b latency {_QUEUE}'.split(),
      )

  def on(self, host: int, command: Sequence[str]) -> list[str]:
    """The command that runs a command on a host."""
    return ['ip', 'netns', 'exec', self._names[host], *command]


def remove_leftovers() -> list[str]:
  """Removes namespaces whose maker is gone; returns their names."""
  found = []
  for name in _namespaces():
    match = re.fullmatch(rf'{_PREFIX}-(\d+)-\w+', name)
    if match and not Path('/proc', match[1]).exists():
      _run('ip', 'netns', 'del', name)
      found.append(name)
  return found


def _namespaces():
  # Where there are none the folder is missing.
  folder = Path('/run/netns')
  return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def _run(*command):
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if done.returncode:
    raise OSError(
      f'{" ".join(command)} failed: {done.stderr.strip() or done.returncode}. '
      'Containers may lack CAP_NET_ADMIN or CAP_SYS_ADMIN.'
    )
