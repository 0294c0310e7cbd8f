"""Levels by leaf: the choice against brute force, and changes of it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import public
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxdist as jd
from jaxdist.communicators.mean import MeanState
from jaxdist.planning.lgreco import choose_levels

WORKERS = 4


def two_shot(k):
  return jd.mean(
    public.AXIS, jd.top_k(k / 128, block_size=128), method='two_shot'
  )


SPARSE = {k: two_shot(k) for k in (4, 16, 64)}
LOW_RANK = {r: jd.low_rank_mean(public.AXIS, r) for r in (1, 2, 4)}
# 16 columns would make none of these leaves smaller.
LARGE_RANK = {r: jd.low_rank_mean(public.AXIS, r) for r in (4, 8, 16)}


def total(x, choice):
  return sum(row[j] for row, j in zip(x, choice, strict=True))


def brute_force(errors, costs, bound):
  """The least cost of any choice within the bound; infinite if none is."""
  choices = itertools.product(range(errors.shape[1]), repeat=len(errors))
  within = (c for c in choices if total(errors, c) <= bound)
  return min((total(costs, c) for c in within), default=np.inf)


@st.composite
def tables(draw, elements):
  shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
  return tuple(draw(hnp.arrays(float, shape, elements=e)) for e in elements)


@given(
  tables((st.integers(0, 20).map(float), st.integers(0, 9).map(float))),
  st.integers(0, 80).map(float),
)
def test_choice_is_the_best_of_all(table, bound):
  errors, costs = table
  best = brute_force(errors, costs, bound)
  if np.isinf(best):
    with pytest.raises(ValueError, match='bound must be at least'):
      choose_levels(errors, costs, bound)
    return
  # Whole numbers are whole parts of the bound: nothing is rounded.
  choice = choose_levels(errors, costs, bound, resolution=max(1, int(bound)))
  assert total(errors, choice) <= bound
  assert total(costs, choice) == best


@given(
  tables((st.floats(0, 1), st.integers(0, 9).map(float))),
  st.just(1.0) | st.floats(0.5, 2),
)
def test_rounding_keeps_the_bound_and_costs_a_part_a_row(table, share):
  errors, costs = table
  bound = share * errors[:, 0].sum()
  if np.isinf(brute_force(errors, costs, bound)):
    return
  choice = choose_levels(errors, costs, bound, resolution=10)
  assert total(errors, choice) <= bound * (1 + 1e-9)
  smaller = bound * (1 - len(errors) / 10)
  assert total(costs, choice) <= brute_force(errors, costs, smaller)
  for same in range(errors.shape[1]):
    if errors[:, same].sum() <= bound:
      assert total(costs, choice) <= costs[:, same].sum()
  assert choice == choose_levels(4 * errors, costs, 4 * bound, resolution=10)


def test_errors_are_those_of_the_codes():
  rng = np.random.default_rng(0)
  tree = {
    'a': rng.normal(size=(8, 128)).astype(np.float32),
    'b': rng.normal(size=(16, 64)).astype(np.float32),
    'empty': jnp.zeros((0, 3)),
  }
  a, b = tree['a'], tree['b']
  rows = [np.sort(np.abs(x.reshape(8, 128)))[:, ::-1] for x in (a, b)]
  expected = [[np.sqrt((x[:, k:] ** 2).sum()) for k in SPARSE] for x in rows]
  found = jax.jit(lambda t: jd.level_errors(SPARSE, t))(tree)
  np.testing.assert_allclose(found, expected, rtol=1e-5)

  singular = [np.linalg.svd(x, compute_uv=False) for x in (a, b)]
  least = [[np.sqrt((s[r:] ** 2).sum()) for r in LOW_RANK] for s in singular]
  found = np.asarray(jax.jit(lambda t: jd.level_errors(LOW_RANK, t))(tree))
  # Of noise; a few power iterations end near the best subspace.
  assert np.all(found > 0.999 * np.array(least))
  assert np.all(found < 1.1 * np.array(least))

  errors = np.array(expected)
  labels = jd.lgreco(SPARSE, errors, tree, uniform=16, workers=WORKERS)
  assert jax.tree.structure(labels) == jax.tree.structure(tree)
  loose = jd.lgreco(
    SPARSE, errors, tree, uniform=16, workers=WORKERS, tolerance=100.0
  )
  assert (loose['a'], loose['b']) == (4, 4)
  strict = {'uniform': 64, 'workers': WORKERS, 'tolerance': 1.0}
  assert jd.lgreco(SPARSE, 0 * errors, tree, **strict)['a'] == 4
  with pytest.raises(ValueError, match='bound must be at least'):
    jd.lgreco(SPARSE, errors, tree, **strict | {'tolerance': 0.5})


def test_one_level_is_a_partition_by_leaf():
  tree = public.gradients(WORKERS, 2)
  tree = {name: tree[name] for name in ('w', 'b', 'e')}
  names = sorted(tree)
  apart = jd.partition(
    dict.fromkeys(names, SPARSE[16]), {name: name for name in names}
  )
  leveled = jd.per_leaf(SPARSE, dict.fromkeys(names, 16))
  start = {name: public.params()[name] for name in names}
  ends = [
    public.run(jd.error_feedback(c), tree, start)[0] for c in (leveled, apart)
  ]
  jax.tree.map(np.testing.assert_array_equal, *ends)
  assert leveled.bytes_sent(start, 8) == apart.bytes_sent(start, 8)


PARAMS = {'w': jnp.zeros((24, 20)), 'v': jnp.zeros((40, 16))}


def made(levels, labels):
  """A step on workers whose gradients are their batches."""
  tx = optax.chain(
    jd.error_feedback(jd.per_leaf(levels, labels)), optax.sgd(1.0)
  )
  where = {'axis': public.AXIS, 'workers': WORKERS}
  loss = lambda p, x: (
    jnp.ravel(p['v']) @ x[0, :640] + jnp.ravel(p['w']) @ (x[0, 640:])
  )
  return jd.init(tx, PARAMS, **where), jd.train_step(loss, tx, **where)


@pytest.mark.parametrize(
  ('levels', 'first', 'then'),
  [
    (SPARSE, {'w': 4, 'v': 64}, {'w': 64, 'v': 4}),
    (LOW_RANK, {'w': 4, 'v': 1}, {'w': 2, 'v': 4}),
    (LARGE_RANK, {'w': 16, 'v': 8}, {'w': 4, 'v': 16}),
  ],
)
def test_another_choice_loses_nothing(levels, first, then, tmp_path):
  """Applied + residuals + second residuals = what came in; resume is exact."""
  rng = np.random.default_rng(0)
  batches = rng.normal(size=(6, WORKERS, 1120)).astype(np.float32)
  flat = lambda tree: np.concatenate([np.ravel(tree[k]) for k in ('v', 'w')])

  def owed(state):
    feedback = state.opt_state[0]
    mean = flat(jax.tree.map(lambda e: e.mean(0), feedback.residual.value))
    rows = np.zeros_like(mean)
    for kept, (start, size) in zip(
      feedback.communicator, ((0, 640), (640, 480)), strict=True
    ):
      if isinstance(kept, MeanState):
        held = np.ravel(kept.dropped.value[0])
        rows[start : start + size] = held[:size]
    return mean + rows, np.abs(rows).max()

  state, step = made(levels, first)
  for batch in batches[:3]:
    state, _ = step(state, batch)
  assert (owed(state)[1] > 0) == (levels is SPARSE)
  jd.save(tmp_path, 3, state, metadata={'labels': then})
  like, step = made(levels, then)
  for batch in batches[3:]:
    state, _ = step(state, batch)
  came = batches.mean(1).sum(0)
  # Some ten float32 additions of numbers of size up to ten.
  np.testing.assert_allclose(
    -flat(state.params) + owed(state)[0], came, atol=2e-5
  )

  assert jd.checkpoint_metadata(tmp_path)['labels'] == then
  resumed = jd.restore(tmp_path, like)
  for batch in batches[3:]:
    resumed, _ = step(resumed, batch)
  jax.tree.map(np.testing.assert_array_equal, resumed, state)


def test_levels_must_keep_the_same():
  mixed = {'dense': jd.mean(public.AXIS), 'sparse': SPARSE[4]}
  labels = jax.tree.map(lambda _: 'sparse', PARAMS)
  with pytest.raises(ValueError, match='levels must keep the same back'):
    made(mixed, labels)
  with pytest.raises(ValueError, match=r"labels must be among .* got 'other'"):
    made(SPARSE, jax.tree.map(lambda _: 'other', PARAMS))
