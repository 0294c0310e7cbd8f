"""Noise that differs by worker, step and leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdist as jd

AXIS, WORKERS = 'data', 4


def noise_of(tx, steps=2):
  """What is added to zeros, as leaves of (workers, steps, ...)."""
  zeros = {'a': jnp.zeros((64, 64)), 'b': jnp.zeros((64, 64))}

  def worker(_):
    state, found = tx.init(zeros), []
    for _ in range(steps):
      updates, state = tx.update(zeros, state)
      found.append(updates)
    return jax.tree.map(lambda *each: jnp.stack(each), *found)

  run = jax.vmap(worker, axis_name=AXIS)
  return jax.device_get(jax.jit(run)(jnp.arange(WORKERS)))


def test_draws_are_normal_and_independent():
  tx = jd.worker_noise(AXIS, 0.5, seed=3)
  found = noise_of(tx)
  rows = np.stack(list(found.values())).reshape(-1, 64 * 64)
  # Four standard errors; sixteen rows in all.
  np.testing.assert_allclose(rows.mean(1), 0, atol=4 * 0.5 / 64)
  np.testing.assert_allclose(rows.std(1), 0.5, rtol=4 / np.sqrt(2) / 64)
  between = np.corrcoef(rows) - np.eye(len(rows))
  assert np.abs(between).max() < 5 / 64
  for a, b in zip(found.values(), noise_of(tx).values(), strict=True):
    np.testing.assert_array_equal(a, b)
  other = noise_of(jd.worker_noise(AXIS, 0.5, seed=4))
  assert (other['a'] != found['a']).mean() > 0.99


def test_none_is_the_same_bits():
  x = {'a': jnp.array([1.0, -0.0, 1e-40])}
  tx = jd.worker_noise(AXIS, 0.0)
  updates, state = tx.update(x, tx.init(x))
  assert updates['a'] is x['a'] and state.count == 1


def test_what_cannot_be():
  for stddev in (-1.0, float('inf'), float('nan')):
    with pytest.raises(ValueError, match='stddev must be finite and not'):
      jd.worker_noise(AXIS, stddev)
  with pytest.raises(ValueError, match='seed must be'):
    jd.worker_noise(AXIS, 1.0, seed=-1)
