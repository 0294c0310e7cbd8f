"""Limits of the transforms, and what feedback conserves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import public
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxdist as jd
from jaxdist.communicators import buckets
from jaxdist.communicators.delayed import DelayedState
from jaxdist.communicators.mean import MeanState
from jaxdist.communicators.staged import StagedState

EXACT = {
  'identity': jd.identity(block_size=128),
  'all_of_top_k': jd.top_k(1.0, block_size=128),
  'all_of_random_k': jd.random_k(1.0, block_size=128),
  'all_of_global_top_k': jd.global_top_k(1.0),
}
LOSSY = {
  name: c
  for name, c in public.COMMUNICATORS.items()
  if c.agrees and not c.unbiased
}
DENSE = jd.communicate(jd.mean(public.AXIS))


@pytest.mark.parametrize('name', EXACT)
def test_exact_codes_equal_dense(name):
  gradients = public.gradients(4, 2)
  exact = jd.error_feedback(jd.mean(public.AXIS, EXACT[name]))
  got, state = public.run(exact, gradients, public.params())
  want, _ = public.run(DENSE, gradients, public.params())
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    # A gather sums in the order of the workers, an all-reduce in its own.
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
  for leaf in jax.tree.leaves(state.residual):
    np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def flat(tree):
  """All numbers of a tree, end to end."""
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def held_back(state, tree, bucket_size=None):
  """What a communicator owes, end to end as the leaves of ``tree``.

  ``bucket_size`` is in numbers, for communicators of several buckets.
  """
  if isinstance(state, DelayedState):
    in_flight = np.concatenate([np.ravel(x.mean(0)) for x in state.sent.value])
    return in_flight + held_back(MeanState(None, state.dropped), tree)
  if isinstance(state, StagedState):
    return sum(held_back(stage, tree) for stage in state.states)
  if isinstance(state, list):  # per_leaf
    parts = zip(state, jax.tree.leaves(tree), strict=True)
    return np.concatenate([held_back(part, [leaf]) for part, leaf in parts])
  if isinstance(state, dict):  # partition
    owed = jax.tree.map(np.zeros_like, tree)
    for label, part in state.items():
      mine = {
        k: tree[k] for k, v in public.is_matrix(tree).items() if v == label
      }
      ends = np.cumsum([x.size for x in jax.tree.leaves(mine)])
      owed |= zip(
        sorted(mine), np.split(held_back(part, mine), ends[:-1]), strict=True
      )
    return flat(owed)
  sizes = [x.size for x in jax.tree.leaves(tree)]
  if not isinstance(state, MeanState):
    return np.zeros(sum(sizes))
  plan = buckets.plan(sizes, bucket_size or sum(sizes))
  if not state.dropped.value:
    return np.zeros(sum(sizes))
  lengths = map(buckets.bucket_length, plan)
  return np.concatenate(
    [
      np.ravel(kept)[:length]
      for length, kept in zip(lengths, state.dropped.value, strict=True)
    ]
  )


@pytest.mark.parametrize('name', LOSSY)
def test_one_worker_loses_nothing(name):
  gradients = public.gradients(1, 2)
  late = 'delayed' in name
  tx = jd.error_feedback(LOSSY[name])
  updates, state = public.run(tx, gradients, public.params())
  for key, leaf in updates.items():
    want = gradients[key][:, 0]
    if late:
      want = np.stack([np.zeros_like(want[0]), want[0]])
    np.testing.assert_array_equal(leaf[0], want)
  assert all(not np.any(x) for x in jax.tree.leaves(state.residual))


@pytest.mark.parametrize('name', LOSSY)
def test_what_was_sent_plus_the_residuals_is_what_came_in(name):
  """Sum of updates + mean residual + what else is held = mean of sums."""
  workers, steps = 5, 6
  gradients = public.gradients(workers, steps)
  tx = jd.error_feedback(LOSSY[name])
  updates, state = public.run(tx, gradients, public.params())
  applied = jax.tree.map(lambda u: u[0].sum(0), updates)
  owed = jax.tree.map(lambda e: e.mean(0), state.residual.value)
  came = jax.tree.map(lambda g: g.sum(0).mean(0), gradients)
  bucket_size = 2048 // 4 if 'buckets' in name else None
  held = held_back(state.communicator, public.params(), bucket_size)
  # Six float32 additions of numbers of size up to ten.
  np.testing.assert_allclose(
    flat(applied) + flat(owed) + held, flat(came), atol=1e-5
  )
  assert_zeros_stay_zero(tx, workers)


def assert_zeros_stay_zero(tx, workers):
  zeros = jax.tree.map(np.zeros_like, public.gradients(workers, 2))
  updates, state = public.run(tx, zeros, public.params())
  for leaf in jax.tree.leaves((updates, state.residual)):
    assert not np.any(leaf)


@given(
  leaves=st.lists(st.integers(1, 200), min_size=1, max_size=4),
  workers=st.integers(2, 5),
  density=st.sampled_from([0.01, 0.1, 0.5, 1.0]),
  method=st.sampled_from(['gather', 'two_shot']),
  seed=st.integers(0, 2**16),
)
@settings(max_examples=6)
def test_conservation_for_any_leaves(leaves, workers, density, method, seed):
  rng = np.random.default_rng(seed)
  tree = [rng.normal(size=(workers, n)).astype(np.float32) for n in leaves]
  code = jd.top_k(density, block_size=128)
  communicator = jd.mean('data', code, method)

  def exchange(tree):
    state = communicator.init(tree, feedback=True)
    mean, sent, state = communicator.exchange(tree, state)
    return mean, sent, state.dropped.value

  exchange = jax.jit(jax.vmap(exchange, axis_name='data'))
  mean, sent, dropped = exchange(tree)
  flat = lambda tree: np.concatenate([np.asarray(x) for x in tree], axis=1)
  total = flat(mean)[0]
  for kept in dropped or []:
    total = total + np.asarray(kept).reshape(-1)[: len(total)]
  np.testing.assert_allclose(total, flat(sent).mean(0), atol=1e-6)


def test_every_step_with_sgd_is_data_parallel():
  gradients = public.gradients(4, 3)
  mean = jd.mean(public.AXIS)
  dense = optax.chain(jd.communicate(mean), optax.sgd(0.1))
  want, _ = public.run(dense, gradients, public.params(), walk=True)
  for tx in (
    jd.local_sgd(optax.sgd(0.1), mean, every=1),
    jd.diloco(optax.sgd(0.1), optax.sgd(1.0), mean, every=1),
  ):
    got, _ = public.run(tx, gradients, public.params(), walk=True)
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
      # The step is rounded as a change of params, then as their mean.
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_equal_workers_are_one_worker():
  """All workers see the same gradients: local steps are the inner optimizer."""
  one = public.gradients(1, 4)
  same = jax.tree.map(lambda g: np.repeat(g, 3, axis=1), one)
  inner = optax.adam(0.01)
  tx = jd.local_sgd(inner, jd.mean(public.AXIS), every=2)
  got, _ = public.run(tx, same, public.params(), walk=True)
  want, _ = public.run(inner, one, public.params(), walk=True)
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(
      a, np.broadcast_to(b, a.shape), rtol=1e-5, atol=1e-6
    )


def test_all_zero_gradients_stay_zero():
  """With unbiased codes; others are above, where they are compiled anyway."""
  for communicator in public.COMMUNICATORS.values():
    if communicator.agrees and communicator.unbiased:
      assert_zeros_stay_zero(jd.error_feedback(communicator), 3)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_low_precision_leaves_keep_their_dtype_and_a_float32_residual(dtype):
  gradients = jax.tree.map(
    lambda g: jnp.asarray(g, dtype), public.gradients(4, 2)
  )
  tx = jd.error_feedback(jd.mean(public.AXIS, jd.top_k(0.1, block_size=128)))
  updates, state = public.run(tx, gradients, public.params(dtype))
  assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
  assert {x.dtype for x in jax.tree.leaves(state.residual)} == {
    jnp.dtype(jnp.float32)
  }


def test_low_precision_params_meet_exactly():
  tx = jd.local_sgd(optax.sgd(0.1), jd.mean(public.AXIS), every=2)
  gradients = jax.tree.map(
    lambda g: jnp.asarray(g, jnp.bfloat16), public.gradients(4, 2)
  )
  path, _ = public.run(tx, gradients, public.params(jnp.bfloat16), walk=True)
  for leaf in jax.tree.leaves(path):
    assert leaf.dtype == jnp.bfloat16
    met = leaf[:, -1]
    np.testing.assert_array_equal(met, np.broadcast_to(met[:1], met.shape))
