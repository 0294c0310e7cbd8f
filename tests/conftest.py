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


@pytest.fixture
def traffic_of(make_mesh):
  """Traffic of a worker's function of 24 floats (and of the step's number)."""
  import compiled  # Not before types are to be checked in what it imports.

  def measure(function, *others, mesh=None, **kwargs):
    mesh = make_mesh() if mesh is None else mesh
    return compiled.traffic_of_floats(function, mesh, *others, **kwargs)

  return measure
