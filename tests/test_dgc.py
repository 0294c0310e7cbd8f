"""Deep Gradient Compression and staged communicators: limits and a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import public
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxdist as jd

AXIS, WORKERS, STEPS = public.AXIS, 4, 5
CODE = jd.top_k(0.1, block_size=128)
GATHER = jd.mean(AXIS, CODE, 'gather')
WHOLE = jd.mean(AXIS, jd.top_k(1.0, block_size=128), 'gather')


def run(tx):
  gradients = public.gradients(WORKERS, STEPS)
  return public.run(tx, gradients, public.params())


def same(got, want):
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize('nesterov', [False, True])
def test_dense_without_masking_is_momentum_sgd(nesterov):
  got, _ = run(jd.dgc(WHOLE, nesterov=nesterov, masking=False))
  want, _ = run(
    optax.chain(
      jd.communicate(jd.mean(AXIS)), optax.trace(0.9, nesterov=nesterov)
    )
  )
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    # Momentum of a mean against a mean of momenta, of sizes up to ten.
    np.testing.assert_allclose(a, b, atol=3e-6)


def test_dense_with_masking_has_no_momentum_but_in_vectors():
  got, state = run(jd.dgc(WHOLE))
  plain, _ = run(jd.communicate(jd.mean(AXIS)))
  heavy, _ = run(optax.chain(jd.communicate(jd.mean(AXIS)), optax.trace(0.9)))
  for key, leaf in got.items():
    want = plain[key] if key in 'wv' else heavy[key]
    np.testing.assert_allclose(leaf, want, atol=3e-6)
  assert not np.any(state.momentum.value['w'])
  assert np.all(state.momentum.value['b'])


def in_parts(communicator):
  """What dgc does with vectors, for transforms that do not."""
  return jd.partition(
    {'matrix': communicator, 'whole': jd.mean(AXIS)},
    lambda tree: jax.tree.map(
      lambda x: 'matrix' if x.ndim > 1 else 'whole', tree
    ),
  )


def test_without_momentum_it_is_error_feedback():
  got, state = run(jd.dgc(GATHER, momentum=0.0))
  want, feedback = run(jd.error_feedback(in_parts(GATHER)))
  same(got, want)
  same(state.residual, feedback.residual)


def test_without_masking_it_is_feedback_behind_momentum():
  got, state = run(jd.dgc(GATHER, masking=False))
  want, (trace, feedback) = run(
    optax.chain(
      jd.per_worker(optax.trace(0.9)), jd.error_feedback(in_parts(GATHER))
    )
  )
  same(got, want)
  same(state.residual, feedback.residual)
  same(state.momentum, jd.PerWorker(trace.value.trace))


@pytest.mark.parametrize('max_norm', [None, 5.0])
@pytest.mark.parametrize('nesterov', [False, True])
def test_is_the_loop(nesterov, max_norm):
  rng = np.random.default_rng(0)
  grads = rng.normal(size=(STEPS, WORKERS, 16, 24)).astype(np.float32)
  tx = jd.dgc(GATHER, momentum=0.8, nesterov=nesterov, max_norm=max_norm)
  updates, state = public.run(tx, grads, jnp.zeros((16, 24)))

  u, v = np.zeros((2, WORKERS, 384))
  for step in range(STEPS):
    total = np.zeros(384)
    for worker in range(WORKERS):
      g = grads[step, worker].reshape(-1).astype(np.float64)
      if max_norm:  # A gradient of norm about 20; twice five is left.
        g *= min(1, WORKERS**0.5 * max_norm / np.sqrt(np.sum(g * g)))
      if nesterov:
        u[worker] = 0.8 * (u[worker] + g)
        v[worker] += u[worker] + g
      else:
        u[worker] = 0.8 * u[worker] + g
        v[worker] += u[worker]
      for row in range(0, 384, 128):
        largest = np.argsort(-np.abs(v[worker, row : row + 128]))[:13] + row
        total[largest] += v[worker, largest]
        v[worker, largest] = 0
        u[worker, largest] = 0
    got = np.asarray(updates)[0, step].reshape(-1)
    np.testing.assert_allclose(got, total / WORKERS, rtol=1e-5, atol=1e-5)
  assert np.sum(v == 0) >= WORKERS * 3 * 13
  for got, want in ((state.residual, v), (state.momentum, u)):
    got = np.asarray(got.value).reshape(WORKERS, -1)
    np.testing.assert_array_equal(got == 0, want == 0)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_order_and_number_of_equal_workers_do_not_matter():
  grads = np.random.default_rng(1).normal(size=(4, 3, 16, 24))
  grads = grads.astype(np.float32)
  tx, params = jd.dgc(GATHER), jnp.zeros((16, 24))
  want, _ = public.run(tx, grads, params)
  got, _ = public.run(tx, grads[:, ::-1], params)
  np.testing.assert_allclose(got, want, atol=1e-6)
  two, _ = public.run(tx, grads[:, [0, 0]], params)
  five, _ = public.run(tx, grads[:, [0] * 5], params)
  np.testing.assert_allclose(five[0], two[0], rtol=1e-6)


STAGES = [
  jd.mean(AXIS),
  jd.mean(AXIS, jd.top_k(0.25, block_size=128), 'gather'),
  GATHER,
]


def test_stages_are_their_communicators():
  gradients = public.gradients(WORKERS, STEPS)
  staged = jd.error_feedback(jd.staged(STAGES, [1, 3]))
  got, state = public.run(staged, gradients, public.params())
  np.testing.assert_array_equal(state.communicator.count, STEPS)

  def by_hand(grads):
    """The same, with stages changed by Python."""
    state = jd.error_feedback(GATHER).init(public.params())
    out = []
    for step in range(STEPS):
      tx = jd.error_feedback(STAGES[(step >= 1) + (step >= 3)])
      comm_state = tx.init(public.params()).communicator
      state = state._replace(communicator=comm_state)
      updates, state = tx.update(
        jax.tree.map(lambda g: g[step], grads),  # noqa: B023
        state,
      )
      out.append(updates)
    return jax.tree.map(lambda *x: jnp.stack(x), *out)

  want = jax.jit(jax.vmap(by_hand, 1, axis_name=AXIS))(gradients)
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_second_residual_goes_on_with_the_next_stage():
  """Nothing that a stage held back is lost when it ends."""
  stages = [
    jd.mean(AXIS, jd.top_k(d, block_size=128), 'two_shot') for d in (0.5, 0.1)
  ]
  grads = np.random.default_rng(2).normal(size=(6, WORKERS, 512))
  tx = jd.error_feedback(jd.staged(stages, [3]))
  updates, state = public.run(tx, grads.astype(np.float32), jnp.zeros(512))
  (inner,) = state.communicator.states
  second = np.asarray(inner.dropped.value[0]).reshape(-1)
  residual = np.mean(state.residual.value, axis=0)
  assert np.any(second)
  np.testing.assert_allclose(
    updates[0].sum(0) + residual + second, grads.sum(0).mean(0), atol=1e-5
  )


def test_a_stage_that_would_lose_what_it_holds_is_refused():
  stages = [jd.mean(AXIS, CODE, 'two_shot'), GATHER]
  tx = jd.error_feedback(jd.staged(stages, [3]))
  with pytest.raises(ValueError, match='must hold nothing back'):
    jax.vmap(tx.init, axis_name=AXIS)(jnp.zeros((2, 512)))


def test_bytes_of_each_stage_are_in_one_program(make_mesh):
  mesh = make_mesh(8)
  where = {'axis': AXIS, 'mesh': mesh}
  params = {'w': jnp.ones((30, 20)), 'b': jnp.ones(20)}
  tx = optax.chain(jd.dgc(jd.staged(STAGES, [10, 20])), optax.sgd(0.1))
  step = jd.train_step(
    lambda p, x: jnp.sum((x @ p['w'] + p['b']) ** 2), tx, **where
  )
  batch = jax.ShapeDtypeStruct(
    (16, 30), 'float32', sharding=NamedSharding(mesh, PartitionSpec(AXIS))
  )
  traffic = jd.traffic(step, jd.init(tx, params, **where), batch)
  matrix = {'w': params['w']}
  claims = [stage.bytes_sent(matrix, 8) for stage in STAGES]
  assert len(set(claims)) == 3
  for stage in (0, 1):
    rows = [r for r in traffic.rows if f'jaxdist.warmup.{stage}' in r.source]
    assert sum(row.bytes_sent for row in rows) == claims[stage]
    assert sum(row.bytes_a_step for row in rows) == 0
  whole = jd.mean(AXIS).bytes_sent({'b': params['b']}, 8)
  # And the flag by which all skip a bad step.
  assert traffic.bytes_a_step == claims[2] + whole + 2 * 4 * 7 / 8
  assert not any(row.in_unknown_branch for row in traffic.rows)
