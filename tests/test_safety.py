"""Bad gradients, and gradients that were reduced before."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import public
import pytest
from jax.sharding import PartitionSpec

import jaxdist as jd

WORKERS = 4
AGREEING = {n: c for n, c in public.COMMUNICATORS.items() if c.agrees}


@pytest.mark.parametrize('name', AGREEING)
def test_one_bad_number_is_dropped_by_all_and_leaves_no_trace(name):
  """Steps: good, bad on one worker, good. The bad one changes nothing."""
  tx = jd.error_feedback(AGREEING[name])
  good = public.gradients(WORKERS, 2)
  want_updates, want_state = public.run(tx, good, public.params())
  np.testing.assert_array_equal(want_state.skipped, np.zeros(WORKERS))
  # A bad number of each kind, on different workers and in different leaves.
  steps = [0, 0, 0, 0, 1]
  gradients = jax.tree.map(lambda g: g[steps], good)
  gradients['w'][1, 2, 3, 4] = np.nan
  gradients['v'][2, 0, 6, 4, 10] = np.inf
  gradients['s'][3, 3] = -np.inf
  updates, state = public.run(tx, gradients, public.params())

  same = np.testing.assert_array_equal
  for key, leaf in updates.items():
    same(leaf[:, [0, 4]], want_updates[key])
    assert not np.any(leaf[:, 1:4])
  same(state.skipped, np.full(WORKERS, 3))
  jax.tree.map(
    same,
    (state.residual, state.communicator),
    (want_state.residual, want_state.communicator),
  )


@pytest.mark.parametrize('method', ['gather', 'two_shot'])
def test_an_exchange_in_flight_that_overflows_is_given_up(method):
  """Each number is finite and their sum is not: it would be so each time."""
  code = jd.mean(
    public.AXIS, jd.top_k(1 / 128, block_size=128), method, delay=1
  )
  tx = jd.error_feedback(code)
  grads = np.zeros((6, WORKERS, 128), np.float32)
  grads[:, :, 0] = 1.0
  grads[2] *= 3e38
  updates, state = public.run(tx, grads, jnp.zeros(128))
  np.testing.assert_array_equal(updates[0, :, 0], [0, 1, 1, 0, 1, 1])
  np.testing.assert_array_equal(state.communicator.lost, np.ones(WORKERS))
  np.testing.assert_array_equal(state.skipped, np.zeros(WORKERS))
  for leaf in jax.tree.leaves((state.residual, updates)):
    assert np.isfinite(leaf).all()


def test_what_feedback_adds_up_stays_in_the_range_of_the_dtype():
  """Two numbers near the end of float16 in turn: neither is an infinity."""
  code = jd.mean(public.AXIS, jd.top_k(1 / 128, block_size=128))
  grads = np.zeros((3, 2, 128), np.float16)
  grads[:, :, 0], grads[:, :, 1] = 60000, 59000
  updates, state = public.run(
    jd.error_feedback(code), jnp.asarray(grads), jnp.zeros(128, jnp.float16)
  )
  want = [[60000, 0], [0, 65504], [65504, 0]]
  np.testing.assert_array_equal(updates[0, :, :2], np.float16(want))
  np.testing.assert_array_equal(state.skipped, [0, 0])


@pytest.mark.parametrize('make', [jd.ef21, jd.econtrol, jd.dgc])
def test_other_feedback_drops_it_too(make):
  """Steps: good, bad on one worker, good."""
  tx = make(AGREEING['mean_two_shot_top_k'])
  good = public.gradients(WORKERS, 2)
  want_updates, want = public.run(tx, good, public.params())
  gradients = jax.tree.map(lambda g: g[[0, 0, 1]], good)
  gradients['w'][1, 2, 3, 4] = np.nan
  updates, state = public.run(tx, gradients, public.params())
  for key, leaf in updates.items():
    np.testing.assert_array_equal(leaf[:, [0, 2]], want_updates[key])
    assert not np.any(leaf[:, 1])
  np.testing.assert_array_equal(state.skipped, np.ones(WORKERS))
  jax.tree.map(
    np.testing.assert_array_equal,
    state._replace(skipped=None),
    want._replace(skipped=None),
  )


def test_too_much_control_warns():
  with pytest.warns(UserWarning, match='control=0.3 is above the contraction'):
    jd.econtrol(jd.mean(public.AXIS, jd.top_k(0.1)), control=0.3)


def _train(tx, batches, make_mesh):
  where = {'axis': public.AXIS, 'mesh': make_mesh(WORKERS)}
  params = {'w': jnp.ones((24, 20)), 'b': jnp.ones(20)}
  state = jd.init(tx, params, **where)
  step = jd.train_step(
    lambda p, x: jnp.mean((x @ p['w'] + p['b']) ** 2), tx, **where
  )
  for batch in batches:
    state, metrics = step(state, batch)
  return state, metrics


def test_train_step_keeps_momenta_out_of_it(make_mesh):
  rng = np.random.default_rng(0)
  batches = rng.normal(size=(3, WORKERS, 24)).astype(np.float32)
  batches[1, 2, 3] = np.nan
  tx = optax.chain(
    jd.error_feedback(jd.mean(public.AXIS, jd.sign(block_size=128))),
    optax.adam(0.1),
  )
  state, metrics = _train(tx, batches, make_mesh)
  want, _ = _train(tx, batches[[0, 2]], make_mesh)
  jax.tree.map(
    np.testing.assert_array_equal,
    (state.params, state.opt_state),
    (want.params, want.opt_state),
  )
  np.testing.assert_array_equal(metrics['skipped'], np.ones(WORKERS))
  assert (state.step, state.skipped, want.step) == (3, 1, 2)


def test_drifting_worker_leaves_its_bad_step_out_alone(make_mesh):
  rng = np.random.default_rng(0)
  batches = rng.normal(size=(3, WORKERS, 24)).astype(np.float32)
  batches[0, 2, 3] = np.nan
  tx = jd.local_sgd(
    optax.adam(0.1),
    jd.mean(public.AXIS, jd.top_k(0.1, block_size=128)),
    every=3,
  )
  state, metrics = _train(tx, batches, make_mesh)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
  np.testing.assert_array_equal(metrics['skipped'], [0, 0, 1, 0])
  np.testing.assert_array_equal(
    state.opt_state.inner.value[0].count, [3, 3, 2, 3]
  )


ONES = {'w': jnp.ones(4)}


def _steps(tx, sizes, **where):
  """Gradients of one size on all workers, or of one for each of them."""
  state = jd.init(tx, ONES, axis=public.AXIS, **where)
  step = jd.train_step(
    lambda p, x: jnp.sum(p['w'] * x), tx, axis=public.AXIS, **where
  )
  for size in sizes:
    batch = np.broadcast_to(np.float32(size), WORKERS).reshape(WORKERS, 1)
    state, metrics = step(state, np.array(batch))
  return state, metrics


@pytest.mark.parametrize('where', ['mesh', 'workers'])
@pytest.mark.parametrize(
  'tx',
  {
    'exchange': optax.chain(
      jd.error_feedback(jd.mean(public.AXIS)), optax.sgd(0.1, momentum=0.9)
    ),
    'update': optax.chain(
      jd.communicate(jd.mean(public.AXIS)), optax.sgd(10.0, momentum=0.9)
    ),
  }.items(),
  ids=lambda item: item[0],
)
def test_finite_gradients_that_overflow_later_change_nothing(
  tx, where, make_mesh
):
  """Four times 3e38 in the sum; ten times 8e37 in the optimizer."""
  size = {'exchange': 3e38, 'update': 8e37}[tx[0]]
  place = {'mesh': make_mesh(WORKERS), 'workers': WORKERS}
  place = {where: place[where]}
  state, metrics = _steps(tx[1], [1, size, 1], **place)
  want, _ = _steps(tx[1], [1, 1], **place)
  jax.tree.map(
    np.testing.assert_array_equal,
    (state.params, state.opt_state),
    (want.params, want.opt_state),
  )
  np.testing.assert_array_equal(metrics['skipped'], np.ones(WORKERS))
  assert (state.step, state.skipped) == (3, 1)


def test_parameters_that_never_were_finite_stop_nothing():
  tx = optax.chain(jd.communicate(jd.mean('data')), optax.sgd(0.5))
  params = {'mask': jnp.array([0.0, -jnp.inf]), 'w': jnp.zeros(())}
  where = {'axis': 'data', 'workers': 2}
  step = jd.train_step(lambda p, x: p['w'] * x[0], tx, **where)
  state, metrics = step(jd.init(tx, params, **where), jnp.array([1.0, 3.0]))
  np.testing.assert_array_equal(metrics['skipped'], [0, 0])
  assert state.params['w'] == -1


def test_what_is_lost_in_flight_is_in_the_metrics():
  tx = jd.error_feedback(jd.mean(public.AXIS, delay=1))
  state, metrics = _steps(tx, [1, 3e38, 1, 1], workers=WORKERS)
  np.testing.assert_array_equal(metrics['skipped'], np.ones(WORKERS))
  # Gradients 1 and 1 have arrived; the third is on its way.
  np.testing.assert_array_equal(state.params['w'], [3, 3, 3, 3])


def test_dropped_meetings_are_in_the_metrics_of_all():
  tx = jd.local_sgd(optax.sgd(1.0), jd.mean(public.AXIS), every=2)
  sizes = [1, [3e38, 3e38, -1, -1], 1, [1, np.nan, 1, 1]]
  state, metrics = _steps(tx, sizes, workers=WORKERS)
  np.testing.assert_array_equal(metrics['skipped'], [1, 2, 1, 1])
  np.testing.assert_array_equal(metrics['skipped'], state.skipped.value)


def test_diverged_worker_sends_all_back_to_the_anchor():
  tx = jd.local_sgd(
    optax.sgd(1.0),
    jd.mean(public.AXIS, jd.top_k(0.5, block_size=128)),
    every=1,
  )
  params = jnp.ones(200)
  grads = jnp.ones((WORKERS, 200)).at[1].set(3e38)

  def run(grad):
    state, p = tx.init(params), params
    for g in (grad, 2 * grad, jnp.ones(200)):
      g = jnp.where(jnp.isfinite(g), g, 3e38)
      updates, state = tx.update(g, state, p)
      p = optax.apply_updates(p, updates)
    return p, state.meeting

  p, meeting = jax.jit(jax.vmap(run, axis_name=public.AXIS))(grads)
  assert np.isfinite(p).all()
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(meeting))


def over_mesh(fn, make_mesh, *args):
  spec = PartitionSpec(public.AXIS)
  return jax.jit(
    jax.shard_map(
      fn,
      mesh=make_mesh(WORKERS),
      in_specs=(PartitionSpec(), spec),
      out_specs=PartitionSpec(),
    )
  )(*args)


def test_gradient_that_was_reduced_raises(make_mesh):
  tx = jd.error_feedback(AGREEING['mean_gather_top_k'])

  def step(params, x):
    grads = jax.grad(lambda p: jnp.sum(x * p['w']))(params)  # Reduces.
    return tx.update(grads, tx.init(params))[0]

  with pytest.raises(ValueError, match=r"updates\['w'\] is already the same"):
    over_mesh(step, make_mesh, {'w': jnp.ones(8)}, jnp.ones((WORKERS, 8)))


def test_gradient_that_was_not_reduced_is_fine(make_mesh):
  tx = jd.communicate(jd.mean(public.AXIS))

  def step(params, x):
    params = jax.lax.pcast(params, public.AXIS, to='varying')
    grads = jax.grad(lambda p: jnp.sum(x * p['w']))(params)
    return tx.update(grads, tx.init(params))[0]

  x = jnp.arange(WORKERS * 8.0).reshape(WORKERS, 8)
  got = over_mesh(step, make_mesh, {'w': jnp.ones(8)}, x)
  np.testing.assert_allclose(got['w'], x.mean(0), rtol=1e-6)


FEEDBACK = jd.error_feedback(AGREEING['mean_gather_top_k'])


@pytest.mark.parametrize('where', ['mesh', 'workers'])
@pytest.mark.parametrize(
  ('tx', 'message'),
  [
    (optax.adam(0.1), r"updates\['w'\] differs: tx has no communicator"),
    (
      optax.chain(optax.trace(0.9), FEEDBACK),
      r"opt_state\[0\].trace\['w'\] differs: .*jd.per_worker",
    ),
    (
      optax.chain(
        optax.trace(0.9), jd.local_sgd(optax.sgd(1.0), jd.mean('data'), every=2)
      ),
      r"opt_state\[0\].trace\['w'\] differs: .*jd.per_worker",
    ),
  ],
)
def test_what_differs_between_workers_unsaid_raises(
  tx, message, where, make_mesh
):
  place = {'mesh': make_mesh(WORKERS), 'workers': WORKERS}
  with pytest.raises(ValueError, match=message):
    _steps(tx, [1], **{where: place[where]})


def test_what_only_a_mesh_refuses_can_be_simulated():
  """A loop whose carry changes its type over a mesh."""

  def update(updates, state, params=None):
    del params
    add = lambda total, _: (jax.tree.map(jnp.add, total, updates), None)
    return jax.lax.scan(add, {'w': jnp.zeros(4)}, length=2)[0], state

  twice = optax.GradientTransformation(lambda p: optax.EmptyState(), update)
  tx = optax.chain(
    twice, jd.communicate(jd.mean(public.AXIS)), optax.scale(-1.0)
  )
  state, _ = _steps(tx, [1], workers=WORKERS)
  np.testing.assert_array_equal(state.params['w'], -np.ones(4))


def test_biased_code_without_feedback_warns():
  with pytest.warns(UserWarning, match=r'top_k.* is biased'):
    jd.communicate(jd.mean(public.AXIS, jd.top_k(0.1)))


def test_feedback_for_a_code_that_expands_is_refused():
  with pytest.raises(ValueError, match='feedback needs a code that contracts'):
    jd.error_feedback(jd.mean(public.AXIS, jd.ternary()))


@pytest.mark.parametrize(
  'code', [jd.ternary(), jd.random_k(0.1, unbiased=True)]
)
def test_gossip_with_a_code_that_expands_is_refused(code):
  with pytest.raises(ValueError, match='difference coding needs a code that'):
    jd.gossip(public.AXIS, compressor=code, mixing=0.1)
