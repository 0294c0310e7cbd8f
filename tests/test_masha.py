"""MASHA1 and MASHA2 against NumPy, and in their limits."""

import jax
import jax.numpy as jnp
import numpy as np
import public
import pytest

import jaxdist as jd
from jaxdist.transforms import masha

WORKERS, SIZE = 4, 8  # Half of the numbers are one player's.
RATE = 0.05
MEAN = jd.mean(public.AXIS)
TOP = jd.mean(public.AXIS, jd.global_top_k(0.25), 'gather')


def game(workers=WORKERS):
  """Operators M z + b of bilinear games with a curved bottom."""
  rng = np.random.default_rng(0)
  half = SIZE // 2
  matrices = np.zeros((workers, SIZE, SIZE))
  mixed = rng.normal(size=(workers, half, half)) + 2 * np.eye(half)
  matrices[:, :half, half:] = mixed
  matrices[:, half:, :half] = -mixed.transpose(0, 2, 1)
  matrices += 0.5 * np.eye(SIZE)
  return matrices, 3 * rng.normal(size=(workers, SIZE))


def walk(tx, matrices, offsets, steps, start=None):
  """Where the operator is evaluated, (steps, size), and the last state."""
  start = jnp.zeros(SIZE) if start is None else jnp.float32(start)

  def worker(matrix, offset):
    def step(carry, _):
      z, state = carry
      updates, state = tx.update(matrix @ z + offset, state, z)
      return (z + updates, state), z

    (_, state), path = jax.lax.scan(step, (start, tx.init(start)), None, steps)
    return path, state

  run = jax.jit(jax.vmap(worker, axis_name=public.AXIS))
  path, state = run(jnp.float32(matrices), jnp.float32(offsets))
  np.testing.assert_array_equal(path[0], path[-1])
  return np.asarray(path[0]), state


def paper(matrices, offsets, keep, code, feedback, steps):
  """The paper's loop; gives the points at which operators are evaluated."""
  operators = lambda z: matrices @ z + offsets
  z = w = np.zeros(SIZE)
  own, path = operators(w), [w]
  error = np.zeros((len(matrices), SIZE))
  count = 0
  while len(path) < steps:
    half = keep * z + (1 - keep) * w - RATE * own.mean(0)
    path.append(half)
    message = RATE * (operators(half) - own) + (error if feedback else 0)
    sent = np.stack([code(m) for m in message])
    error = message - sent
    z = half - sent.mean(0)
    if masha.refreshes(0, jnp.int32(count), keep):
      w, own = z, operators(z)
      path.append(w)
    count += 1
  return np.stack(path[:steps])


def top(x):
  """The two largest of eight."""
  return np.where(np.isin(np.arange(SIZE), np.argsort(-abs(x))[:2]), x, 0)


@pytest.mark.parametrize('method', ['masha1', 'masha2'])
def test_it_is_the_paper(method):
  problem, keep, steps = game(), 0.6, 40
  if method == 'masha1':
    path, _ = walk(jd.masha1(RATE, MEAN, keep=keep), *problem, steps)
    want = paper(*problem, keep, lambda x: x, False, steps)
  else:
    path, _ = walk(jd.masha2(RATE, TOP, keep=keep), *problem, steps)
    want = paper(*problem, keep, top, True, steps)
  np.testing.assert_allclose(path, want, rtol=1e-4, atol=1e-4)


def test_without_loss_and_memory_it_is_extragradient():
  matrices, offsets = game()
  operator = lambda z: matrices.mean(0) @ z + offsets.mean(0)
  path, _ = walk(jd.masha1(RATE, MEAN, keep=0.0), matrices, offsets, 20)
  z = np.zeros(SIZE)
  for i in range(10):
    half = z - RATE * operator(z)
    np.testing.assert_allclose(path[2 * i], z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(path[2 * i + 1], half, rtol=1e-4, atol=1e-5)
    z = z - RATE * operator(half)


def test_without_loss_both_are_the_same():
  problem = game()
  first, _ = walk(jd.masha1(RATE, MEAN), *problem, 60)
  second, state = walk(jd.masha2(RATE, MEAN), *problem, 60)
  np.testing.assert_array_equal(first, second)
  np.testing.assert_array_equal(state.residual.value, 0)


def test_compressed_it_converges_and_stays_at_the_solution():
  matrices, offsets = game()
  # Workers of the same offset have nothing to disagree about there.
  solution = -np.linalg.solve(matrices.mean(0), offsets.mean(0))
  assert abs(matrices @ solution + offsets).max() > 1
  path, _ = walk(jd.masha2(RATE, TOP), matrices, offsets, 4000)
  np.testing.assert_allclose(path[-1], solution, atol=1e-4)
  path, _ = walk(jd.masha2(RATE, TOP), matrices, offsets, 50, solution)
  # The solution's own rounding to float32 is all that moves it.
  np.testing.assert_allclose(path, np.tile(solution, (50, 1)), atol=1e-4)


def test_values_that_are_not_finite_are_dropped_by_all():
  matrices, offsets = game()
  bad = offsets.copy()
  bad[1, 2] = np.nan
  path, state = walk(jd.masha2(RATE, TOP), matrices, bad, 5)
  np.testing.assert_array_equal(path, 0)
  np.testing.assert_array_equal(state.skipped, 5)


def test_bytes_are_those_of_both_kinds_of_updates(make_mesh):
  where = {'axis': public.AXIS, 'mesh': make_mesh(8)}
  params = {'w': jnp.ones((24, 20))}
  tx = jd.masha2(0.1, TOP, keep=0.75)
  step = jd.train_step(lambda p, x: jnp.mean((x @ p['w']) ** 2), tx, **where)
  traffic = jd.traffic(step, jd.init(tx, params, **where), jnp.ones((8, 24)))
  # Each step of the point takes one update, and a quarter of them one more.
  claimed = TOP.bytes_sent(params, 8) * 4 / 5 + MEAN.bytes_sent(params, 8) / 5
  # One bit tells whether all are finite.
  assert traffic.bytes_a_step == pytest.approx(claimed, abs=16)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: jd.masha1(0.1, TOP), 'unbiased code.*Use jd.masha2'),
    (
      lambda: jd.masha2(0.1, jd.mean('data', jd.random_k(0.1, unbiased=True))),
      'needs a code that contracts',
    ),
    (
      lambda: jd.masha1(0.1, MEAN, keep=1.0),
      r'keep must be in \[0, 1\), got 1',
    ),
    (lambda: jd.masha2(0.1, MEAN, seed=-1), 'seed must be'),
  ],
)
def test_bad_options_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
