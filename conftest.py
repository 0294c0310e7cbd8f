"""Eight CPU devices for all tests, those in docstrings too."""

import importlib.metadata
import importlib.util
import os

# Much of the tests' time is compiling; what they check doesn't depend on these.
# The last saves two thirds of it; jaxlib 0.12 does not know it.
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '')
  + ' --xla_backend_optimization_level=0'
  + ' --xla_cpu_parallel_codegen_split_count=1'
  + ' --xla_cpu_use_fusion_emitters=false'
  * importlib.metadata.version('jaxlib').startswith('0.10.')
)

import hypothesis
import jax
import pytest

# It says so itself where it is imported without Ray.
collect_ignore = [] if importlib.util.find_spec('ray') else ['jaxdist/elastic']

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
# Several steps in flight on few cores can make a collective's rendezvous time
# out, which aborts the process.
jax.config.update('jax_cpu_enable_async_dispatch', False)

# A first call compiles: a limit on its time would only find a busy machine.
hypothesis.settings.register_profile('compiling', deadline=None)
hypothesis.settings.load_profile('compiling')


def pytest_xdist_auto_num_workers():
  """One more than there are cores: some tests wait for processes of theirs."""
  return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items):
  """Skips the example that needs the TPU compiler where there is none."""
  if importlib.util.find_spec('libtpu'):
    return
  for item in items:
    if item.name == 'jaxdist.accounting.topology.topology_mesh':
      item.add_marker(pytest.mark.skip(reason='needs libtpu'))
