"""NoLoCo and its pairs: formulas by hand, limits, and no all-reduce."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import public
import pytest

import jaxdist as jd
from jaxdist.outer.noloco import spread_factor

# Sums in another order, of numbers of size one.
CLOSE = {'rtol': 1e-5, 'atol': 1e-6}
PAIRS = jd.gossip(public.AXIS, 'random_pairs', seed=2)


def gradients(steps, workers, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(steps, workers, 6)).astype(np.float32)


def walk(tx, grads, start=None):
  """Parameters of each worker after each step, (workers, steps, 6)."""
  start = jnp.arange(6.0) if start is None else start
  return np.asarray(public.run(tx, grads, start, walk=True)[0])


def mixing(rounds, workers):
  """The matrix by which each round of pairs mixes, (rounds, i, j)."""

  def worker(row):
    def one(state, _):
      mixed, _, state = PAIRS.exchange(row, state)
      return state, mixed

    return jax.lax.scan(one, PAIRS.init(row), length=rounds)[1]

  run = jax.jit(jax.vmap(worker, out_axes=1, axis_name=public.AXIS))
  return np.asarray(run(jnp.eye(workers)))


@pytest.mark.parametrize('consensus', [None, 0.4])
def test_two_workers_are_the_formula_for_three_rounds(consensus):
  a, b, g = 0.5, 0.7, 0.7 if consensus is None else consensus
  tx = jd.noloco(
    optax.sgd(0.1),
    every=2,
    pairing=PAIRS,
    learning_rate=b,
    momentum=a,
    consensus=consensus,
  )
  grads = gradients(6, 2)
  path = walk(tx, grads)

  x, y = slow_x, slow_y = np.arange(6.0), np.arange(6.0)
  step_x = step_y = 0
  for turn in range(3):
    x = slow_x - 0.1 * grads[2 * turn, 0] - 0.1 * grads[2 * turn + 1, 0]
    y = slow_y - 0.1 * grads[2 * turn, 1] - 0.1 * grads[2 * turn + 1, 1]
    mean_change = (x - slow_x + y - slow_y) / 2
    mean_slow = (slow_x + slow_y) / 2
    step_x = a * step_x + b * mean_change + g * (mean_slow - slow_x)
    step_y = a * step_y + b * mean_change + g * (mean_slow - slow_y)
    slow_x, slow_y = slow_x + step_x, slow_y + step_y
    np.testing.assert_allclose(path[0, 2 * turn + 1], slow_x, **CLOSE)
    np.testing.assert_allclose(path[1, 2 * turn + 1], slow_y, **CLOSE)


@pytest.mark.parametrize('workers', [5, 8])
def test_pairs_are_matchings_that_change(workers):
  rounds = 60 * workers
  matrices = mixing(rounds, workers)
  met = collections.Counter()
  for matrix in matrices:
    np.testing.assert_array_equal(matrix, matrix.T)
    assert sorted(set(matrix.ravel())) in ([0, 0.5], [0, 0.5, 1])
    assert (matrix.diagonal() == 1).sum() == workers % 2
    pairs = np.argwhere(np.triu(matrix, 1))
    assert len(pairs) == workers // 2
    met.update(map(tuple, pairs))
  # Each kind of round is as likely: a binomial count, five sigma wide.
  kinds = workers - 1 + workers % 2
  expected, sigma = rounds / kinds, (rounds / kinds * (1 - 1 / kinds)) ** 0.5
  assert len(met) == workers * (workers - 1) // 2
  assert all(abs(n - expected) < 5 * sigma for n in met.values())


@pytest.mark.parametrize('consensus', [None, 0.3])
def test_noloco_is_the_loop(consensus):
  workers, rounds, a, b = 5, 6, 0.4, 0.6
  g = b if consensus is None else consensus
  tx = jd.noloco(
    optax.sgd(0.1, momentum=0.5),
    every=3,
    pairing=PAIRS,
    learning_rate=b,
    momentum=a,
    consensus=consensus,
  )
  grads = gradients(3 * rounds, workers)
  path = walk(tx, grads)
  slow = np.tile(np.arange(6.0), (workers, 1))
  fast, trace, step = slow, np.zeros_like(slow), np.zeros_like(slow)
  for turn, matrix in enumerate(mixing(rounds, workers)):
    for i in range(3 * turn, 3 * turn + 3):
      trace = 0.5 * trace + grads[i]
      fast = fast - 0.1 * trace
    pull = b * matrix @ (fast - slow) + g * (matrix @ slow - slow)
    step = a * step + pull
    fast = slow = slow + step
    np.testing.assert_allclose(path[:, 3 * turn + 2], slow, **CLOSE)


def test_with_the_mean_of_all_it_is_diloco_with_heavy_ball_momentum():
  grads, inner = gradients(6, 4), optax.adam(0.1)
  mean = jd.mean(public.AXIS)
  outer = optax.sgd(0.7, momentum=0.5)
  want = walk(jd.diloco(inner, outer, mean, every=2), grads)
  for consensus in (None, 1.9):
    tx = jd.noloco(inner, 2, pairing=mean, consensus=consensus)
    np.testing.assert_allclose(walk(tx, grads), want, **CLOSE)


def test_without_momentum_pairs_average_their_parameters():
  grads, inner = gradients(6, 4), optax.adam(0.1)
  tx = jd.noloco(inner, 2, pairing=PAIRS, learning_rate=1.0, momentum=0.0)
  want = walk(jd.local_sgd(inner, PAIRS, every=2), grads)
  np.testing.assert_allclose(walk(tx, grads), want, **CLOSE)


def test_pairs_keep_the_mean_of_all():
  """One round from the same parameters moves the mean as with all together."""
  grads = gradients(1, 8)
  ends = [
    walk(jd.noloco(optax.sgd(1.0), 1, pairing=pairing), grads)[:, 0].mean(0)
    for pairing in (PAIRS, jd.gossip(public.AXIS), jd.mean(public.AXIS))
  ]
  for end in ends[1:]:
    np.testing.assert_allclose(end, ends[0], **CLOSE)


def test_both_of_a_pair_get_the_same_bits():
  x = gradients(1, 8)[0]
  mixed = jax.vmap(
    lambda x: PAIRS.exchange(x, PAIRS.init(x))[0], axis_name=public.AXIS
  )(x)
  assert len(np.unique(mixed, axis=0)) == 4


def test_spread_shrinks_as_the_moments_say():
  """32 workers without gradients, from different parameters, 4 seeds."""
  workers, rounds = 32, 12
  tx = jd.noloco(optax.sgd(1.0), 1, pairing=PAIRS)

  def worker(start):
    def one(carry, _):
      p, state = carry
      updates, state = tx.update(jnp.zeros_like(p), state, p)
      p = optax.apply_updates(p, updates)
      return (p, state), p

    state = tx.init(start)
    # As if the slow parameters had drifted apart before.
    state = state._replace(
      meeting=state.meeting._replace(slow=jd.PerWorker(start))
    )
    return jax.lax.scan(one, (start, state), length=rounds)[1]

  start = np.random.default_rng(0).normal(size=(workers, 500))
  path = jax.jit(jax.vmap(worker, axis_name=public.AXIS))(
    jnp.asarray(start, jnp.float32)
  )
  spread = np.var(np.asarray(path), axis=0).mean(-1)
  measured = (spread[-1] / spread[3]) ** (1 / (rounds - 4))
  assert spread_factor(0.5, 0.7) == pytest.approx(0.70, abs=0.005)
  # A partner is never oneself: 31 others instead of infinitely many.
  assert measured == pytest.approx(spread_factor(0.5, 0.7), abs=0.04)


def test_nothing_is_reduced_over_all(make_mesh):
  where = {'axis': public.AXIS, 'mesh': make_mesh(8)}
  params = {'w': jnp.ones((24, 20)), 'b': jnp.ones(20)}
  loss = lambda p, x: jnp.mean((x @ p['w'] + p['b']) ** 2)
  for consensus, times in ((None, 1), (0.5, 2)):
    tx = jd.noloco(
      optax.adam(0.1), every=10, pairing=PAIRS, consensus=consensus
    )
    program = jd.train_step(loss, tx, **where).lower(
      jd.init(tx, params, **where), jnp.ones((8, 24))
    )
    program = program.compile()
    assert 'all-reduce' not in program.as_text()
    traffic = jd.traffic(program)
    assert {row.kind for row in traffic.rows} == {'collective-permute'}
    claimed = times * PAIRS.bytes_sent(params, 8) / 10
    assert traffic.bytes_a_step == pytest.approx(claimed, rel=1e-9)


def test_a_step_to_infinity_is_left_out():
  grads = gradients(4, 4)
  tx = jd.noloco(optax.sgd(10.0), every=2, pairing=PAIRS)
  grads[1:3, 2] = 3e38  # Each is finite, and ten of it are not.
  path, state = public.run(tx, grads, jnp.arange(6.0), walk=True)
  assert np.isfinite(path).all()
  np.testing.assert_array_equal(state.skipped.value, [0, 0, 2, 0])
  grads[1:3, 2] = 0
  np.testing.assert_allclose(walk(tx, grads), path, **CLOSE)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'momentum': 1.0}, r'momentum must be in \[0, 1\), got 1\.0'),
    ({'learning_rate': -1.0}, r'learning_rate must be at least 0, got -1'),
    ({'consensus': -0.1}, r'consensus must be at least 0, got -0\.1'),
    (
      {'momentum': 0.9},
      r'would grow 1\.1-fold .* consensus=0\.7 and mom.*0\.9',
    ),
    ({'consensus': 1.51}, r'would grow 1\.01-fold .* consensus=1\.51'),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    jd.noloco(optax.sgd(0.1), 2, pairing=PAIRS, **options)


def test_random_pairs_have_no_code():
  with pytest.raises(ValueError, match=r'compressor must be None .* sign'):
    jd.gossip(public.AXIS, 'random_pairs', jd.sign())
