"""The same numbers over two processes as in one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import divided
import jax
import numpy as np


def results_of_two():
  """What each of two processes ends with, by case."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  root = Path(__file__).parents[1]
  members = [
    subprocess.Popen(
      [sys.executable, divided.__file__, str(rank), str(port)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env={**os.environ, 'PYTHONPATH': str(root)},
    )
    for rank in range(2)
  ]
  try:
    results = []
    for member in members:
      out, err = member.communicate(timeout=240)
      assert member.returncode == 0, err[-3000:]
      (line,) = (x for x in out.splitlines() if x.startswith('RESULT'))
      results.append(json.loads(line.removeprefix('RESULT')))
    return results
  finally:
    for member in members:
      member.kill()
      member.wait()


def test_two_processes_are_one():
  first, second = results_of_two()
  assert first == second
  for name in divided.CASES:
    alone = divided.train(name, jax.devices()[: divided.DEVICES])
    # Adam blows the last bit of a gradient up; sums run in another order.
    np.testing.assert_allclose(
      first[name], alone, rtol=2e-5, atol=1e-5, err_msg=name
    )
