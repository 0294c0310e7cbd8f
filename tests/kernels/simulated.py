"""Runs the kernels for TPUs on the CPU."""

import contextlib
import io

import jax
from jax.experimental.pallas import tpu as pltpu

# XLA:CPU's fusion makes programs of long sorting networks slow to compile.
OPTIONS = {
  'xla_backend_optimization_level': 0,
  'xla_disable_hlo_passes': 'fusion,cpu-fusion',
}


@contextlib.contextmanager
def simulation(**options):
  """Kernels for TPUs are simulated, and may not race for memory."""
  params = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory='nan', **options
  )
  # JAX 0.10 prints races, and semaphores that are left over, and goes on.
  said = io.StringIO()
  with contextlib.redirect_stdout(said), pltpu.force_tpu_interpret_mode(params):
    yield
  assert not said.getvalue(), said.getvalue()


def simulated(function, *arrays, **options):
  """What a TPU's kernel returns, with all memory poisoned before."""

  def run(*arrays):
    return function(*arrays, **options)

  with simulation(out_of_bounds_reads='uninitialized'):
    return jax.block_until_ready(
      jax.jit(run, compiler_options=OPTIONS)(*arrays)
    )
