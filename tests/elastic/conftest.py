"""The tests find their neighbour; one Ray cluster a file."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

collect_ignore = ['pools.py']


@pytest.fixture(scope='module')
def cluster():
  """Ray on this machine, until the tests of a file are done."""
  ray = pytest.importorskip('ray', reason='needs jaxdist[ray]')
  from jaxdist.elastic.pool import start_ray

  start_ray()
  yield
  ray.shutdown()
