"""Selection, rotation, and what the other ops refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from simulated import simulated

from jaxdist.kernels.hadamard import api as rotation
from jaxdist.kernels.hadamard import reference as hadamard
from jaxdist.kernels.hadamard import tpu
from jaxdist.kernels.orthonormalize.api import orthonormalize
from jaxdist.kernels.quantize import api as quantization
from jaxdist.kernels.quantize.formats import FORMATS
from jaxdist.kernels.top_k import api as selection


def test_ties_go_to_the_lower_index():
  x = jnp.array([[1.0, -2.0, 2.0, 1.0, -2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
  values, indices = selection.top_k(x, 4)
  np.testing.assert_array_equal(indices, [[1, 2, 4, 0], [0, 1, 2, 3]])
  np.testing.assert_array_equal(values, [[-2, 2, -2, 1], [0, 0, 0, 0]])


def test_selection_is_that_of_a_stable_sort():
  rng = np.random.default_rng(0)
  x = rng.integers(-9, 10, (16, 64)).astype(np.float32)  # Many ties.
  _, indices = selection.top_k(jnp.asarray(x), 20)
  order = np.argsort(-np.abs(x), axis=1, kind='stable')[:, :20]
  np.testing.assert_array_equal(indices, order)


def test_nan_is_selected_first():
  x = jnp.array([[1.0, jnp.inf, -jnp.nan, 3.0]])
  values, _ = selection.top_k(x, 2)
  assert np.isnan(values).sum() == 1
  assert np.isinf(values).sum() == 1


def test_scatter_puts_back_what_was_selected():
  x = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)
  np.testing.assert_array_equal(
    selection.scatter(*selection.top_k(jnp.asarray(x), 32), 32), x
  )


@pytest.mark.parametrize('size', [1, 2, 8, 128, 1024])
def test_hadamard_matrix(size):
  i = np.arange(size)
  matrix = (-1.0) ** np.bitwise_count(i[:, None] & i) / np.sqrt(size)
  x = np.random.default_rng(size).standard_normal((3, size))
  run = jax.jit(hadamard.hadamard)
  y = run(x.astype(np.float32))
  # Sums of `size` float32 products, each rounded to 2**-24.
  np.testing.assert_allclose(y, x @ matrix, atol=1e-5)
  np.testing.assert_allclose(run(y), x, atol=1e-5)


@pytest.mark.parametrize(
  ('there', 'size'), [('rotate', 512), ('unrotate', 128)]
)
def test_rotation_on_tpu_is_the_definition(there, size):
  key = jax.random.key(3)
  x = np.random.default_rng(0).standard_normal((70, size)).astype(np.float32)
  x[3], x[4, 5], x[5], x[6, 7] = 0, 3e38, x[5] * 1e-30, np.nan
  y = np.asarray(simulated(getattr(tpu, there), x, key))
  want = np.asarray(getattr(hadamard, there)(jnp.asarray(x), key))
  largest = np.abs(want).max(axis=1, keepdims=True)
  np.testing.assert_array_equal(np.isnan(y).any(1), np.arange(70) == 6)
  # Sums of `size` float32 numbers in another order.
  assert (np.abs(y - want) <= 4e-6 * largest)[np.arange(70) != 6].all()


def test_rotation_flips_signs_then_multiplies():
  key = jax.random.key(3)
  basis = jnp.eye(8)
  rotated = np.asarray(rotation.rotate(basis, key))
  plain = np.asarray(hadamard.hadamard(basis))
  flips = rotated[:, 0] / plain[:, 0]
  assert set(np.round(flips)) == {-1.0, 1.0}
  np.testing.assert_allclose(rotated, flips[:, None] * plain, atol=1e-6)
  np.testing.assert_allclose(
    rotation.unrotate(jnp.asarray(rotated), key), basis, atol=1e-6
  )


def test_one_number():
  x, key = jnp.array([[-3.0]]), jax.random.key(0)
  for format in FORMATS:
    words, scale = quantization.quantize(x, format)
    back = quantization.dequantize(words, scale, format, 1)
    np.testing.assert_allclose(back, x, rtol=1e-6)
  assert selection.top_k(x, 1) == (x, 0)
  assert abs(rotation.rotate(x, key)) == 3
  assert orthonormalize(x) == -1


def test_bad_arguments():
  x = jnp.zeros((2, 12))
  with pytest.raises(ValueError, match=r'x must have rows .*power of two.* 12'):
    rotation.rotate(x, jax.random.key(0))
  with pytest.raises(ValueError, match=r'y must have rows .*power of two.* 12'):
    rotation.unrotate(x, jax.random.key(0))
  with pytest.raises(
    ValueError, match=r'k must be an integer from 1 to 12.*13'
  ):
    selection.top_k(x, 13)
  places = jnp.zeros((2, 3), jnp.uint32)
  with pytest.raises(
    ValueError, match=r'size must be an integer from 3 .*got 2'
  ):
    selection.scatter(x[:, :3], places, 2)
