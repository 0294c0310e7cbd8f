"""The tests find their neighbour; one Ray cluster for those that need it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

collect_ignore = ['pools.py']


@pytest.fixture(scope='session')
def cluster():
  """Ray on this machine, until all tests are done."""
  ray = pytest.importorskip('ray', reason='needs jaxdist[ray]')
  from jaxdist.elastic.pool import start_ray

  start_ray()
  yield
  ray.shutdown()
