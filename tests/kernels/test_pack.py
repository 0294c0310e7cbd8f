"""Packing: nothing is lost, and there are no gaps."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdist.kernels.pack import api


def draw(bits, shape, seed=0):
  numbers = np.random.default_rng(seed).integers(0, 2**bits, shape, np.uint64)
  return numbers.astype(np.uint32)


def check(bits, codes, words, unpacked):
  rows, count = codes.shape
  assert words.shape == (rows, -(-count * bits // 32)), bits
  np.testing.assert_array_equal(unpacked, codes, err_msg=f'{bits} bits')
  # Each bit of each number is in the words once, and nothing else is.
  np.testing.assert_array_equal(
    np.bitwise_count(np.asarray(words)).sum(1), np.bitwise_count(codes).sum(1)
  )


# These compile many programs that run once.
QUICK = {'xla_backend_optimization_level': 0}


@functools.partial(jax.jit, static_argnums=1, compiler_options=QUICK)
def there_and_back(codes, bits):
  words = api.pack(codes, bits)
  return words, api.unpack(words, bits, codes.shape[1])


@pytest.mark.parametrize('bits', range(1, 33))
def test_every_width(bits):
  # Whole groups and a remainder at every width.
  codes = draw(bits, (3, 77))
  check(bits, codes, *there_and_back(codes, bits))


@hypothesis.settings(max_examples=6, deadline=None, derandomize=True)
@hypothesis.given(st.integers(1, 32), st.integers(1, 200), st.integers(0, 99))
def test_any_width_and_count(bits, count, seed):
  codes = draw(bits, (2, count), seed)
  check(bits, codes, *there_and_back(codes, bits))


@pytest.mark.parametrize('count', [1, 20, 21, 128])
def test_trits(count):
  trits = draw(8, (3, count)) % 3
  words = jax.jit(api.pack_trits)(trits)
  assert words.shape == (3, -(-count // 20))
  np.testing.assert_array_equal(api.unpack_trits(words, count), trits)


def test_largest_trits_fit():
  trits = jnp.full((1, 20), 2, jnp.uint32)
  assert int(api.pack_trits(trits)[0, 0]) == 3**20 - 1


def test_bad_arguments():
  codes = jnp.zeros((2, 8), jnp.uint32)
  with pytest.raises(ValueError, match=r'bits must be an integer from 1.*33'):
    api.pack(codes, 33)
  with pytest.raises(ValueError, match='words must have 2 columns for 8 numbe'):
    api.unpack(codes, 8, 8)
  with pytest.raises(ValueError, match=r'words must have 1 columns.* got 8'):
    api.unpack_trits(codes, 8)
