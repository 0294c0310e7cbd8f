"""Eight CPU devices for all tests, those in docstrings too."""

import os

# Nearly all of the tests' time is compiling; numbers don't depend on this.
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_backend_optimization_level=0'
)

import hypothesis
import jax

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
# Several steps in flight on few cores can make a collective's rendezvous time
# out, which aborts the process.
jax.config.update('jax_cpu_enable_async_dispatch', False)

# A first call compiles: a limit on its time would only find a busy machine.
hypothesis.settings.register_profile('compiling', deadline=None)
hypothesis.settings.load_profile('compiling')
