"""Contracts that every compressor keeps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tables import BLOCK, COMPRESSORS, SHARED_KEY

from jaxdist.compressors.base import payload_from_words, payload_words

KEY = jax.random.key(5)

# Words for one block of 128, by hand. A scale is one word, an index in 128
# takes 7 bits, and 13 numbers are kept at density 0.1, 32 at density 0.25.
WORDS = {
  'identity(block_size=128)': 128,
  'top_k(0.1, block_size=128)': 13 + 3,
  "top_k(0.1, values='bfloat16', block_size=128)": 7 + 3,
  'top_k(1.0, block_size=128)': 128 + 28,
  'global_top_k(0.1)': 13 + 3,
  "global_top_k(0.1, values='bfloat16')": 7 + 3,
  'random_k(0.1, block_size=128)': 13,
  'random_k(0.25, unbiased=True, block_size=128)': 32,
  'quantize(bits=8, block_size=128)': 32 + 1,
  'quantize(bits=4, block_size=128)': 16 + 1,
  'quantize(bits=2, block_size=128)': 8 + 1,
  'quantize(bits=8, stochastic=True, block_size=128)': 32 + 1,
  'quantize(bits=4, stochastic=True, block_size=128)': 16 + 1,
  'quantize(bits=2, stochastic=True, block_size=128)': 8 + 1,
  'float4(block_size=128)': 16 + 1,
  'float8(block_size=128)': 32 + 1,
  'sign(block_size=128)': 4 + 1,
  'ternary(block_size=128)': 7 + 1,
  'natural(block_size=128)': 32 + 1,
  'codebook(3, block_size=128)': 8 + 3,
  'codebook(5, density=0.2, block_size=128)': 12 + 5,
  'codebook(2, density=0.2, block_size=None)': 4 + 2,
  'chained(top_k(0.1, block_size=128), quantize(bits=4, block_size=128))': (
    3 + 2 + 1
  ),
  'chained(top_k(0.1, block_size=128), '
  'quantize(bits=2, stochastic=True, block_size=128))': 3 + 1 + 1,
  'chained(random_k(0.25, unbiased=True, block_size=128), '
  'quantize(bits=4, stochastic=True, block_size=128))': 4 + 1,
  'chained(random_k(0.25, unbiased=True, block_size=128), '
  'sign(block_size=128))': 1 + 1,
  'rotated(quantize(bits=4, block_size=128))': 16 + 1,
  'rotated(random_k(0.25, unbiased=True, block_size=128))': 32,
  'sketch(0.25, block_size=128)': 32,
  "sketch(0.25, family='gaussian', block_size=128)": 32,
}


def gaussian(rows=8, size=BLOCK, seed=0):
  x = np.random.default_rng(seed).standard_normal((rows, size))
  return x.astype(np.float32)


@functools.cache
def coded(name):
  """The jitted code ``(x, key) -> (payload, decoded)``, compiled once."""
  code = COMPRESSORS[name].at(SHARED_KEY)

  @jax.jit
  def run(x, key):
    payload = code.encode(x, key)
    return payload, code.decode(payload)

  return run


every_code = pytest.mark.parametrize('name', COMPRESSORS)


@every_code
def test_zero_decodes_to_zero(name):
  _, y = coded(name)(np.zeros((8, BLOCK), np.float32), KEY)
  np.testing.assert_array_equal(y, 0)


@every_code
def test_payload_is_words_and_floats_with_blocks_leading(name):
  payload, y = coded(name)(gaussian(), KEY)
  assert (y.shape, y.dtype) == ((8, BLOCK), jnp.float32)
  for leaf in jax.tree.leaves(payload):
    assert leaf.dtype in (jnp.uint32, jnp.float32)
    assert (leaf.ndim, leaf.shape[0]) == (2, 8)
  words = payload_words(payload)
  assert words.shape == (8, WORDS[name])
  other = payload_from_words(words, payload)
  assert jax.tree.structure(other) == jax.tree.structure(payload)
  for a, b in zip(
    jax.tree.leaves(other), jax.tree.leaves(payload), strict=True
  ):
    np.testing.assert_array_equal(
      np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32)
    )


@every_code
@pytest.mark.parametrize('factor', [0.25, 8.0])
def test_codes_commute_with_a_factor(name, factor):
  """Why EF21-W's weights cancel. Powers of two, which floats scale exactly."""
  _, once = coded(name)(gaussian(), KEY)
  _, scaled = coded(name)(factor * gaussian(), KEY)
  np.testing.assert_array_equal(scaled, factor * once)


@every_code
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_seen(name, bad):
  x = gaussian()
  _, clean = coded(name)(x, KEY)
  for row, column in ((0, 0), (3, 77), (7, BLOCK - 1)):
    x[row, column] = bad
  _, y = coded(name)(x, KEY)
  finite = np.isfinite(y).all(axis=1)
  np.testing.assert_array_equal(finite, [0, 1, 1, 0, 1, 1, 1, 0])
  np.testing.assert_array_equal(y[finite], clean[finite])


@every_code
def test_finite_stays_finite(name):
  near_end = np.clip(gaussian() * np.float64(1e38), -3.4e38, 3.4e38)
  scales = [[1], [3.4e38], [0], [1e-30], [1e-38], [1e-40], [1e-45], [1e30]]
  signs = np.sign(gaussian())
  for x in (near_end, signs * scales, gaussian() * scales / 8):
    _, y = coded(name)(x.astype(np.float32), KEY)
    assert np.isfinite(y).all()
  y = np.asarray(y, np.float64)
  kept = (y * x).sum(1)  # In the direction of what went in.
  assert (kept[[0, 1, 3, 7]] > 0).all()


@every_code
def test_randomness_comes_from_the_key(name):
  run, x = coded(name), gaussian()
  _, one = run(x, jax.random.key(1))
  _, same = run(x, jax.random.key(1))
  _, two = run(x, jax.random.key(2))
  np.testing.assert_array_equal(one, same)
  random = any(s in name for s in ('stochastic', 'ternary', 'natural'))
  assert (one != two).any() == random


@every_code
def test_seeds_are_shared(name):
  code = COMPRESSORS[name]
  if code.seeded is None:
    assert code.at(SHARED_KEY) is code
    return
  for function in (code.encode, code.decode):
    with pytest.raises(ValueError, match=r'share; use it through .at\(shared'):
      function(gaussian(), KEY)
  other = code.at(jax.random.key(12))
  x = jnp.asarray(gaussian())
  _, y = coded(name)(x, KEY)
  assert (other.decode(other.encode(x, KEY)) != y).any()


@every_code
def test_compiles_once(name):
  run = coded(name)
  run(gaussian(seed=1), jax.random.key(1))
  compiled = run._cache_size()
  run(gaussian(seed=2), jax.random.key(2))
  assert run._cache_size() == compiled


@every_code
def test_says_how_it_was_made(name):
  assert name == repr(COMPRESSORS[name])
  code = COMPRESSORS[name]
  assert code.contraction <= 1
  assert code.unbiased or code.contraction > 0 or 'chained' in name


@every_code
def test_runs_in_a_manual_region(name, make_mesh):
  code = COMPRESSORS[name].at(SHARED_KEY)

  def gathered_mean(x):
    key = jax.random.fold_in(KEY, jax.lax.axis_index('data'))
    words = payload_words(payload := code.encode(x, key))
    words = jax.lax.all_gather(words, 'data', to='invarying')

    def decode(words):
      return code.decode(payload_from_words(words, payload))

    return jax.vmap(decode)(words).mean(0), code.decode(payload)

  mapped = jax.shard_map(
    gathered_mean,
    mesh=make_mesh(2),
    in_specs=P('data'),
    out_specs=(P(), P('data')),
    check_vma=True,
  )
  # Types that vary where they should not are found when tracing.
  mean, each = jax.eval_shape(mapped, gaussian())
  assert (mean.shape, each.shape) == ((4, BLOCK), (8, BLOCK))


@pytest.mark.parametrize(
  'name', [n for n, code in COMPRESSORS.items() if code.linear]
)
def test_linear_payloads_may_be_summed(name):
  code = COMPRESSORS[name].at(SHARED_KEY)
  payloads, decoded = zip(
    *(coded(name)(gaussian(seed=i), KEY) for i in range(3)), strict=True
  )
  total = code.decode(jax.tree.map(lambda *leaves: sum(leaves), *payloads))
  # Sums of a few float32 numbers in a different order.
  np.testing.assert_allclose(total, sum(decoded), atol=1e-4)


def test_vmap_and_shard_map_agree(make_mesh):
  codes = {n: code.at(SHARED_KEY) for n, code in COMPRESSORS.items()}

  def worker(x):
    key = jax.random.fold_in(KEY, jax.lax.axis_index('data'))
    return {n: c.decode(c.encode(x, key)) for n, c in codes.items()}

  x = gaussian(4)
  mapped = jax.shard_map(
    worker, mesh=make_mesh(2), in_specs=P('data'), out_specs=P('data')
  )
  # Large programs that run once.
  quick = functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0}
  )
  one = quick(mapped)(x)
  two = quick(jax.vmap(worker, axis_name='data'))(x.reshape(2, 2, BLOCK))
  for name in codes:
    # Reductions may add up in another order.
    np.testing.assert_allclose(
      one[name], two[name].reshape(4, BLOCK), atol=1e-5, err_msg=name
    )
