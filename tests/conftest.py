"""Eight CPU devices for all tests."""

import jax
import pytest
from jax.sharding import AxisType

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
# Several steps in flight on few cores can make a collective's rendezvous time
# out, which aborts the process.
jax.config.update('jax_cpu_enable_async_dispatch', False)


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
