"""What compressors claim of themselves, measured."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tables import BLOCK, COMPRESSORS

import jaxdist as jd

KEYS = jax.random.split(jax.random.key(21), (64, 2))


def blocks():
  """Blocks of many kinds, among them the worst for uniform grids."""
  rng = np.random.default_rng(2)
  gaussian = rng.standard_normal(BLOCK)
  spiky = 0.01 * rng.standard_normal(BLOCK)
  spiky[5] = 10
  sparse = gaussian * (rng.uniform(size=BLOCK) < 0.05)
  one = np.zeros(BLOCK)
  one[77] = -2
  heavy = rng.standard_normal(BLOCK) * np.exp(2 * rng.standard_normal(BLOCK))
  worst = []
  # All but one number just below where it is dropped or rounded away.
  for size in (1 / 14, 1 / 254, 2**-6.5, 2**-0.5, 2**-10 / 448, 1 / 12, 0.1):
    row = np.full(BLOCK, 0.999 * size)
    row[3] = 1
    worst.append(row)
  kinds = [gaussian, spiky, np.full(BLOCK, 3.0), sparse, one, heavy, *worst]
  return np.stack(kinds).astype(np.float32)


def draws(code, x, keys):
  """Decoded with each pair of a shared key and a worker's key."""

  def one(keys):
    seeded = code.at(keys[0])
    return seeded.decode(seeded.encode(x, keys[1]))

  return np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)


@pytest.mark.parametrize('name', COMPRESSORS)
def test_contraction(name):
  code, x = COMPRESSORS[name], blocks()
  if code.block_size is None:
    x = x.reshape(1, -1)
  error = ((draws(code, jnp.asarray(x), KEYS) - x) ** 2).sum(2)
  error /= (x.astype(np.float64) ** 2).sum(1)
  # The claim is on the expectation: allow four deviations of a mean of 64
  # draws (zero for codes that are not random), and float32's rounding.
  slack = 4 * error.std(0) / 8 + 1e-5
  assert (error.mean(0) <= 1 - code.contraction + slack).all()


@pytest.mark.parametrize('bits', [8, 4])
def test_contraction_of_quantize_is_reached(bits):
  q = {8: 127, 4: 7}[bits]
  x = np.full((1, BLOCK), 0.9999 * 0.5 / q, np.float32)
  x[0, 0] = 1
  code = jd.quantize(bits=bits, block_size=BLOCK)
  error = ((draws(code, jnp.asarray(x), KEYS[:1])[0] - x) ** 2).sum()
  np.testing.assert_allclose(error / (x**2).sum(), 1 - code.contraction, 1e-3)


@pytest.mark.parametrize(
  'name', [n for n, code in COMPRESSORS.items() if code.unbiased]
)
def test_unbiased(name):
  x = np.stack([blocks()[0], blocks()[5], np.linspace(-1, 2, BLOCK)])
  keys = jax.random.split(jax.random.key(31), (4096, 2))
  error = draws(COMPRESSORS[name], jnp.asarray(x, jnp.float32), keys) - x
  # Sums over random halves of the block, whose mean is zero to within five
  # deviations of a mean of 4096 draws (96 of them: once in 18000), or rounding.
  directions = np.random.default_rng(3).choice([0, 1], (BLOCK, 32))
  sums = error @ directions
  scale = np.abs(x).sum(1)[:, None]
  slack = 5 * sums.std(0) / np.sqrt(len(sums)) + 1e-6 * scale
  assert (np.abs(sums.mean(0)) <= slack).all()


@pytest.mark.parametrize(
  ('code', 'contraction'),
  [
    (jd.quantize(bits=2), 0.883),  # Max, 1960: distortion 0.1188.
    (jd.quantize(bits=4), 0.979),
    (jd.sign(), 2 / np.pi),
    (jd.float4(), 0.957),
    (jd.natural(), 0.918),
  ],
)
def test_error_on_a_gaussian(code, contraction):
  x = jax.random.normal(jax.random.key(0), (64, 1024))
  y = code.decode(jax.jit(code.encode)(x, jax.random.key(1)))
  kept = 1 - float(((x - y) ** 2).sum() / (x**2).sum())
  # 65536 numbers: the relative error of a mean square is about 0.5 %.
  np.testing.assert_allclose(kept, contraction, atol=0.006)
