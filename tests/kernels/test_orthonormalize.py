"""Orthonormal columns: of bad matrices too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdist.kernels.orthonormalize import api

run = jax.jit(api.orthonormalize)


def matrix(new, rows=300, cols=6):
  """Columns along the first one, but for a part that is new in each."""
  rng = np.random.default_rng(0)
  basis = np.linalg.qr(rng.standard_normal((rows, cols)))[0]
  mixed = np.triu(rng.uniform(0.5, 1, (cols, cols))) * new
  mixed[0] = 1
  return (basis @ mixed).astype(np.float32)


@pytest.mark.parametrize('new', [1, 1e-3, 1e-5])
def test_columns_are_those_of_gram_schmidt(new):
  x = matrix(new)
  x *= np.float32(10.0) ** [30, -30, 0, 3, -3, 8]  # Scales don't matter.
  q = np.asarray(run(x), np.float64)
  assert np.abs(q.T @ q - np.eye(6)).max() < 1e-6
  wide = x.astype(np.float64) / np.abs(x).max(0)
  want, r = np.linalg.qr(wide)
  # What is new is known to a rounding of the whole.
  np.testing.assert_allclose(q, want * np.sign(np.diag(r)), atol=5e-7 / new)


def test_what_has_no_direction():
  x = matrix(0.1)
  x[:, 1] = 0
  x[:, 3] = 3 * x[:, 2]
  x[:, 5] = x[:, 0] - 2 * x[:, 4]
  q = np.asarray(run(x), np.float64)
  square = q.T @ q
  np.testing.assert_allclose(
    square, np.diag(np.round(np.diag(square))), atol=1e-6
  )
  assert np.diag(square)[1] == 0
  np.testing.assert_allclose(q @ (q.T @ x), x, atol=1e-6)  # Nothing is lost.
  np.testing.assert_array_equal(run(np.zeros_like(x)), 0)


def test_not_finite():
  x = matrix(0.1)
  x[7, 2] = np.inf
  assert np.isnan(run(x)).any(axis=0).all()


def test_bad_arguments():
  with pytest.raises(
    ValueError, match=r'x must have at least.*got shape \(2, 3'
  ):
    api.orthonormalize(jnp.zeros((2, 3)))
