"""Each code against its definition in NumPy, which shares no code with it."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from dither import dither

import jaxdist as jd

KEY = jax.random.key(7)


def data(rows=6, size=128):
  rng = np.random.default_rng(1)
  x = rng.standard_normal((rows, size)) * np.exp(rng.normal(size=(rows, size)))
  return x.astype(np.float32)


def decoded(code, x, key=KEY):
  run = jax.jit(lambda x, key: code.decode(code.encode(x, key)))
  return np.asarray(run(x, key))


def nearest(x, levels):
  return levels[np.abs(x[..., None] - levels).argmin(-1)]


def uniform(x):
  return dither(KEY, x.shape) + 0.5


@pytest.mark.parametrize('bits', [8, 4])
def test_quantize(bits):
  x, q = data(), {8: 127, 4: 7}[bits]
  expected = [
    nearest(row, np.arange(-q, q + 1) * np.float64(abs(row).max()) / q)
    for row in x
  ]
  np.testing.assert_allclose(decoded(jd.quantize(bits=bits), x), expected, 1e-6)


@pytest.mark.parametrize('bits', [8, 4])
def test_stochastic_quantize(bits):
  x, q = data(), {8: 127, 4: 7}[bits]
  step = np.abs(x).max(1, keepdims=True).astype(np.float64) / q
  expected = np.round(x / step + dither(KEY, x.shape)) * step
  y = decoded(jd.quantize(bits=bits, stochastic=True), x)
  wrong = np.abs(y - expected) > 1e-5 * step
  # Two numbers that differ by a rounding fall on two sides once in a million.
  assert wrong.sum() == 0


def test_quantize_to_two_bits():
  x = data()
  y = decoded(jd.quantize(bits=2), x)
  for row, got in zip(x, y, strict=True):
    big = np.abs(row) >= 0.9957 * np.sqrt(np.mean(row.astype(np.float64) ** 2))
    levels = np.sign(row) * (1 + 2 * big)
    a, *_ = np.linalg.lstsq(levels[:, None], row, rcond=None)
    np.testing.assert_allclose(got, a[0] * levels, rtol=1e-5)


def test_stochastic_quantize_to_two_bits():
  x = data()
  y = decoded(jd.quantize(bits=2, stochastic=True), x)
  a = np.abs(x).max(1, keepdims=True) / 3
  np.testing.assert_allclose(np.abs(np.abs(y / a) - 2), 1, atol=1e-5)
  # A neighbour of the number, on either side.
  assert (np.abs(y - x) <= 2 * a * 1.00001).all()
  largest = np.abs(x).argmax(1, keepdims=True)
  np.testing.assert_allclose(
    *(np.take_along_axis(z, largest, 1) for z in (x, y)), rtol=1e-6
  )


@pytest.mark.parametrize(('levels', 'density'), [(3, 1.0), (3, 0.2), (8, 0.5)])
def test_codebook(levels, density):
  x = data()
  y = decoded(jd.codebook(levels, density=density), x)
  for row, got in zip(x.astype(np.float64), y, strict=True):
    kept = row.copy()
    kept[np.abs(row).argsort()[: row.size - round(density * row.size)]] = 0
    book = np.linspace(kept.min(), kept.max(), levels)
    zero = np.abs(book).argmin() if density < 1 else -1
    for _ in range(4):
      book = np.where(np.arange(levels) == zero, 0, book)
      mine = np.abs(kept[:, None] - book).argmin(1)
      used = set(mine) - {zero}
      book = [
        kept[mine == j].mean() if j in used else c for j, c in enumerate(book)
      ]
    np.testing.assert_allclose(got, np.asarray(book)[mine], 1e-5, 1e-7)


def test_codebook_keeps_what_it_can():
  """Its limits: as few values as levels, evenly spaced; one value; an order."""
  rng = np.random.default_rng(3)
  few = rng.choice([-2, 1, 4], (2, 128)).astype(np.float32)
  np.testing.assert_array_equal(decoded(jd.codebook(3), few), few)
  sparse = np.where(rng.uniform(size=few.shape) < 0.1, 2 * few - 4, 0)
  for code in (jd.codebook(4, density=0.2), jd.codebook(16)):
    np.testing.assert_allclose(decoded(code, sparse), sparse, 1e-6)
  same = np.full((2, 128), 0.3, np.float32)
  np.testing.assert_allclose(decoded(jd.codebook(3), same), same, 1e-6)
  order = rng.permutation(128)
  for code in (jd.codebook(3), jd.codebook(3, density=0.2)):
    y = decoded(code, data()[:, order])
    np.testing.assert_allclose(y, decoded(code, data())[:, order], 1e-5)


def test_sign():
  x = data()
  x[0, :5] = 0
  expected = np.where(x >= 0, 1, -1) * np.abs(x).mean(1, keepdims=True)
  np.testing.assert_allclose(decoded(jd.sign(), x), expected, rtol=1e-6)


def test_float4():
  x = data()
  s = np.abs(x).max(1, keepdims=True).astype(np.float64)
  exponents = nearest(np.log2(np.abs(x) / s), np.arange(-7.0, 1))
  expected = np.where(exponents < -6, 0, np.sign(x) * s * 2**exponents)
  np.testing.assert_array_equal(decoded(jd.float4(), x), expected)


def test_float4_is_the_identity_on_its_grid():
  grid = np.concatenate([[0], 2.0 ** -np.arange(7)])
  grid = np.tile(np.concatenate([grid, -grid]), 8)
  x = np.outer([1, 0.3, 7e-9, 3.3e38, 1e-30], grid).astype(np.float32)
  np.testing.assert_array_equal(decoded(jd.float4(), x), x)


@pytest.mark.parametrize(
  'code', [jd.float4(), jd.float8(), jd.quantize(bits=4), jd.quantize(bits=2)]
)
def test_negated_blocks_decode_negated(code):
  x = data()
  np.testing.assert_array_equal(decoded(code, -x), -decoded(code, x))


def test_float8():
  x = data()
  normal = [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)][:-1]
  grid = np.array([m * 2.0**-9 for m in range(8)] + normal)
  assert grid.max() == 448
  s = np.abs(x).max(1, keepdims=True).astype(np.float64) / 448
  expected = np.sign(x) * nearest(np.abs(x) / s, grid) * s
  np.testing.assert_allclose(decoded(jd.float8(), x), expected, rtol=1e-6)


def test_ternary():
  x = data()
  s = np.abs(x).max(1, keepdims=True)
  expected = s * np.sign(x) * (uniform(x) < np.abs(x) / s)
  np.testing.assert_array_equal(decoded(jd.ternary(), x), expected)


def test_natural():
  x = data()
  fraction, exponent = np.frexp(x.astype(np.float64))
  carried = 2 * np.abs(fraction) - 1 + uniform(x) >= 1
  expected = np.sign(x) * 2.0 ** (exponent - 1 + carried)
  np.testing.assert_array_equal(decoded(jd.natural(), x), expected)


def test_natural_drops_small_numbers_without_bias():
  # The largest is 1, so the smallest power coded is 2**-126.
  x = np.full((2, 4096), 0.3 * 2**-100, np.float32)
  x[0, 1:] *= 2.0**20
  x[1, 1:] *= 2.0**-26  # 0.3 * 2**-126 is a subnormal number.
  x[:, 0] = 1
  y = decoded(jd.natural(), x)
  assert set(np.unique(y[1, 1:].view(np.uint32))) == {0, 1 << 23}
  rate = (y[1, 1:].view(np.uint32) != 0).mean()
  assert abs(rate - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 4096)  # 4 deviations.

  x = np.full((1, 4096), 0.3 * 2**-100, np.float32)
  x[0, 0] = 2.0**24  # Now the smallest power is 2**-102, and x 1.2 of it.
  y = decoded(jd.natural(), x)
  smallest = 2.0 ** (24 - 126)
  assert set(np.unique(y[0, 1:])) <= {smallest, 2 * smallest}
  x[0, 0] = 2.0**26  # Now it is 2**-100.
  y = decoded(jd.natural(), x)[0, 1:] / 2.0**-100
  assert set(np.unique(y)) == {0, 1}
  assert abs(y.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 4096)


@pytest.mark.parametrize('density', [0.1, 1.0])
def test_top_k(density):
  x = np.round(data() * 2) / 2  # With ties.
  k = round(density * 128)
  expected = np.zeros_like(x)
  for row, out in zip(x, expected, strict=True):
    for i in sorted(range(128), key=lambda i: (-abs(row[i]), i))[:k]:
      out[i] = row[i]
  np.testing.assert_array_equal(decoded(jd.top_k(density), x), expected)
  rounded = expected.astype(ml_dtypes.bfloat16).astype(np.float32)
  np.testing.assert_array_equal(
    decoded(jd.top_k(density, values='bfloat16'), x), rounded
  )


def test_top_k_of_density_1_is_the_identity():
  np.testing.assert_array_equal(decoded(jd.top_k(1.0), data()), data())


def test_global_top_k_is_one_choice():
  x = data(1, 1001)
  y = decoded(jd.global_top_k(0.07), x)
  limit = np.sort(np.abs(x).ravel())[-71]  # 70.07, rounded up.
  np.testing.assert_array_equal(y, np.where(np.abs(x) >= limit, x, 0))


def test_random_k_keeps_the_same_random_places_of_all_blocks():
  x, counts = data(), np.zeros(128)
  decode = jax.jit(
    jax.vmap(
      lambda seed: (code := jd.random_k(0.25).at(seed)).decode(
        code.encode(jnp.asarray(x), KEY)
      )
    )
  )
  ys = np.asarray(decode(jax.random.split(KEY, 400)))
  for y in ys:
    kept = y != 0
    assert (kept == kept[0]).all()
    assert kept[0].sum() == 32
    np.testing.assert_array_equal(y, x * kept)
    counts += kept[0]
  # Each place in a quarter of 400 draws, to within five deviations.
  assert np.abs(counts - 100).max() < 5 * np.sqrt(400 * 3 / 16)


@pytest.mark.parametrize('family', ['count', 'gaussian'])
def test_sketch_is_a_random_matrix_and_its_transpose(family):
  code, x = jd.sketch(0.25, family=family, block_size=128), data()
  matrices = [
    code.at(key).encode(np.eye(128, dtype=np.float32), KEY).values
    for key in jax.random.split(jax.random.key(2), 2)
  ]
  r = np.asarray(matrices[0], np.float64)
  if family == 'count':  # Each number once, with either sign.
    assert (np.abs(r).sum(1) == 1).all() and (np.abs(r).max(1) == 1).all()
    assert 40 < (r.sum(1) > 0).sum() < 88 and (np.abs(r).sum(0) > 0).sum() > 25
  else:  # 4096 numbers: within five standard errors.
    assert abs(r.mean()) < 5 / np.sqrt(32) / 64
    assert abs(32 * r.var() - 1) < 5 * np.sqrt(2) / 64
  assert (np.asarray(matrices[1]) != r).mean() > 0.04
  got = decoded(code.at(jax.random.split(jax.random.key(2), 2)[0]), x)
  np.testing.assert_allclose(
    got, x @ r @ r.T, rtol=1e-5, atol=1e-5 * np.abs(x).max()
  )


def test_unbiased_random_k_scales_up():
  x, seed = data(), jax.random.key(0)
  plain = decoded(jd.random_k(0.25).at(seed), x)
  scaled = decoded(jd.random_k(0.25, unbiased=True).at(seed), x)
  np.testing.assert_array_equal(scaled, 4 * plain)


def test_chained_codes_what_the_first_keeps():
  x = data()
  kept = decoded(jd.top_k(0.1), x)
  y = decoded(jd.chained(jd.top_k(0.1), jd.sign()), x)
  scale = np.abs(kept).sum(1, keepdims=True) / 13
  np.testing.assert_allclose(y, np.sign(kept) * scale, rtol=1e-6)


def test_chained_with_the_identity_changes_nothing():
  x = data()
  code = jd.chained(jd.top_k(0.1), jd.identity())
  np.testing.assert_array_equal(decoded(code, x), decoded(jd.top_k(0.1), x))
  assert code.contraction == jd.top_k(0.1).contraction


def test_rotated_identity_is_the_identity():
  code = jd.rotated(jd.identity()).at(jax.random.key(2))
  # Two rotations of 128 float32 numbers of at most 16.
  np.testing.assert_allclose(decoded(code, data()), data(), atol=2e-5)


def test_rotation_spreads_what_stands_out():
  x = np.random.default_rng(0).standard_normal((4, 1024)).astype(np.float32)
  x[:, 0] = 300

  def error(code):
    return np.mean((decoded(code.at(KEY), x) - x)[:, 1:] ** 2)

  plain = jd.quantize(bits=4)
  # Plain, the rest of the block is below half a step and vanishes.
  assert error(plain) > 0.9
  assert error(jd.rotated(plain)) < 0.9
