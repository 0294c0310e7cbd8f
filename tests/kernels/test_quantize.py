"""Quantization: the definition's random numbers, and the TPU's form of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dither import dither, threefry
from simulated import simulated

from jaxdist.kernels import numbers, tiles
from jaxdist.kernels.quantize import api, reference, tpu
from jaxdist.kernels.quantize.formats import FORMATS

KEY = jax.random.key(3)
CASES = [
  (name, key)
  for name, code in FORMATS.items()
  for key in ([None, KEY] if code.stochastic else [None])
]
every_format = pytest.mark.parametrize(
  ('format', 'key'), CASES, ids=[f'{n}-{k is not None}' for n, k in CASES]
)


def hard_rows(rows, size, seed=0):
  x = np.random.default_rng(seed).standard_normal((rows, size))
  x[0] = 0
  x[1] = -0.0
  x[2, 5] = 8e37  # The sum of four is finite.
  x[3] *= 1e-40
  x[4] = 0.7
  x[5, 7] = np.nan
  x[6, -1] = np.inf
  return jnp.asarray(x, jnp.float32)


@every_format
def test_tpu_form_is_the_definition(format, key):
  # A tail of a tile, and one of what lies side by side.
  x, residual = hard_rows(301, 512), hard_rows(301, 512, seed=1)
  residual = residual.at[:7].set(0)
  got = simulated(tpu.quantize_with_feedback, x, residual, key, format=format)
  want = jax.jit(
    lambda *a: reference.quantize_with_feedback(*a, key, format=format)
  )(x, residual)
  finite = np.isfinite(want[1][:, 0])
  np.testing.assert_array_equal(finite.nonzero()[0][:6], [0, 1, 2, 3, 4, 7])
  for name, a, b in zip(('words', 'scale', 'dropped'), got, want, strict=True):
    a, b = np.asarray(a), np.asarray(b)
    if name != 'words':
      # Of a row that is not finite, only that counts.
      np.testing.assert_array_equal(np.isfinite(a).all(1), finite)
    np.testing.assert_array_equal(a[finite], b[finite], err_msg=name)


# Wide rows, of no power of two, which a step's numbers are; narrow ones, in a
# chunk that is the whole step; fewer than there are lanes, and one.
@pytest.mark.parametrize(
  ('format', 'size', 'rows', 'chunk'),
  [
    ('int8', 1536, 293, 2**15),
    ('sign', 512, 293, 2**18),
    ('e2m1', 128, 5, 2**15),
    pytest.param('int4', 512, 1, 2**15, marks=pytest.mark.slow),
  ],
)
def test_rows_without_feedback_on_tpu_are_the_definition(
  format, size, rows, chunk
):
  x = hard_rows(rows + 7, size)[7:]
  with tiles.watched(forced=tiles.Tiles(2**18, chunk, 'a test')):
    got = simulated(tpu.quantize, x, None, format=format)
  want = jax.jit(lambda x: reference.quantize(x, None, format=format))(x)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('format', FORMATS)
def test_mean_on_tpu_is_the_definition(format, monkeypatch):
  x = jnp.stack([hard_rows(133, 512, seed) for seed in range(4)])
  encode = lambda x: reference.quantize(x, None, format=format)
  words, scale = jax.jit(jax.vmap(encode))(x)
  options = {'format': format, 'count': 512}
  want = np.asarray(
    jax.jit(lambda *a: reference.dequantize_mean(*a, **options))(words, scale)
  )
  monkeypatch.setattr(tpu, 'SOME', 2)  # In two steps.
  got = np.asarray(simulated(tpu.dequantize_mean, words, scale, **options))
  finite = np.isfinite(want).all(1)
  np.testing.assert_array_equal(np.isfinite(got).all(1), finite)
  np.testing.assert_array_equal((~finite).nonzero()[0], [5, 6])
  # A product and a sum may be rounded as one: to 2**-24 of each product.
  largest = {'int8': 127, 'int4': 7, 'int2': 3, 'e2m1': 6, 'e4m3': 448}
  unit = np.abs(np.asarray(scale)).max(0) * largest.get(format, 1)
  limit = (2.0**-22 * unit + 1e-44)[finite]
  assert (np.abs(got[finite] - want[finite]) / limit).max() <= 1
  if format == 'int8':
    one = simulated(tpu.dequantize, words[0], scale[0], **options)
    single = reference.dequantize(words[0], scale[0], **options)
    np.testing.assert_array_equal(one[finite], single[finite])


def test_what_a_tpu_cannot_take():
  x = jnp.zeros((8, 192))
  with pytest.raises(NotImplementedError, match=r'multiple of 128 .* not 192'):
    api.quantize(x, 'int8', implementation='tpu')
  with pytest.raises(NotImplementedError, match='words, not 4'):
    api.quantize(jnp.zeros((8, 128)), 'sign', implementation='tpu')
  with pytest.raises(NotImplementedError, match=r'multiple of 512.* not 256'):
    api.quantize(jnp.zeros((8, 256)), 'int8', key=KEY, implementation='tpu')
  with pytest.raises(NotImplementedError, match='cpu'):
    api.quantize(jnp.zeros((8, 512)), 'int8', implementation='tpu')


def test_programs_for_tpus_have_the_kernels():
  def program(x, residual, key):
    words, scale, residual = api.quantize_with_feedback(
      x, residual, 'int4', key=key
    )
    mean = api.dequantize_mean(words[None], scale[None], 'int4', 1024)
    return residual, mean

  x = jax.ShapeDtypeStruct((64, 1024), jnp.float32)
  exported = jax.export.export(jax.jit(program), platforms=['tpu'])(x, x, KEY)
  text = exported.mlir_module()
  assert 'quantize_int4' in text
  assert text.count('tpu_custom_call') == 2
  batched = jax.export.export(jax.jit(jax.vmap(program)), platforms=['tpu'])
  x = jax.ShapeDtypeStruct((2, 64, 1024), jnp.float32)
  batched(x, x, jax.random.split(KEY))


@pytest.mark.parametrize('manual', [{'data'}, {'data', 'model'}])
def test_kernels_are_for_regions_that_are_manual_over_all(manual):
  # The partitioner does not cut kernels up.
  mesh = jax.make_mesh(
    (2, 2), ('data', 'model'), axis_types=2 * (jax.sharding.AxisType.Auto,)
  )
  rows = jax.sharding.PartitionSpec('data')

  def program(x):
    words, scale = api.quantize(x, 'int8')
    return api.dequantize(words, scale, 'int8', 512)

  mapped = jax.shard_map(
    program, mesh=mesh, in_specs=rows, out_specs=rows, axis_names=manual
  )
  x = jax.ShapeDtypeStruct((32, 512), jnp.float32)
  exported = jax.export.export(jax.jit(mapped), platforms=['tpu'])(x)
  kernels = exported.mlir_module().count('tpu_custom_call')
  assert kernels == (2 if len(manual) == 2 else 0)


@pytest.mark.parametrize('format', FORMATS)
def test_levels_decode_to_themselves(format):
  code = FORMATS[format]
  codes = np.arange(2**code.bits, dtype=np.uint32)
  top = jnp.asarray(codes << (32 - code.bits)).astype(jnp.int32)
  levels = code.decode(top[None], jnp.ones((1, 1)))
  if format == 'e4m3':
    levels = levels[abs(levels) <= 448][None]  # Above is NaN.
  if format in ('int8', 'int4'):
    levels = levels[levels > levels.min()][None]  # One code is not used.

  def there_and_back(x):
    words, scale = reference.quantize(x, None, format=format)
    return reference.dequantize(words, scale, format=format, count=x.shape[1])

  back = jax.jit(there_and_back)(levels)
  # A scale that is not a power of two is a rounding off.
  np.testing.assert_allclose(back, levels, rtol=2e-7)


def test_threefry_of_20_rounds_is_the_known_one(monkeypatch):
  monkeypatch.setattr(numbers, 'ROUNDS', 20)
  keys = np.array([0x13198A2E, 0x03707344], np.uint32)
  counts = np.array([0x243F6A88, 0x85A308D3], np.uint32)
  got = numbers.threefry(tuple(jnp.asarray(keys)), *jnp.asarray(counts))
  # From Random123's list of known answers.
  assert [hex(int(word)) for word in got] == ['0xc4923a9c', '0x483df7a0']
  ours = threefry(keys, counts[:1], counts[1:], 20)
  assert [hex(int(word[0])) for word in ours] == ['0xc4923a9c', '0x483df7a0']


@functools.partial(jax.jit, static_argnums=1)
def drawn(key, shape):
  return numbers.to_dither(numbers.random_bits(numbers.seed(key), *shape))


def test_dither_is_that_of_numpy():
  for size in (512, 13, 1):
    np.testing.assert_array_equal(drawn(KEY, (9, size)), dither(KEY, (9, size)))


def test_dither_is_even_and_independent():
  n = 2**20
  draws = [
    np.asarray(drawn(key, (1024, 1024))) for key in jax.random.split(KEY, 3)
  ]
  for x in draws:
    assert np.abs(x).max() < 0.5
    # Mean, variance and each of 16 bits, to within five deviations.
    assert abs(x.mean()) < 5 * np.sqrt(1 / 12 / n)
    assert abs(x.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / n)
    bits = ((x + 0.5) * 2**16).astype(np.int64)
    for i in range(16):
      assert abs((bits >> i & 1).mean() - 0.5) < 5 * 0.5 / np.sqrt(n)

  def correlation(a, b):
    return np.mean(a * b) * 12 * np.sqrt(a.size)

  x = draws[0]
  pairs = [(x, draws[1]), (x, draws[2]), (x[1:], x[:-1])]
  pairs += [(x[:, d:], x[:, :-d]) for d in (1, 2, 256, 512, 768)]
  assert max(abs(correlation(a, b)) for a, b in pairs) < 5


def test_bad_arguments():
  x = jnp.zeros((2, 12))
  with pytest.raises(ValueError, match=r"format must be one of \['int8', .*'x"):
    api.quantize(x, 'x')
  with pytest.raises(ValueError, match="key must be None for format 'e4m3'"):
    api.quantize(x, 'e4m3', key=KEY)
  words, scale = api.quantize(x, 'int8')
  with pytest.raises(ValueError, match=r'words must have shape \(2, 2\).*2, 3'):
    api.dequantize(words, scale, 'int4', 12)
