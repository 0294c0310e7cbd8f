"""GPU forms, with no GPU: lowered for CUDA, and interpreted where JAX can."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxdist.kernels import gpu
from jaxdist.kernels.hadamard import api as rotation
from jaxdist.kernels.hadamard import gpu as rotation_gpu
from jaxdist.kernels.hadamard import reference as rotation_reference
from jaxdist.kernels.quantize import api as quantization
from jaxdist.kernels.quantize import gpu as quantization_gpu
from jaxdist.kernels.quantize import reference as quantization_reference
from jaxdist.kernels.quantize.formats import FORMATS
from jaxdist.kernels.top_k import api as selection
from jaxdist.kernels.top_k import gpu as selection_gpu
from jaxdist.kernels.top_k import reference as selection_reference
from jaxdist.kernels.top_k import scatter_gpu

KEY = jax.random.key(3)
GPU = {'implementation': 'gpu'}
QUANTIZED = [
  ('int8', None, 128),
  ('int4', None, 512),
  ('sign', None, 8192),  # Four warps a row, which is in shared memory.
  ('sign', None, 512),  # Two rows a warp.
  ('int8', KEY, 4096),  # Four warps a row.
  ('int4', KEY, 256),
  ('int2', KEY, 1024),
  ('int2', None, 512),
  ('e3m0', None, 256),
  ('e2m1', None, 256),
  ('e4m3', None, 128),
]
interpreted = pytest.mark.skipif(
  not hasattr(plgpu, 'InterpretGPUParams'), reason='This JAX cannot interpret.'
)


@pytest.fixture
def interpreter(monkeypatch):
  monkeypatch.setattr(gpu, 'INTERPRET', plgpu.InterpretGPUParams())


def hopper():
  """As on a machine with one; JAX 0.10 needs nothing."""
  if not hasattr(jax.sharding, 'AbstractDevice'):
    return contextlib.nullcontext()
  device = jax.sharding.AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'cuda')
  return jax.sharding.use_abstract_mesh(
    jax.sharding.AbstractMesh((1,), ('x',), abstract_device=device)
  )


def quantizes(format, key, size):
  def program(x):
    x = x[:, :size]
    return (
      quantization.quantize(x, format, key=key, **GPU),
      quantization.quantize_with_feedback(x, x, format, key=key, **GPU),
    )

  return program


def averages(x):
  words, scale = jax.lax.bitcast_convert_type(x, jnp.uint32), x[:, :1]
  means = [
    quantization.dequantize_mean(
      words[None, :, :32], scale[None], format, 32 * 32 // code.bits, **GPU
    )
    for format, code in FORMATS.items()
  ]
  long = words[:, :2048], scale, 'int4', 2**14
  return means, quantization.dequantize(*long, **GPU)


def selects(size, k):
  def program(x):
    x = x[:, :size]
    values, indices = selection.top_k(x, k, **GPU)
    *few, left = selection.top_k_with_feedback(x, x, k, **GPU)
    few = jax.tree.map(lambda *a: jnp.stack(a), (values, indices), tuple(few))
    mean = selection.scatter_mean(*few, size, **GPU)
    return mean, left, selection.scatter(values, indices, size, **GPU)

  return program


def rotates(x):
  x = x[:, :4096]
  return rotation.rotate(x, KEY, **GPU), rotation.unrotate(x, KEY, **GPU)


def many(x):
  return jax.vmap(quantizes('int8', None, 128))(x.reshape(5, 13, -1))


PROGRAMS = {
  **{
    f'{f}-{n}' + ('-random' if k is not None else ''): (quantizes(f, k, n), 2)
    for f, k, n in QUANTIZED
  },
  'means': (averages, len(FORMATS) + 1),
  'top-1-of-256': (selects(256, 1), 4),
  'top-51-of-4096': (selects(4096, 51), 4),
  'rotate': (rotates, 2),
  'many': (many, 2),
}


@pytest.mark.parametrize('name', PROGRAMS)
def test_forms_lower_for_cuda(name):
  program, calls = PROGRAMS[name]
  x = jax.ShapeDtypeStruct((65, 8192), jnp.float32)
  kernels = jax.export.DisabledSafetyCheck.custom_call('mosaic_gpu_v2')
  with hopper():
    exported = jax.export.export(
      jax.jit(program), platforms=['cuda'], disabled_checks=[kernels]
    )(x)
  assert exported.mlir_module().count('@mosaic_gpu_v2') == calls


def both(form, definition, *arrays, **options):
  """What a kernel and the definition return."""
  return [
    jax.tree.map(np.asarray, jax.jit(lambda *a, f=f: f(*a, **options))(*arrays))
    for f in (form, definition)
  ]


def assert_same_bits(got, want):
  np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


@interpreted
@pytest.mark.parametrize(('format', 'key', 'size'), QUANTIZED)
def test_quantize_is_the_definition(interpreter, format, key, size):
  # The last program's rows are some of the first's.
  rows = 9 if (format, size) == ('sign', 512) else 7
  x, residual = np.random.default_rng(0).standard_normal((2, rows, size))
  x[1], residual[1], x[2, 7], x[3, 3], x[4, 4] = 0, 0, 1e38, np.nan, np.inf
  x[6], residual[6] = 1e-40, 0
  got, want = both(
    lambda *a, **o: quantization_gpu.quantize_with_feedback(*a, key, **o),
    lambda *a, **o: quantization_reference.quantize_with_feedback(*a, key, **o),
    x.astype(np.float32),
    residual.astype(np.float32),
    format=format,
  )
  finite = np.isfinite(want[1][:, 0])
  np.testing.assert_array_equal(np.isfinite(got[1][:, 0]), finite)
  np.testing.assert_array_equal(got[0][finite], want[0][finite])
  # A scale of these is of sums, in another order.
  if format != 'sign' and (format, key) != ('int2', None):
    np.testing.assert_array_equal(got[1][finite], want[1][finite])
  # A product and a difference may be rounded as one.
  for a, b in zip(got[1:], want[1:], strict=True):
    scale = np.abs(x[finite]).max(axis=1, keepdims=True)
    assert (np.abs(a[finite] - b[finite]) <= 3e-7 * scale).all()


@interpreted
@pytest.mark.parametrize(
  ('format', 'size', 'largest'),  # Two rows a warp; two words a lane.
  [('sign', 512, 1), ('e2m1', 512, 6), ('e4m3', 4096, 448)],
)
def test_mean_of_payloads_is_the_definition(interpreter, format, size, largest):
  x = np.random.default_rng(2).standard_normal((3, 9, size))
  x[0, 1], x[1, 2, 3], x[2, 4, 5] = 0, np.nan, 3e38
  encode = lambda x: quantization_reference.quantize(x, None, format=format)
  words, scale = jax.jit(jax.vmap(encode))(x.astype(np.float32))
  got, want = both(
    quantization_gpu.dequantize_mean,
    quantization_reference.dequantize_mean,
    words, scale, format=format, count=size,
  )  # fmt: skip
  whole = np.arange(9) != 2
  np.testing.assert_array_equal(np.isfinite(want).all(1), whole)
  np.testing.assert_array_equal(np.isfinite(got).all(1), whole)
  # A product and a sum may be rounded as one.
  unit = np.abs(scale).max(0) * np.float32(largest)
  assert (np.abs(got - want) <= 2.0**-22 * unit)[whole].all()


def in_order(values, indices, left):
  """Numbers that were taken, by place."""
  order = np.argsort(indices, axis=1)
  return *(np.take_along_axis(x, order, 1) for x in (values, indices)), left


@interpreted
@pytest.mark.parametrize(('size', 'k'), [(512, 10), (2048, 2), (256, 100)])
def test_top_k_is_the_definition(interpreter, size, k):
  # Many ties, and rows of all kinds.
  rng = np.random.default_rng(0)
  x = (np.round(4 * rng.standard_normal((11, size))) / 4).astype(np.float32)
  x[0], x[1, 30], x[5], x[7] = 0, 3e38, -0.0, np.nan
  x[2] = np.where(x[2] > 0, 1, -1)
  x[3, [5, 9]] = np.nan, -np.inf
  x[4] *= 1e-40
  x[6, ::9] = -np.inf  # More than some of k, and NaN counts as it does.
  x[6, ::18] = np.nan
  residual = np.where(np.abs(x) > 1, 0, np.roll(x, 1, axis=1))
  got, want = both(
    selection_gpu.top_k_with_feedback,
    selection_reference.top_k_with_feedback,
    x, residual, k=k,
  )  # fmt: skip
  for a, b in zip(in_order(*got), in_order(*want), strict=True):
    assert_same_bits(a, b)


@interpreted
def test_scatter_is_the_definition(interpreter):
  rng = np.random.default_rng(1)
  values = rng.standard_normal((2, 6, 18)).astype(np.float32)
  values[0, 0, 0], values[0, 1] = -0.0, np.inf
  # Some places are of both workers; some are behind the end, and go nowhere.
  places = rng.permuted(np.tile(np.arange(0, 1056, 44), (2, 6, 1)), axis=2)
  places[0, 2, 3], places[1, 3, 16] = 1056, 2**32 - 1
  indices = places[..., :18].astype(np.uint32)
  for array in (values, indices), (values[:1], indices[:1]):
    assert_same_bits(
      *both(
        scatter_gpu.scatter_mean, selection_reference.scatter_mean, *array,
        size=1056,
      )
    )  # fmt: skip


@interpreted
@pytest.mark.parametrize(
  ('there', 'size'),
  [pytest.param('rotate', 8192, marks=pytest.mark.slow), ('unrotate', 1024)],
)
def test_rotation_is_the_definition(interpreter, there, size):
  rows = 2**14 // size + 1  # Two programs, of the same rows but one.
  x = np.random.default_rng(0).standard_normal((rows, size)).astype(np.float32)
  x[0], x[1, 5], x[2] = 0, 3e38, 1e-30 * x[2]
  got, want = both(
    getattr(rotation_gpu, there), getattr(rotation_reference, there), x, KEY
  )
  # Sums of `size` float32 numbers in another order.
  largest = np.abs(want).max(axis=1, keepdims=True)
  assert (np.abs(got - want) <= 4e-6 * largest).all()


@pytest.mark.parametrize(
  ('call', 'needs'),
  [
    (
      lambda x: quantization.quantize(x[:, :96], 'int8', **GPU),
      'a multiple of 32 times 4 numbers, or abo',
    ),
    (
      lambda x: quantization.quantize(jnp.tile(x, 6), 'sign', **GPU),
      'above 4096 of 128 times 32, up to 16384, not 6144',
    ),
    (lambda x: quantization.quantize(x[:, :0], 'int8', **GPU), 'not 0'),
    (lambda x: quantization.quantize(x[:3], 'int8', **GPU), 'least 4 rows, no'),
    (
      lambda x: quantization.quantize(x[:, :256], 'sign', **GPU),
      '16 rows, not 8',
    ),
    (lambda x: selection.top_k(x[:, :384], 3, **GPU), 'from 128 to 4096 numbe'),
    (lambda x: rotation.rotate(x, KEY, **GPU), 'at least 16 rows, not 8'),
  ],
)
def test_what_a_gpu_cannot_take(call, needs):
  with pytest.raises(NotImplementedError, match=needs):
    call(jnp.zeros((8, 1024)))
