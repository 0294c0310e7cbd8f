"""Who is there, over real sockets; processes are threads here."""

import socket
import threading
import time

import pytest

from jaxdist.hosts import DesyncError, MissingProcessError, roll_call


@pytest.fixture
def address():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{free.getsockname()[1]}'


def call_all(address, members, seconds):
  """What each member gets, an address or an error, and after how long."""
  results = {}
  start = time.monotonic()

  def run(name, processes, process):
    try:
      results[name] = roll_call.call(
        address, '127.0.0.1', processes, process, seconds
      )
    except (DesyncError, MissingProcessError) as error:
      results[name] = error

  threads = [
    threading.Thread(target=run, args=(i, *member))
    for i, member in enumerate(members)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(30)
  return results, time.monotonic() - start


def test_all_come_though_a_stranger_does_too(address):
  def knock():
    host, port = roll_call.split_address(address)
    for words in (b'GET / HTTP/1.1\r\n\r\n', b'{"process": 1}\n'):
      for _ in range(100):
        try:
          with socket.create_connection((host, port), 1) as stranger:
            stranger.sendall(words)
            break
        except OSError:
          time.sleep(0.01)

  stranger = threading.Thread(target=knock)
  stranger.start()
  results, _ = call_all(address, [(4, i) for i in range(4)], 10.0)
  stranger.join()
  assert set(results.values()) == {'127.0.0.1'}
  # The port is free again at once, for JAX.
  results, _ = call_all(address, [(2, 0), (2, 1)], 10.0)
  assert set(results.values()) == {'127.0.0.1'}


def test_who_is_missing_is_named_to_all_who_came(address):
  results, seconds = call_all(address, [(5, 0), (5, 1), (5, 4)], 1.0)
  assert len(results) == 3 and seconds < 4
  for error in results.values():
    assert isinstance(error, MissingProcessError)
    assert 'processes [2, 3] of 5 did not come within 1 s' in str(error)
    assert 'only processes on its own machine reach' in str(error)


def test_without_process_0_all_others_give_up(address):
  results, seconds = call_all(address, [(3, 1), (3, 2)], 1.0)
  assert seconds < 4
  for error in results.values():
    assert isinstance(error, MissingProcessError)
    assert f'did not find process 0 at {address} within 1 s' in str(error)


@pytest.mark.parametrize(
  'members, message',
  [
    ([(3, 0), (3, 1), (3, 1)], 'process_id must be another for each process'),
    ([(2, 0), (3, 2)], 'but is 2 for process 0 on .* and 3 for process 2 on'),
  ],
)
def test_members_that_contradict_each_other_all_raise(
  address, members, message
):
  results, seconds = call_all(address, members, 10.0)
  assert len(results) == len(members) and seconds < 5
  for error in results.values():
    assert isinstance(error, DesyncError)
    with pytest.raises(DesyncError, match=message):
      raise error


def test_port_in_use_is_said(address):
  host, port = roll_call.split_address(address)
  with (
    socket.create_server((host, port)),
    pytest.raises(OSError, match='coordinator_bind_address must be a free'),
  ):
    roll_call.call(address, host, 2, 0, 1.0)


@pytest.mark.parametrize(
  'address', ['host', 'host:', ':80', 'host:port', 'a:0']
)
def test_addresses_without_host_or_port_are_refused(address):
  with pytest.raises(ValueError, match='must be HOST:PORT'):
    roll_call.split_address(address)


def test_addresses_of_both_kinds():
  for address in ('10.0.0.1:80', '[fe80::1]:80', 'node001:80'):
    assert roll_call.join_address(*roll_call.split_address(address)) == address
  assert roll_call.is_loopback('127.0.1.1') and roll_call.is_loopback('::1')
  assert not roll_call.is_loopback('10.0.0.1')
