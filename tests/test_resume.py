"""Whole training states: saved, restored, and moved to other worker counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import public
import pytest

import jaxdist as jd
from jaxdist.communicators.mean import MeanState

METHODS = {
  'feedback': lambda: optax.chain(
    jd.error_feedback(
      jd.mean(public.AXIS, jd.top_k(0.1, block_size=128), 'two_shot')
    ),
    optax.adam(0.01),
  ),
  'diloco': lambda: jd.diloco(
    optax.adam(0.01),
    optax.sgd(0.7, momentum=0.9, nesterov=True),
    jd.mean(public.AXIS, jd.quantize(bits=2, stochastic=False), 'two_shot'),
    every=2,
  ),
  'streaming_diloco': lambda: jd.diloco(
    optax.adam(0.01),
    optax.adam(0.01),
    jd.mean(public.AXIS, jd.quantize(bits=2, stochastic=False), 'two_shot'),
    every=4,
    fragments=2,
    delay=1,
    mix=0.5,
  ),
  'co2': lambda: jd.co2(
    optax.adam(0.01),
    jd.mean(public.AXIS, jd.quantize(bits=2, stochastic=False), 'two_shot'),
    every=2,
  ),
  'noloco': lambda: jd.noloco(
    optax.adam(0.01), 2, pairing=jd.gossip(public.AXIS, 'random_pairs')
  ),
  'fedavg': lambda: jd.fedavg(
    optax.adam(0.01),
    optax.yogi(0.01),
    jd.mean(public.AXIS, jd.sign(block_size=128)),
    every=2,
    participation=0.5,
  ),
  'scafcom': lambda: jd.scafcom(
    0.01,
    jd.mean(public.AXIS, jd.top_k(0.1, block_size=128), 'two_shot'),
    every=2,
    participation=0.5,
  ),
  'masha2': lambda: optax.chain(
    jd.masha2(
      0.01,
      jd.mean(public.AXIS, jd.top_k(0.1, block_size=128), 'two_shot'),
      keep=0.5,
    )
  ),
  'power_sgd': lambda: optax.chain(
    jd.error_feedback(jd.low_rank_mean(public.AXIS, 2)), optax.adam(0.01)
  ),
  'per_leaf': lambda: optax.chain(
    jd.error_feedback(
      jd.per_leaf(
        {
          d: jd.mean(public.AXIS, jd.top_k(d, block_size=128), 'two_shot')
          for d in (0.1, 0.5)
        },
        {'w': 0.1, 'b': 0.5},
      )
    ),
    optax.sgd(0.01),
  ),
  'econtrol': lambda: optax.chain(
    jd.econtrol(
      jd.mean(public.AXIS, jd.top_k(0.1, block_size=128), 'two_shot')
    ),
    optax.sgd(0.01),
  ),
  'dgc': lambda: optax.chain(
    jd.dgc(
      jd.staged(
        [
          jd.mean(public.AXIS, jd.top_k(d, block_size=128), 'two_shot')
          for d in (0.5, 0.1)
        ],
        [4],
      )
    ),
    optax.sgd(0.01),
  ),
  'one_bit_lamb': lambda: jd.one_bit_lamb(
    0.01, jd.mean(public.AXIS, jd.sign(block_size=128), 'two_shot'), 2
  ),
  'zero_one_adam': lambda: jd.zero_one_adam(
    0.01,
    jd.mean(public.AXIS, jd.sign(block_size=128), 'two_shot'),
    2,
    double_every=1,
    max_local=4,
  ),
  'gossip': lambda: jd.local_sgd(
    optax.adam(0.01),
    jd.gossip(public.AXIS, 'ring', jd.sign(block_size=128), mixing=0.5),
    every=2,
  ),
}


def make(name, workers, make_mesh, abstract=False):
  """A state, or what to restore one as, and its step."""
  tx = METHODS[name]()
  where = {'axis': public.AXIS, 'mesh': make_mesh(workers)}
  params = {'w': jnp.ones((24, 20)), 'b': jnp.ones(20)}
  if abstract:
    params = jax.eval_shape(lambda: params)
  loss = lambda p, x: jnp.mean((x @ p['w'] + p['b']) ** 2)
  return jd.init(tx, params, **where), jd.train_step(loss, tx, **where)


def shapes(state):
  """What to restore it as: nothing of its numbers."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


def train(state, step, steps):
  for index in steps:
    batch = np.random.default_rng(index).normal(size=(24, 24))
    state, _ = step(state, batch.astype(np.float32))
  return state


@pytest.mark.parametrize('name', METHODS)
def test_resume_is_no_break(name, make_mesh, tmp_path):
  state, step = make(name, 4, make_mesh)
  like = shapes(state)
  state = train(state, step, range(3))
  jd.save(tmp_path, 3, state)
  whole = train(state, step, range(3, 6))
  resumed = train(jd.restore(tmp_path, like), step, range(3, 6))
  jax.tree.map(np.testing.assert_array_equal, resumed, whole)


@pytest.mark.parametrize(
  'name',
  [
    'feedback',
    'diloco',
    'streaming_diloco',
    'co2',
    'noloco',
    'fedavg',
    'scafcom',
    'masha2',
    'power_sgd',
    'per_leaf',
    'econtrol',
    'dgc',
  ],
)
def test_other_worker_counts_keep_what_is_owed(name, make_mesh, tmp_path):
  """8 -> 4 -> 6 workers: the mean of what each keeps, and second residuals."""

  def owed(state):
    drifting = isinstance(state.params, jd.PerWorker)
    state = state.opt_state.meeting if drifting else state.opt_state[0]
    fields = ('residual', 'snapshot', 'slow', 'momentum', 'error', 'estimate')
    fields += ('own', 'apart')
    kept = [getattr(state, field, None) for field in fields]
    kept = [node.value for node in kept if isinstance(node, jd.PerWorker)]
    mean = jax.tree.map(lambda e: np.mean(e, axis=0), kept)
    communicators = jax.tree.leaves(
      state, is_leaf=lambda node: isinstance(node, MeanState)
    )
    # Rows are cut anew among the workers; those at the end only fill up.
    rows = [
      np.concatenate(x)
      for node in communicators
      if isinstance(node, MeanState)
      for x in jax.tree.leaves(node.dropped)
    ]
    return mean, rows

  state, step = make(name, 8, make_mesh)
  state = train(state, step, range(4))
  mean, rows = owed(state)
  assert max(np.abs(x).max() for x in jax.tree.leaves(mean)) > 0
  for workers in (4, 6):
    jd.save(tmp_path / str(workers), 1, state)
    like, step = make(name, workers, make_mesh, abstract=True)
    state = jd.restore(tmp_path / str(workers), like)
    now_mean, now_rows = owed(state)
    for a, b in zip(*map(jax.tree.leaves, (now_mean, mean)), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    for a, b in zip(now_rows, rows, strict=True):
      shared = min(len(a), len(b))
      np.testing.assert_array_equal(a[:shared], b[:shared])
      assert not a[shared:].any() and not b[shared:].any()
  final = train(state, step, range(4, 6))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(final))


# Of top_k(0.5) in 12 and 3 blocks: the first bucket is reduced in two rounds by
# 4 and 8 workers and gathered by 2 and 3; the second is always gathered.
@pytest.mark.parametrize('path', [(4, 8, 3), (8, 1)])
def test_a_change_of_pattern_loses_nothing(path):
  """Applied + mean residual + rows of the second encoding = what came in."""
  code = jd.mean(public.AXIS, jd.top_k(0.5), bucket_bytes=4 * 12 * 1024)
  tx = optax.chain(jd.error_feedback(code), optax.sgd(1.0))
  start = {'b': jnp.zeros(77), 'w': jnp.zeros((100, 150))}
  flat = lambda tree: np.concatenate(list(map(np.ravel, jax.tree.leaves(tree))))
  loss = lambda p, x: p['b'] @ x[0, :77] + p['w'].reshape(-1) @ x[0, 77:]

  rng = np.random.default_rng(0)
  state, came, before = None, np.zeros(15077), 0
  for workers in path:
    where = {'axis': public.AXIS, 'workers': workers}
    fresh = jd.init(tx, start, **where)
    state = fresh if state is None else jd.resize(state, fresh)
    rows = state.opt_state[0].communicator.dropped.value
    assert np.any(rows[0]) == (before >= 4)  # Something to hand on.
    step = jd.train_step(loss, tx, **where)
    for _ in range(2):
      batch = rng.normal(size=(workers, len(came))).astype(np.float32)
      state, _ = step(state, batch)
      came += batch.mean(0)
    feedback = state.opt_state[0]
    rows = feedback.communicator.dropped.value
    assert np.any(rows[0]) == (workers >= 4) and not np.any(rows[1])
    held = np.concatenate([np.ravel(rows[0])[: 12 * 1024], np.ravel(rows[1])])
    owed = flat(jax.tree.map(lambda e: e.mean(0), feedback.residual.value))
    # Some ten float32 additions of numbers of size up to ten.
    np.testing.assert_allclose(
      -flat(state.params) + owed + held[: len(came)], came, atol=2e-5
    )
    before = workers


def test_what_is_in_flight_arrives_after_a_change_of_workers():
  """Without feedback, of an exact code: nobody else remembers it."""
  code = jd.mean(public.AXIS, jd.identity(block_size=128), delay=1)
  tx = optax.chain(jd.communicate(code), optax.sgd(1.0))
  loss = lambda p, x: jnp.vdot(p, x[0])  # The batch is the gradient.
  state, path = None, []
  for workers, batches in ((2, [1.0]), (3, [10.0, 100.0, 0.0])):
    where = {'axis': public.AXIS, 'workers': workers}
    fresh = jd.init(tx, jnp.zeros(5), **where)
    state = fresh if state is None else jd.resize(state, fresh)
    step = jd.train_step(loss, tx, **where)
    for size in batches:
      state, _ = step(state, jnp.full((workers, 5), size))
      path.append(-float(state.params[0]))
  assert path == [0, 0, 11, 111]


def test_gossip_memory_cannot_be_resized(make_mesh, tmp_path):
  state, _ = make('gossip', 4, make_mesh)
  jd.save(tmp_path, 1, state)
  like, _ = make('gossip', 2, make_mesh, abstract=True)
  with pytest.raises(ValueError, match='told'):
    jd.restore(tmp_path, like)
