"""1-bit Adam, 1-bit LAMB and 0/1 Adam: limits, and loops in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import public
import pytest
from test_reference import BLOCK, WORKERS, Loop, signs

import jaxdist as jd

AXIS, STEPS, RATE, B1, B2, EPS = public.AXIS, 8, 0.05, 0.8, 0.9, 1e-4
SIGN = jd.mean(AXIS, jd.sign(block_size=BLOCK), 'two_shot')
EXACT = jd.mean(AXIS)
BETAS = {'b1': B1, 'b2': B2, 'eps': EPS}
# Two leaves, of which neither fills its blocks: 330 and 70 numbers.
SHAPES = {'a': (10, 33), 'b': (70,)}


def start():
  rng = np.random.default_rng(0)
  return {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}


@functools.cache
def gradients(quiet=1.0):
  """(steps, workers, ...); the second leaf's are ``quiet`` times as large."""
  rng = np.random.default_rng(1)
  draw = lambda s: rng.normal(size=(STEPS, WORKERS, *s)) + 0.5
  return {
    'a': draw(SHAPES['a']).astype(np.float32),
    'b': (quiet * draw(SHAPES['b'])).astype(np.float32),
  }


def flat(tree, axes=0):
  leaves = [np.asarray(tree[k], np.float64) for k in 'ab']
  return np.concatenate([x.reshape(*x.shape[:axes], -1) for x in leaves], -1)


def path(tx, grads):
  """Parameters after each step, (workers, steps, numbers), and the state."""
  params = jax.tree.map(jnp.asarray, start())
  params, state = public.run(tx, grads, params, walk=True)
  return flat(params, 2), state


def close(got, want):
  # A few hundred float32 sums; a division by a root of size one.
  np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


class Mean:
  """A code that drops nothing."""

  def exchange(self, x):
    return x.mean(0)


CODES = {
  'sign': (SIGN, lambda: Loop(signs, 'two_shot', 400)),
  'exact': (EXACT, Mean),
}


@pytest.mark.parametrize(('code', 'warmup'), [('sign', 3), ('exact', STEPS)])
def test_one_bit_adam_is_the_loop(code, warmup):
  """With a warm-up that lasts it is Adam without correction of the bias."""
  communicator, make = CODES[code]
  tx = jd.one_bit_adam(RATE, communicator, warmup, weight_decay=0.1, **BETAS)
  got, (state, *_) = path(tx, gradients())
  grads, params, loop = flat(gradients(), 2), flat(start()), make()
  m, v = np.zeros((2, 400))
  for step in range(STEPS):
    if step < warmup:
      g = grads[step].mean(0)
      m = B1 * m + (1 - B1) * g
      v = B2 * v + (1 - B2) * g**2
    else:
      m = loop.exchange(B1 * m + (1 - B1) * grads[step])
    params = params - RATE * (m / (np.sqrt(v) + EPS) + 0.1 * params)
    for worker in range(WORKERS):
      close(got[worker, step], params)
  close(flat(state.nu, 1)[0], v)
  for leaf in jax.tree.leaves((state.mu, state.nu)):  # To the last bit.
    np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))


def test_numbers_without_variance_stay():
  many = jax.tree.map(np.copy, gradients())
  many['a'][:3, :, 4] = 0  # A row without gradient in the warm-up.
  got, _ = path(jd.one_bit_adam(RATE, SIGN, 3, **BETAS), many)
  row = slice(4 * 33, 5 * 33)
  np.testing.assert_array_equal(
    got[0, :, row], np.tile(flat(start())[row], (STEPS, 1)).astype(np.float32)
  )
  assert np.all(got[0, -1, : 4 * 33] != got[0, -2, : 4 * 33])


def test_one_bit_lamb_is_the_loop():
  """Its second leaf has gradients a thousand times smaller."""
  warmup, weight_decay = 4, 0.1
  many = gradients(quiet=1e-3)
  betas = BETAS | {'eps': 1e-7}
  tx = jd.one_bit_lamb(RATE, SIGN, warmup, weight_decay=weight_decay, **betas)
  got, (state, _) = path(tx, many)
  grads, params = flat(many, 2), flat(start())
  loop = Loop(signs, 'two_shot', 400)
  leaves = {'a': slice(0, 330), 'b': slice(330, 400)}
  m, v, fresh = np.zeros((3, 400))
  scale = np.ones(400)
  ratio, factor = dict.fromkeys('ab', 0.0), dict.fromkeys('ab', 1.0)
  norm = np.linalg.norm
  for step in range(STEPS):
    before = m
    if step < warmup:
      g = grads[step].mean(0)
      m = B1 * m + (1 - B1) * g
      v = B2 * v + (1 - B2) * g**2
      fresh = v
      rms = {k: np.sqrt(np.mean(m[s] ** 2)) for k, s in leaves.items()}
      for k, s in leaves.items():
        scale[s] = np.mean(list(rms.values())) / rms[k]
    else:
      own = B1 * m + (1 - B1) * grads[step]
      m = loop.exchange(own * scale) / scale
      g = (m - B1 * before) / (1 - B1)
      fresh = B2 * fresh + (1 - B2) * g**2
    adaptive = m / (np.sqrt(v) + 1e-7)
    direction = adaptive + weight_decay * params
    moved = params.copy()
    for k, s in leaves.items():
      if step < warmup:
        trust = np.clip(norm(params[s]) / norm(direction[s]), 0.01, 10)
        ratio[k] = 0.9 * ratio[k] + 0.1 * trust
      else:
        grown = (np.sqrt(v[s]) + 1e-7) / (np.sqrt(fresh[s]) + 1e-7)
        part = min(1, norm(adaptive[s]) / norm(direction[s]))
        wanted = np.clip(part * grown.max() + 1 - part, 0.5, 4)
        factor[k] = np.clip(wanted, 0.9 * factor[k], 1.1 * factor[k])
        trust = ratio[k] * factor[k]
      moved[s] -= RATE * trust * direction[s]
    params = moved
    np.testing.assert_allclose(got[0, step], params, rtol=1e-4, atol=1e-4)
  for k in 'ab':
    np.testing.assert_allclose(state.ratio[k][0], ratio[k], rtol=1e-4)
    np.testing.assert_allclose(state.factor[k][0], factor[k], rtol=1e-4)
  assert state.scale['b'][0] > 100 * state.scale['a'][0]


def test_zero_one_adam_is_the_loop():
  """Steps: two refreshes, one compressed, a refresh; alone and together."""
  tx = jd.zero_one_adam(
    lambda step: RATE * (1 + step),
    SIGN,
    4,
    refreshes=2,
    double_every=2,
    max_local=2,
    **BETAS,
  )
  got, state = path(tx, gradients())
  grads, loop = flat(gradients(), 2), Loop(signs, 'two_shot', 400)
  params, m = np.tile(flat(start()), (WORKERS, 1)), np.zeros((WORKERS, 400))
  anchor, v, rates = params[0], np.zeros(400), 0.0
  for step in range(STEPS):
    rate = RATE * (1 + step)
    if step in (0, 1, 3):  # At a distance of one, twice; then of two.
      g = grads[step].mean(0)
      v = B2 * v + (1 - B2) * g**2
    elif step == 2:
      g = loop.exchange(grads[step])
    else:
      g = grads[step]
    if step == 4:
      loop = Loop(signs, 'two_shot', 400)
    m = B1 * m + (1 - B1) * g
    root = np.sqrt(v) + EPS
    params = params - rate * m / root
    if step < 4:
      anchor = params[0]
    else:
      rates += rate
    if step in (4, 5, 7):
      u = loop.exchange((params - anchor) * root)
      anchor = anchor + u / root
      params = np.tile(anchor, (WORKERS, 1))
      m = np.tile(-u / rates, (WORKERS, 1))
      rates = 0.0
    for worker in range(WORKERS):
      close(got[worker, step], params[worker])
    # Adding the way to the anchor to parameters that differ rounds once.
    assert (np.ptp(got[:, step], axis=0).max() > 1e-6) == (step == 6)
  assert state.refreshes[0] == 3


def test_zero_one_adam_that_always_meets_is_momentum_sgd():
  """Behind the diagonal of the variance at ``freeze_step``."""
  tx = jd.zero_one_adam(RATE, EXACT, 1, max_local=1, **BETAS)
  got, state = path(tx, gradients())
  same = jd.one_bit_adam(RATE, EXACT, 1, **BETAS)
  want, _ = path(same, gradients())
  close(got, want)
  np.testing.assert_array_equal(state.rate_sum, 0)


@pytest.mark.parametrize(
  ('make', 'warmup'), [(jd.one_bit_adam, 1), (jd.one_bit_lamb, 9)]
)
def test_bad_numbers_leave_no_trace(make, warmup):
  """Steps: good, good, bad on one worker, good; compressed, and warming up."""
  bad = jax.tree.map(lambda g: g[[0, 1, 1, 2]], gradients())
  bad['a'][2, 3, 1, 1] = np.nan
  tx = make(RATE, SIGN, warmup, **BETAS)
  got, (state, *_) = path(tx, bad)
  want, (clean, *_) = path(tx, jax.tree.map(lambda g: g[:3], gradients()))
  np.testing.assert_array_equal(got[:, [0, 1, 3]], want)
  np.testing.assert_array_equal(state.skipped, 1)
  jax.tree.map(
    np.testing.assert_array_equal,
    state._replace(skipped=None),
    clean._replace(skipped=None),
  )


def test_zero_one_adam_leaves_bad_gradients_out():
  """Together while gradients are exchanged, alone later."""
  many = jax.tree.map(np.copy, gradients())
  for step in (0, 1, 5):
    many['a'][step, 3, 1, 1] = np.inf
  tx = jd.zero_one_adam(RATE, SIGN, 4, refreshes=1, max_local=1)
  got, state = path(tx, many)
  assert np.isfinite(got).all()
  np.testing.assert_array_equal(got[:, 1], np.tile(flat(start()), (WORKERS, 1)))
  np.testing.assert_array_equal(state.skipped.value, [2, 2, 2, 3, 2])


METHODS = {
  'one_bit_adam': lambda c: jd.one_bit_adam(1e-3, c, 100),
  'one_bit_lamb': lambda c: jd.one_bit_lamb(1e-3, c, 100),
  'zero_one_adam': lambda c: jd.zero_one_adam(1e-3, c, 100, max_local=4),
}


@pytest.mark.parametrize('name', METHODS)
def test_bytes_of_both_phases(name, make_mesh):
  where = {'axis': AXIS, 'mesh': make_mesh(8)}
  tx, params = METHODS[name](SIGN), {'w': jnp.ones((30, 20))}
  step = jd.train_step(lambda p, x: jnp.sum((x @ p['w']) ** 2), tx, **where)
  traffic = jd.traffic(step, jd.init(tx, params, **where), jnp.ones((16, 30)))
  assert not any(row.in_unknown_branch for row in traffic.rows)
  claim = SIGN.bytes_sent(params, 8)
  in_stage = lambda i: sum(
    row.bytes_sent
    for row in traffic.rows
    if f'jaxdist.warmup.{i}' in row.source
  )
  assert in_stage(0) == EXACT.bytes_sent(params, 8)
  if name == 'zero_one_adam':
    assert in_stage(1) == claim
    assert traffic.bytes_a_step == claim / 4
  else:  # And the flag by which all skip a bad step.
    assert traffic.bytes_a_step == claim + 2 * 4 * 7 / 8


def test_learns_where_it_says():
  """A quadratic of unequal curvatures, from noisy gradients."""
  scales = jnp.logspace(-2, 0, 256).reshape(16, 16)
  noise = jax.random.normal(jax.random.key(0), (300, WORKERS, 16, 16))

  def last(tx):
    def worker(noise):
      def step(carry, noise):
        x, state = carry
        updates, state = tx.update(scales * x + 0.1 * noise, state, x)
        return (optax.apply_updates(x, updates), state), None

      x = jnp.ones((16, 16))
      (x, _), _ = jax.lax.scan(step, (x, tx.init(x)), noise)
      return jnp.sum(scales * x**2) / 2

    return float(jax.vmap(worker, 1, axis_name=AXIS)(noise)[0])

  decay = optax.linear_schedule(0.03, 0.0, 300)
  adam = last(jd.one_bit_adam(decay, EXACT, 300, b2=0.98))
  for make in (jd.one_bit_adam, jd.zero_one_adam):
    assert last(make(decay, SIGN, 60, b2=0.98)) < 1.5 * adam
