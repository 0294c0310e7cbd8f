"""Runs the kernels for TPUs on the CPU."""

import jax
from jax.experimental.pallas import tpu as pltpu

# XLA:CPU's fusion makes programs of long sorting networks slow to compile.
OPTIONS = {
  'xla_backend_optimization_level': 0,
  'xla_disable_hlo_passes': 'fusion,cpu-fusion',
}


def simulated(function, *arrays, **options):
  """What a TPU's kernel returns, with all memory poisoned before."""
  params = pltpu.InterpretParams(
    detect_races=True,
    uninitialized_memory='nan',
    out_of_bounds_reads='uninitialized',
  )

  def run(*arrays):
    return function(*arrays, **options)

  with pltpu.force_tpu_interpret_mode(params):
    return jax.block_until_ready(
      jax.jit(run, compiler_options=OPTIONS)(*arrays)
    )
