"""Eight CPU devices for all tests, those in docstrings too."""

import jax

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
# Several steps in flight on few cores can make a collective's rendezvous time
# out, which aborts the process.
jax.config.update('jax_cpu_enable_async_dispatch', False)
