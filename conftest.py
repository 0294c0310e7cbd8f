"""Eight CPU devices for all tests, those in docstrings too."""

import os

# Nearly all of the tests' time is compiling; numbers don't depend on this.
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_backend_optimization_level=0'
)

import importlib.util

import hypothesis
import jax
import pytest

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
# Several steps in flight on few cores can make a collective's rendezvous time
# out, which aborts the process.
jax.config.update('jax_cpu_enable_async_dispatch', False)

# A first call compiles: a limit on its time would only find a busy machine.
hypothesis.settings.register_profile('compiling', deadline=None)
hypothesis.settings.load_profile('compiling')


def pytest_collection_modifyitems(items):
  """Skips the example that needs the TPU compiler where there is none."""
  if importlib.util.find_spec('libtpu'):
    return
  for item in items:
    if item.name == 'jaxdist.accounting.topology.topology_mesh':
      item.add_marker(pytest.mark.skip(reason='needs libtpu'))
