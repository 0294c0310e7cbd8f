"""Selection: the TPU's networks against the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from simulated import simulated

from jaxdist.kernels.top_k import (
  api,
  cpu,
  networks,
  reference,
  scatter_tpu,
  threshold,
  tpu,
)


def hard_rows(rows, size):
  """Many ties, and rows of all kinds."""
  rng = np.random.default_rng(0)
  x = np.round(4 * rng.standard_normal((rows, size))) / 4
  x[0] = 0
  x[1, 30] = 3e38
  x[2] = np.where(x[2] > 0, 1, -1)
  x[3, [5, 9]] = [np.nan, np.inf]
  x[4] *= 1e-40
  x[5] = -0.0
  return jnp.asarray(x, jnp.float32)


def by_place(values, indices):
  order = np.argsort(indices, axis=1)
  return [
    np.take_along_axis(np.asarray(a), order, 1) for a in (values, indices)
  ]


@pytest.mark.parametrize(
  ('rows', 'size', 'k', 'feedback', 'gathers'),
  [
    # Eight blocks abreast; lists of 16, two registers deep.
    (520, 128, 10, True, True),
    # Two blocks, of two columns; as chips before v5 do it.
    (131, 256, 1, False, False),
    # Lists of 64, seven registers deep; a row of three registers.
    pytest.param(7, 384, 51, True, True, marks=pytest.mark.slow),
  ],
)
def test_tpu_form_is_the_definition(
  rows, size, k, feedback, gathers, monkeypatch
):
  monkeypatch.setattr(tpu, 'gathers_sublanes', lambda: gathers)
  x = hard_rows(rows, size)
  arrays, name = (x,), 'top_k'
  if feedback:
    arrays += (jnp.where(jnp.abs(x) > 1, 0, jnp.roll(x, 1, axis=1)),)
    name = 'top_k_with_feedback'
  got = simulated(getattr(tpu, name), *arrays, k=k)
  want = jax.jit(lambda *a: getattr(reference, name)(*a, k=k))(*arrays)
  pairs = zip(by_place(*got[:2]), by_place(*want[:2]), strict=True)
  for a, b in [*pairs, *zip(got[2:], want[2:], strict=True)]:
    a, b = np.asarray(a), np.asarray(b)
    np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize(('size', 'k'), [(256, 1), (1152, 10), (384, 51)])
def test_cpu_form_is_the_definition(size, k):
  # Groups of several numbers and of one, and rows that fill no block.
  x = hard_rows(131, size)
  x = jnp.concatenate([x, jnp.full((2, size), jnp.nan)])
  residual = jnp.where(jnp.abs(x) > 1, 0, jnp.roll(x, 1, axis=1))
  got = jax.jit(lambda *a: cpu.top_k_with_feedback(*a, k=k))(x, residual)
  want = reference.top_k_with_feedback(x, residual, k=k)
  for a, b in zip(by_place(*got[:2]), by_place(*want[:2]), strict=True):
    np.testing.assert_array_equal(a, b)
  np.testing.assert_array_equal(got[2], want[2])


@pytest.mark.parametrize('k', [1, 999, 40_000])
def test_long_rows_are_the_definition(k):
  x = hard_rows(6, 40_000)
  x = x.at[3].set(jnp.where(jnp.arange(40_000) % 3, 0.25, jnp.nan))
  got = jax.jit(lambda x: threshold.top_k(x, k=k))(x)
  want = reference.top_k(x, k=k)
  np.testing.assert_array_equal(got[1], np.sort(want[1], axis=1))
  np.testing.assert_array_equal(got[0], by_place(*want)[0])


@pytest.mark.parametrize(
  ('shape', 'sorts'), [((256, 1024), 0), ((1, 2**17), 0), ((8, 1024), 1)]
)
def test_large_arrays_on_cpu_are_not_sorted(shape, sorts):
  program = jax.jit(lambda x: api.top_k(x, 10)).lower(jnp.zeros(shape))
  assert program.as_text().count('chlo.top_k(') == sorts


def test_what_other_forms_cannot_take():
  with pytest.raises(NotImplementedError, match='at least 262144 numbers in'):
    api.top_k(jnp.zeros((2, 1024)), 10, implementation='cpu')
  with pytest.raises(NotImplementedError, match='at least 131072 numbers, not'):
    api.top_k(jnp.zeros((2, 1024)), 10, implementation='threshold')


def test_mean_on_tpu_is_the_definition():
  rng = np.random.default_rng(1)
  x = rng.standard_normal((3, 130, 256)).astype(np.float32)
  values, indices = jax.vmap(lambda x: reference.top_k(x, k=5))(x)
  want = reference.scatter_mean(values, indices, size=256)
  got = simulated(scatter_tpu.scatter_mean, values, indices, size=256)
  np.testing.assert_array_equal(got, want)  # Two sums, in the same order.
  got = simulated(scatter_tpu.scatter, values[0], indices[0], size=256)
  want = reference.scatter(values[0], indices[0], size=256)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('length', [1, 2, 4, 16, 64])
def test_networks_sort(length):
  # By the principle of zeros and ones: what sorts all of these sorts all.
  n = min(2**length, 512)
  rng = np.random.default_rng(length)
  columns = (
    rng.integers(0, 2, (n, length))
    if length > 9
    else (np.arange(n)[:, None] >> np.arange(length) & 1)
  )
  items = [jnp.asarray(c) for c in columns.T]
  expected = -np.sort(-columns, axis=1)
  np.testing.assert_array_equal(np.stack(networks.in_order(items), 1), expected)
  other = rng.integers(0, 2, columns.shape)
  both = networks.merged(
    networks.in_order(items),
    networks.in_order([jnp.asarray(c) for c in other.T]),
  )
  expected = -np.sort(-np.concatenate([columns, other], 1), axis=1)
  np.testing.assert_array_equal(np.stack(both, 1), expected[:, :length])


def test_feedback_is_what_is_left():
  x, residual = jnp.array([[1.0, -3, 2, 0]]), jnp.array([[0.0, 0.5, 0, 4]])
  values, indices, left = api.top_k_with_feedback(x, residual, 2)
  np.testing.assert_array_equal(sorted(values[0].tolist()), [-2.5, 4])
  np.testing.assert_array_equal(sorted(indices[0].tolist()), [1, 3])
  np.testing.assert_array_equal(left, [[1, 0, 2, 0]])


def test_programs_for_tpus_have_the_kernels():
  def program(x, residual):
    values, indices, residual = api.top_k_with_feedback(x, residual, 1)
    mean = api.scatter_mean(values[None], indices[None], 1024)
    return residual, mean

  x = jax.ShapeDtypeStruct((2, 200, 1024), jnp.float32)
  exported = jax.export.export(jax.jit(jax.vmap(program)), platforms=['tpu'])(
    x, x
  )
  assert exported.mlir_module().count('tpu_custom_call') == 2


def test_what_a_tpu_cannot_take():
  with pytest.raises(NotImplementedError, match=r'multiple of 128.*not 200'):
    api.top_k(jnp.zeros((2, 200)), 2, implementation='tpu')
  with pytest.raises(NotImplementedError, match=r'k up to 64.* not 65 of 1024'):
    api.top_k(jnp.zeros((2, 1024)), 65, implementation='tpu')
