"""Federated averaging, late meetings and the last merge, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import public
import pytest

import jaxdist as jd

WORKERS = 4
# Sums in another order, of numbers of size one.
CLOSE = {'rtol': 1e-5, 'atol': 1e-6}
MEAN = jd.mean(public.AXIS)
SERVERS = {
  'avg': optax.sgd(1.0),
  'avgm': optax.sgd(1.0, momentum=0.9),
  'adagrad': optax.adagrad(0.1, initial_accumulator_value=0.0, eps=1e-3),
  'adam': optax.adam(0.1, eps=1e-3),
  'yogi': optax.yogi(0.1),
}


def gradients(steps, workers=WORKERS, size=6):
  rng = np.random.default_rng(0)
  return rng.normal(size=(steps, workers, size)).astype(np.float32)


def walk(tx, grads):
  """Parameters of each worker after each step, (workers, steps, size)."""
  start = jnp.arange(float(grads.shape[-1]))
  return np.asarray(public.run(tx, grads, start, walk=True)[0])


@pytest.mark.parametrize('server', SERVERS)
def test_fedavg_is_the_loop(server):
  """Two of four take part; whom, is read off the path."""
  weights = [1.0, 2.0, 4.0, 1.0]
  outer = SERVERS[server]
  tx = jd.fedavg(
    optax.sgd(0.1), outer, MEAN, 2, participation=0.5, weights=weights
  )
  grads = gradients(10)
  path = walk(tx, grads)
  anchor = jnp.arange(6.0)
  state = outer.init(anchor)
  seen = set()
  for turn in range(5):
    # The first step of a round moves those that take part.
    first = path[:, 2 * turn]
    start = np.asarray(anchor)
    took_part = np.abs(first - start).max(1) > 1e-3
    assert took_part.sum() == 2
    seen.add(tuple(took_part))
    change = np.zeros(6)
    for i in np.flatnonzero(took_part):
      moved = start - 0.1 * grads[2 * turn, i]
      np.testing.assert_allclose(first[i], moved, **CLOSE)
      moved = moved - 0.1 * grads[2 * turn + 1, i]
      change += 4 / 2 * weights[i] / sum(weights) * (start - moved)
    updates, state = outer.update(
      jnp.asarray(change, jnp.float32), state, anchor
    )
    anchor = optax.apply_updates(anchor, updates)
    for worker in range(WORKERS):
      np.testing.assert_allclose(path[worker, 2 * turn + 1], anchor, **CLOSE)
  assert len(seen) > 1


def test_with_all_and_equal_weights_it_is_diloco():
  grads, inner = gradients(6), optax.adam(0.1)
  want = walk(jd.diloco(inner, SERVERS['avgm'], MEAN, 2), grads)
  for options in (
    {},
    {'participation': 0.9},
    {'weights': [3.0] * WORKERS},
  ):
    tx = jd.fedavg(inner, SERVERS['avgm'], MEAN, 2, **options)
    np.testing.assert_allclose(walk(tx, grads), want, **CLOSE)


def test_draws_are_unbiased():
  """The mean change over many draws is the weighted mean of all."""
  weights, rounds = np.array([1.0, 2.0, 4.0, 1.0]), 4000
  tx = jd.fedavg(
    optax.sgd(1.0),
    optax.sgd(1.0),
    MEAN,
    1,
    participation=0.5,
    weights=[*weights],
  )
  grads = np.eye(4, dtype=np.float32)[None].repeat(rounds, 0)
  moved = -(walk(tx, grads)[0, -1] - np.arange(4.0)) / rounds
  # Each worker is drawn with a chance of 1/2 and counts twice its share: the
  # standard error is share / sqrt(rounds), and five of them are allowed. Sums
  # of 4000 float32 steps add rounding of 4000 * 2^-24 at most.
  shares = weights / weights.sum()
  assert (abs(moved - shares) < 5 * shares / rounds**0.5 + 3e-4).all()


def test_who_does_not_take_part_keeps_residual_and_inner_state():
  code = jd.top_k(1 / 128, block_size=128)
  tx = jd.fedavg(
    optax.adam(0.1),
    optax.sgd(1.0),
    jd.mean(public.AXIS, code),
    1,
    participation=0.25,
  )
  _, state = public.run(tx, gradients(1), jnp.arange(6.0), walk=True)
  counts = np.asarray(state.inner.value[0].count)
  assert sorted(counts) == [0, 0, 0, 1]
  held = np.abs(state.meeting.residual.value).max(1) > 0
  np.testing.assert_array_equal(held, counts == 1)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'participation': 0.0}, r'participation must be in \(0, 1\], got 0'),
    ({'participation': 1.5}, r'participation must be in \(0, 1\], got 1\.5'),
    ({'weights': [1.0, 0.0]}, r'weights must be positive, got \[1\.0, 0\.0\]'),
    ({'weights': [1.0, 2.0]}, r'one entry for each of 4 workers, got 2'),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    walk(
      jd.fedavg(optax.sgd(1.0), SERVERS['avg'], MEAN, 1, **options),
      gradients(1),
    )


def test_workers_meet_after_the_steps_that_are_given():
  steps = (2, 3, 7)
  grads = gradients(9)
  path = walk(jd.local_sgd(optax.sgd(0.1), MEAN, every=steps), grads)
  fast = np.tile(np.arange(6.0), (WORKERS, 1))
  for step in range(1, 10):
    fast = fast - 0.1 * grads[step - 1]
    if step in steps:
      fast[:] = fast.mean(0)
    np.testing.assert_allclose(path[:, step - 1], fast, **CLOSE)


def test_bytes_of_given_steps_are_those_of_the_run(make_mesh):
  where = {'axis': public.AXIS, 'mesh': make_mesh(8)}
  steps = jd.late_meetings(steps=100, meetings=8)
  tx = jd.local_sgd(optax.sgd(0.1), MEAN, every=steps)
  params = {'w': jnp.ones((24, 20))}
  step = jd.train_step(lambda p, x: jnp.mean((x @ p['w']) ** 2), tx, **where)
  traffic = jd.traffic(step, jd.init(tx, params, **where), jnp.ones((8, 24)))
  claimed = MEAN.bytes_sent(params, 8) * 8 / 100
  assert traffic.bytes_a_step == pytest.approx(claimed, rel=1e-9)


@pytest.mark.parametrize('steps', [1, 10, 97, 1400])
@pytest.mark.parametrize('share', [0.0, 0.3, 1.0])
@pytest.mark.parametrize('window', [0.01, 0.25, 1.0])
def test_late_meetings_keep_to_the_budget(steps, share, window):
  for meetings in {1, max(1, steps // 7), steps}:
    found = jd.late_meetings(steps, meetings, share=share, window=window)
    assert len(set(found)) == meetings and sorted(found) == list(found)
    assert found[0] >= 1 and found[-1] == steps
    last = max(1, round(window * steps))
    late = sum(step > steps - last for step in found)
    room = min(last, max(1, round(share * meetings)))
    assert late == max(room, meetings - (steps - last))


@pytest.mark.parametrize(
  ('every', 'message'),
  [
    ([], r'sequence of the steps after which workers meet, got \[\]'),
    ([0, 2], r'increase from 1, got 0 after 0'),
    ([3, 3], r'increase from 1, got 3 after 3'),
  ],
)
def test_bad_steps_are_refused(every, message):
  with pytest.raises(ValueError, match=message):
    jd.local_sgd(optax.sgd(1.0), MEAN, every=every)


def test_given_steps_cannot_be_streamed():
  for options in ({'fragments': 2}, {'delay': 1}):
    with pytest.raises(ValueError, match='got a sequence'):
      jd.diloco(
        optax.sgd(1.0), optax.sgd(1.0), MEAN, every=[2, 4, 9], **options
      )


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'meetings': 0}, r'meetings must be at least 1 .* 100, got 0'),
    ({'meetings': 101}, r'at most the number of steps, 100, got 101'),
    ({'share': 1.1}, r'share must be in \[0, 1\], got 1\.1'),
    ({'window': 0.0}, r'window must be in \(0, 1\], got 0'),
  ],
)
def test_bad_late_meetings_are_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    jd.late_meetings(**({'steps': 100, 'meetings': 9} | arguments))


def test_merge_is_the_mean_and_is_idempotent(make_mesh):
  where = {'axis': public.AXIS, 'mesh': make_mesh(WORKERS)}
  tx = jd.local_sgd(optax.sgd(1.0), MEAN, every=100)
  params = {'w': jnp.zeros(6), 'half': jnp.zeros(3, jnp.bfloat16)}
  loss = lambda p, x: jnp.sum(p['w'] * x) + jnp.sum(p['half']) * x.mean()
  state = jd.init(tx, params, **where)
  batch = np.random.default_rng(0).normal(size=(WORKERS, 6)).astype(np.float32)
  state, _ = jd.train_step(loss, tx, **where)(state, batch)
  own = jax.tree.map(np.asarray, state.params.value)
  merged = jd.merge(state)
  mean = jd.mean_params(state)
  for name, x in merged.params.value.items():
    np.testing.assert_array_equal(x, np.asarray(mean[name])[None].repeat(4, 0))
    # Looking at the merged model leaves the workers where they are.
    np.testing.assert_array_equal(state.params.value[name], own[name])
    assert x.sharding == state.params.value[name].sharding
    assert x.dtype == params[name].dtype
  again = jd.merge(merged)
  jax.tree.map(np.testing.assert_array_equal, again.params, merged.params)
  assert merged.opt_state is state.opt_state
  dense = optax.chain(jd.communicate(MEAN), optax.sgd(1.0))
  shared = jd.init(dense, params, **where)
  assert jd.merge(shared) is shared
