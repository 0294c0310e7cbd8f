"""Meshes for the tests."""

import jax
import pytest
from jax.sharding import AxisType


@pytest.fixture(scope='session')
def make_mesh():
  """Makes a one-dimensional mesh of the first N devices."""

  def make(workers=8, axis='data', axis_type=AxisType.Auto):
    return jax.make_mesh(
      (workers,),
      (axis,),
      axis_types=(axis_type,),
      devices=jax.devices()[:workers],
    )

  return make
