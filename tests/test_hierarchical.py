"""Two levels of workers: slices of chips, each of which has its own updates."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from needs import needs_tpu_compiler

import jaxdist as jd
from jaxdist.outer import participation

AXES = ('dcn', 'ici')
BLOCK = 128
SIGN = jd.sign(block_size=BLOCK)
TOP_K = jd.top_k(0.1, block_size=BLOCK)
SLOW = {
  'dense': jd.mean('dcn'),
  'gather_top_k': jd.mean('dcn', TOP_K, 'gather'),
  'two_shot_sign': jd.mean('dcn', SIGN, 'two_shot'),
  'psum_random_k': jd.mean('dcn', jd.random_k(0.25, block_size=BLOCK)),
  'gather_stochastic': jd.mean(
    'dcn', jd.quantize(bits=4, stochastic=True, block_size=BLOCK)
  ),
  'delayed_two_shot_sign': jd.mean('dcn', SIGN, 'two_shot', delay=1),
}
SHAPES = {'w': (24, 40), 'b': (40,), 's': (), 'e': (0, 3)}
NUMBERS = 1001


def hierarchical(name):
  return jd.hierarchical(jd.mean('ici'), SLOW[name])


def params():
  return {k: jnp.ones(shape) for k, shape in SHAPES.items()}


def gradients(slices, chips, steps):
  rng = np.random.default_rng(0)
  return {
    k: rng.normal(size=(slices, chips, steps, *shape)).astype(np.float32)
    for k, shape in SHAPES.items()
  }


def walk(tx, gradients):
  """All steps of one worker: updates, and the state that they leave."""

  params = jax.tree.map(lambda g: g[0], gradients)

  def step(state, grad):
    updates, state = tx.update(grad, state, params)
    return state, updates

  state = tx.init(params)
  state, updates = jax.lax.scan(step, state, gradients)
  return updates, state


def simulated(fn, *args):
  """For all workers, on one device."""
  both = jax.vmap(jax.vmap(fn, axis_name='ici'), axis_name='dcn')
  return jax.jit(both)(*args)


def flat(tree, lead):
  """Leaves end to end behind as many leading axes."""
  leaves = [np.asarray(x) for x in jax.tree.leaves(tree)]
  return np.concatenate([x.reshape(*x.shape[:lead], -1) for x in leaves], lead)


@pytest.mark.parametrize(
  'name', ['gather_top_k', 'two_shot_sign', 'delayed_two_shot_sign']
)
def test_shares_are_exchanged_as_by_themselves(name):
  """Against NumPy around the slow communicator alone, with feedback by hand."""
  slices, chips, steps = 2, 3, 3
  grads = gradients(slices, chips, steps)
  tx = jd.error_feedback(hierarchical(name))
  updates, state = simulated(lambda g: walk(tx, g), grads)
  got = flat(updates, 3)
  assert (got == got[:1, :1]).all()

  length = BLOCK * math.ceil(NUMBERS / (BLOCK * chips))
  whole = np.zeros((slices, steps, chips * length), np.float32)
  whole[..., :NUMBERS] = flat(grads, 3).mean(1)
  shares = whole.reshape(slices, steps, chips, length)
  slow = SLOW[name]
  init = jax.vmap(lambda x: slow.init([x], True), axis_name='dcn')
  exchange = jax.jit(
    jax.vmap(lambda x, s: slow.exchange([x], s), axis_name='dcn')
  )
  is_number = np.arange(chips * length).reshape(chips, length) < NUMBERS
  owed = np.zeros((chips, slices, length), np.float32)
  want = np.zeros((steps, chips, length), np.float32)
  for chip in range(chips):
    held = init(shares[:, 0, chip])
    for step in range(steps):
      target = shares[:, step, chip] + owed[chip]
      (result,), (sent,), held = exchange(target, held)
      want[step, chip] = result[0]
      owed[chip] = np.where(is_number[chip], target - sent, 0)
  # Sums in another order; a residual passes through a difference.
  close = {'rtol': 1e-5, 'atol': 1e-5}
  got = got[0, 0]
  np.testing.assert_allclose(got, want.reshape(steps, -1)[:, :NUMBERS], **close)
  # What a slice owes lies with the chip whose share it is, C times.
  residual = flat(state.residual.value, 2)
  for chip in range(chips):
    own = slice(chip * length, min(NUMBERS, (chip + 1) * length))
    for i in range(chips):
      expected = chips * owed[chip] if i == chip else 0 * owed[chip]
      size = own.stop - own.start
      np.testing.assert_allclose(
        residual[:, i, own], expected[:, :size], **close
      )


def test_same_numbers_on_a_mesh():
  grads = gradients(2, 2, 2)
  names = ('psum_random_k', 'gather_stochastic', 'delayed_two_shot_sign')
  txs = [jd.error_feedback(hierarchical(name)) for name in names]
  want = simulated(lambda g: [walk(tx, g) for tx in txs], grads)
  states = [state for _, state in want]
  specs = [(P(), jd.specs(state, AXES)) for state in states]

  def run(grads):
    grads = jax.tree.map(lambda g: g[0, 0], grads)
    ends = [walk(tx, grads) for tx in txs]
    return [(updates, jd.stacked(state)) for updates, state in ends]

  for check, kind in ((True, AxisType.Explicit), (False, AxisType.Auto)):
    mesh, spec = mesh_of(2, 2, kind), P(*AXES)
    mapped = jax.shard_map(
      run, mesh=mesh, in_specs=spec, out_specs=specs, check_vma=check
    )
    place = NamedSharding(mesh, spec)
    ends = jax.jit(mapped)(jax.device_put(grads, place))
    for (got, state), (expected, simulated_state) in zip(
      ends, want, strict=True
    ):
      close = {'rtol': 1e-5, 'atol': 1e-5}  # Sums in another order.
      np.testing.assert_allclose(flat(got, 1), flat(expected, 3)[0, 0], **close)
      np.testing.assert_allclose(
        flat(state.residual.value, 1),
        flat(simulated_state.residual.value, 2).reshape(4, -1),
        **close,
      )


def mesh_of(slices, chips, axis_type=AxisType.Auto):
  return jax.make_mesh(
    (slices, chips),
    AXES,
    axis_types=(axis_type,) * 2,
    devices=jax.devices()[: slices * chips],
  )


def test_chips_draw_differently():
  """Equal shares, one code that rounds at random: unequal results."""
  tree = jnp.full((2, 2, 2 * BLOCK), 0.3).at[..., ::BLOCK].set(1.0)
  exchange = hierarchical('gather_stochastic')
  run = lambda x: exchange.exchange(x, exchange.init(x, False))[0]
  result = simulated(run, tree)[0, 0]
  assert not np.array_equal(result[:BLOCK], result[BLOCK:])


def test_one_level_alone():
  """One chip a slice is the slow mean; one slice loses nothing."""
  name = 'delayed_two_shot_sign'
  coded = jd.error_feedback(hierarchical(name))
  grads = gradients(2, 1, 2)
  updates, _ = simulated(lambda g: walk(coded, g), grads)
  slow = jd.error_feedback(SLOW[name])
  run = jax.jit(jax.vmap(lambda g: walk(slow, g), axis_name='dcn'))
  want, _ = run({k: g[:, 0] for k, g in grads.items()})
  np.testing.assert_allclose(
    flat(updates, 3)[0, 0], flat(want, 2)[0], atol=1e-6
  )

  grads = gradients(1, 2, 2)
  updates, state = simulated(lambda g: walk(coded, g), grads)
  updates, came = flat(updates, 3)[0, 0], flat(grads, 3)[0].mean(0)
  np.testing.assert_allclose(updates, [0 * came[0], came[0]], atol=1e-6)
  assert not np.any(flat(state.residual.value, 2))


def step_and_state(tx, mesh, **kwargs):
  where = {'mesh': mesh, 'axis': AXES}
  loss = lambda p, x: jnp.mean((x @ p['w'] + p['b']) ** 2) * p['s']
  state = jd.init(tx, kwargs.get('params', params()), **where)
  return jd.train_step(loss, tx, **where), state


@pytest.mark.parametrize('name', SLOW)
def test_bytes_by_axis(name):
  slices, chips = 2, 4
  exchange = hierarchical(name)
  tx = optax.chain(jd.error_feedback(exchange), optax.sgd(0.1))
  shapes = jax.eval_shape(params)
  step, state = step_and_state(tx, mesh_of(slices, chips), params=shapes)
  batch = jax.ShapeDtypeStruct((16, 24), jnp.float32)
  sent = jd.traffic(step, state, batch).by_axis()
  share = jax.ShapeDtypeStruct((2 * BLOCK,), jnp.float32)  # 1001 / 4, in rows.
  whole = 4 * 4 * 2 * BLOCK
  lost = 2 * 4 * 3 / 4 if 'delayed' in name else 0
  assert sent.pop('dcn') == SLOW[name].bytes_sent(share, slices)
  assert sent.pop('ici') == 2 * whole * 3 / 4 + lost
  # The step's own flag, over all workers.
  assert sent == {'dcn,ici': 2 * 4 * 7 / 8}
  claimed = 2 * whole * 3 / 4 + lost + SLOW[name].bytes_sent(share, slices)
  assert exchange.bytes_sent(shapes, (slices, chips)) == claimed
  assert exchange.bytes_sent(shapes, (1, 1)) == 0


@needs_tpu_compiler
@pytest.mark.parametrize('name', ['dense', 'two_shot_sign'])
def test_a_chip_sends_its_share_between_slices_of_tpus(name):
  mesh = jd.topology_mesh('v5e:2x2', {'dcn': 2, 'ici': 4}, slices=2)
  exchange = hierarchical(name)

  def run(x):
    state = exchange.init(x, True)
    # The compiler must not know what is in the state.
    x, state = jax.lax.optimization_barrier((x, state))
    return exchange.exchange(x, state)[:2]

  step = jax.jit(
    jax.shard_map(run, mesh=mesh, in_specs=P(AXES), out_specs=(P(), P(AXES)))
  )
  place = NamedSharding(mesh, P(AXES))
  x = jax.ShapeDtypeStruct((8 * 512, 256), jnp.float32, sharding=place)
  sent = jd.traffic(step, x)
  share = jax.ShapeDtypeStruct((512 * 256 // 4,), jnp.float32)
  between = SLOW[name].bytes_sent(share, 2)
  assert sent.by_link() == {
    'between slices': between,
    'chip links': 2 * 4 * 512 * 256 * 3 / 4,
  }
  inside = {r.kind for r in sent.rows if r.link == 'chip links'}
  assert inside == {'reduce-scatter', 'all-gather'}
  own = jax.ShapeDtypeStruct((512, 256), jnp.float32)
  assert sent.bytes_a_step == exchange.bytes_sent(own, (2, 4))


def train(step, state, steps):
  for index in steps:
    batch = np.random.default_rng(index).normal(size=(16, 24))
    state, metrics = step(state, batch.astype(np.float32))
  return state, metrics


def test_dense_is_data_parallel():
  adam = optax.adam(1e-2)
  tx = optax.chain(jd.error_feedback(hierarchical('dense')), adam)
  step, state = step_and_state(tx, mesh_of(2, 2))
  places = jax.tree.map(lambda x: x.sharding, state)
  state, metrics = train(step, state, range(3))
  assert step._cache_size() == 1, 'the step compiles twice'
  jax.tree.map(
    lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(),
    state,
    places,
  )
  plain = optax.chain(jd.communicate(jd.mean('data')), adam)
  where = {'axis': 'data', 'workers': 4}
  loss = lambda p, x: jnp.mean((x @ p['w'] + p['b']) ** 2) * p['s']
  want, want_metrics = train(
    jd.train_step(loss, plain, **where),
    jd.init(plain, params(), **where),
    range(3),
  )
  np.testing.assert_allclose(metrics['loss'], want_metrics['loss'], rtol=1e-5)
  for key in SHAPES:  # Adam's roots blow up a last bit.
    np.testing.assert_allclose(
      state.params[key], want.params[key], rtol=2e-5, atol=1e-5
    )
  # A bad number on one chip: all skip the step.
  bad = np.ones((16, 24), np.float32)
  bad[5] = np.nan
  before = jax.device_get(state.params)
  state, metrics = step(state, bad)
  np.testing.assert_array_equal(metrics['skipped'], [1, 1, 1, 1])
  jax.tree.map(np.testing.assert_array_equal, state.params, before)


@pytest.mark.parametrize('name', ['one_bit_adam', 'dgc'])
def test_what_a_method_sends_whole_goes_in_two_levels_too(name):
  """Nothing is coded: on two levels as on one."""
  make = {
    'one_bit_adam': lambda c: jd.one_bit_adam(1e-2, c, warmup_steps=2),
    'dgc': lambda c: jd.dgc(c, max_norm=1.0),
  }[name]
  grads = gradients(2, 2, 4)
  got, _ = simulated(lambda g: walk(make(hierarchical('dense')), g), grads)
  one_level = jax.vmap(
    lambda g: walk(make(jd.mean('data')), g), axis_name='data'
  )
  want, _ = jax.jit(one_level)(
    jax.tree.map(lambda x: x.reshape(4, *x.shape[2:]), grads)
  )
  # Sums are taken in another order.
  np.testing.assert_allclose(
    flat(got, 3).reshape(4, 4, -1), flat(want, 2), rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize('name', ['two_shot_sign', 'delayed_two_shot_sign'])
def test_another_number_of_slices_loses_nothing(name, tmp_path):
  """What was handed in = applied + residuals + what the state holds."""
  exchange = hierarchical(name)
  tx = optax.chain(jd.error_feedback(exchange), optax.sgd(1.0))
  loss = lambda p, x: jnp.vdot(p, jnp.mean(x, 0))  # The batch is the gradient.
  start, size, came = jnp.zeros(900), 4 * BLOCK, np.zeros(900)
  rng, state = np.random.default_rng(0), None

  def check():
    feedback = state.opt_state[0]
    held = feedback.communicator
    residual = np.asarray(feedback.residual.value).mean(0)
    # By share: what is in flight, and rows of the chunks that were reduced.
    of_chips = lambda x: np.asarray(x).reshape(-1, 2, *x.shape[1:])
    rows = of_chips(held.dropped.value[0])
    assert np.any(rows)
    shares = np.moveaxis(rows, 1, 0).reshape(2, -1)[:, :size]
    if 'delayed' in name:
      shares = shares + of_chips(held.sent.value[0]).mean(0)
    total = shares.reshape(-1)[:900] + residual - np.asarray(state.params)
    # Some ten float32 additions of numbers of size up to ten.
    np.testing.assert_allclose(total, came, atol=2e-5)

  for turn, slices in enumerate((2, 4, 3)):
    where = {'mesh': mesh_of(slices, 2), 'axis': AXES}
    like = jd.init(tx, jax.eval_shape(lambda: start), **where)
    if state is None:
      state = jd.init(tx, start, **where)
    else:
      jd.save(tmp_path, turn, state)
      state = jd.restore(tmp_path, like)
      check()
    step = jd.train_step(loss, tx, **where)
    for _ in range(2):
      batch = rng.normal(size=(2 * slices, 900)).astype(np.float32)
      state, _ = step(state, batch)
      came += batch.mean(0)
    check()
  like = jd.init(tx, start, mesh=mesh_of(2, 3), axis=AXES)
  with pytest.raises(ValueError, match=r'held in 2 parts in .* and in 3'):
    jd.restore(tmp_path, like)


def test_workers_that_drift_meet():
  """The change of two steps through both levels; all workers end alike."""
  tx = jd.local_sgd(optax.sgd(0.1), hierarchical('two_shot_sign'), every=2)
  step, state = step_and_state(tx, mesh_of(2, 2))
  state, _ = train(step, state, range(4))
  w = np.asarray(state.params.value['w'])
  assert np.array_equal(w, np.broadcast_to(w[:1], w.shape))
  assert not np.array_equal(w[0], np.ones_like(w[0]))


def test_clients_that_are_not_drawn_keep_what_is_owed_of_their_share():
  """Applied + mean residual = weighted mean of the changes."""
  few = jd.mean('dcn', jd.top_k(1 / BLOCK, block_size=BLOCK), 'gather')
  both = jd.hierarchical(jd.mean('ici'), few)
  sgd = optax.sgd(1.0)
  tx = jd.fedavg(sgd, sgd, both, every=1, participation=0.5)
  weight = participation.drawn_weight(both.axis, 0.5, seed=0)

  def one_round(grads):
    start = jax.tree.map(jnp.zeros_like, grads)
    updates, state = tx.update(grads, tx.init(start), start)
    return updates, state.meeting.residual.value, weight(0)

  grads = jax.tree.map(lambda g: g[:, :, 0], gradients(2, 2, 1))
  applied, residual, weights = simulated(one_round, grads)
  assert sorted(np.ravel(weights)) == [0, 0, 2, 2]
  came = -(np.asarray(weights)[..., None] * flat(grads, 2)).mean((0, 1))
  owed = flat(residual, 2).mean((0, 1))
  # A few additions of float32 numbers of size up to ten.
  np.testing.assert_allclose(flat(applied, 2)[0, 0] + owed, came, atol=1e-5)


@pytest.mark.parametrize(
  ('fast', 'slow', 'message'),
  [
    (jd.mean('ici', SIGN), jd.mean('dcn'), 'fast must be the mean in full pre'),
    (jd.mean('ici', delay=1), jd.mean('dcn'), 'fast must be the mean in full'),
    (jd.mean('ici'), jd.gossip('dcn', 'ring'), 'slow must be a jd.mean'),
    (jd.mean('ici'), jd.low_rank_mean('dcn', 2), 'slow must be a jd.mean'),
    (jd.mean('ici'), jd.mean('ici', SIGN), "different axes, got 'ici' twice"),
  ],
)
def test_levels_that_cannot_be(fast, slow, message):
  with pytest.raises(ValueError, match=message):
    jd.hierarchical(fast, slow)


def test_axes_that_cannot_be():
  both = hierarchical('dense')
  with pytest.raises(ValueError, match=r"along \('dcn', 'ici'\), got 8"):
    both.bytes_sent(params(), 8)
  with pytest.raises(ValueError, match=r"share one axis, got \['dcn', \('dcn'"):
    jd.partition({'a': both, 'b': jd.mean('dcn')}, lambda tree: tree)
  with pytest.raises(ValueError, match='must lie along one axis'):
    jd.per_shard(both, P('fsdp'))
  tx = jd.error_feedback(hierarchical('dense'))
  with pytest.raises(ValueError, match='several need a mesh'):
    jd.init(tx, params(), axis=AXES, workers=4)
  with pytest.raises(ValueError, match='axis must be one of the axes of'):
    jd.init(tx, params(), axis=('dcn', 'tp'), mesh=mesh_of(2, 2))
