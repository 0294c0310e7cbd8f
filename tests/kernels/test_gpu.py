"""GPU forms, with no GPU: lowered for CUDA, and interpreted where JAX can."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdist.kernels.quantize import api, gpu, reference

SIZES = {'int8': 1024, 'int4': 1024, 'sign': 4096}


def hopper():
  """As on a machine with one; JAX 0.10 needs nothing."""
  if not hasattr(jax.sharding, 'AbstractDevice'):
    return contextlib.nullcontext()
  device = jax.sharding.AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'cuda')
  return jax.sharding.use_abstract_mesh(
    jax.sharding.AbstractMesh((1,), ('x',), abstract_device=device)
  )


@pytest.mark.parametrize('format', SIZES)
def test_quantize_lowers_for_cuda(format):
  def program(x):
    words, scale = api.quantize(x, format, implementation='gpu')
    return (
      words,
      scale,
      api.quantize_with_feedback(x, x, format, implementation='gpu'),
    )

  x = jax.ShapeDtypeStruct((64, SIZES[format]), jnp.float32)
  kernels = jax.export.DisabledSafetyCheck.custom_call('mosaic_gpu_v2')
  with hopper():
    exported = jax.export.export(
      jax.jit(program), platforms=['cuda'], disabled_checks=[kernels]
    )(x)
  assert exported.mlir_module().count('@mosaic_gpu_v2') == 2


@pytest.mark.skipif(
  not hasattr(plgpu, 'InterpretGPUParams'), reason='This JAX cannot interpret.'
)
@pytest.mark.parametrize('format', SIZES)
def test_quantize_interpreted_is_the_definition(format, monkeypatch):
  monkeypatch.setattr(gpu, 'INTERPRET', plgpu.InterpretGPUParams())
  rng = np.random.default_rng(0)
  x, residual = rng.standard_normal((2, 6, SIZES[format])).astype(np.float32)
  x[1], residual[1], x[2, 7], x[3, 3], x[4, 4] = 0, 0, 1e38, np.nan, np.inf
  got, want = (
    jax.jit(lambda *a, form=form: form(*a, None, format=format))(x, residual)
    for form in (gpu.quantize_with_feedback, reference.quantize_with_feedback)
  )
  finite = np.isfinite(want[1][:, 0])
  np.testing.assert_array_equal(np.isfinite(got[1][:, 0]), finite)
  np.testing.assert_array_equal(got[0][finite], want[0][finite])
  # A product and a difference may be rounded as one; sums in another order.
  for a, b in zip(got[1:], want[1:], strict=True):
    a, b = np.asarray(a)[finite], np.asarray(b)[finite]
    scale = np.abs(x[finite]).max(axis=1, keepdims=True)
    assert (np.abs(a - b) <= 3e-7 * scale).all()


def test_what_a_gpu_cannot_take():
  with pytest.raises(
    NotImplementedError, match='multiple of 128 words, not 32'
  ):
    api.quantize(jnp.zeros((2, 1024)), 'sign', implementation='gpu')
  with pytest.raises(NotImplementedError, match=r"of the formats \('int8', "):
    api.quantize(jnp.zeros((2, 1024)), 'e4m3', implementation='gpu')
