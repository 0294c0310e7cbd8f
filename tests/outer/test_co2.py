"""CO2: a loop in NumPy, and the methods that it becomes at its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import public
import pytest

import jaxdist as jd

WORKERS, EVERY = 4, 2
# Sums in another order, of numbers of size one.
CLOSE = {'rtol': 1e-5, 'atol': 1e-6}
MEAN = jd.mean(public.AXIS)
INNER = optax.sgd(0.1, momentum=0.5)


def gradients(steps, workers=WORKERS):
  rng = np.random.default_rng(0)
  return rng.normal(size=(steps, workers, 6)).astype(np.float32)


def walk(tx, grads):
  """Parameters of each worker after each step, (workers, steps, 6)."""
  path = public.run(tx, grads, jnp.arange(6.0), walk=True)[0]
  return np.asarray(path)


def loop(grads, rate, momentum, clip, penalty, anchor):
  """Where rounds begin, in NumPy."""
  slow = previous = np.arange(6.0)
  trace, m = np.zeros_like(grads[0]), np.zeros(6)
  arrived, starts = None, []
  for round_grads in grads.reshape(-1, EVERY, *grads.shape[1:]):
    fast = np.tile(slow, (len(trace), 1))
    for grad in round_grads:
      trace = 0.5 * trace + grad
      fast = fast - 0.1 * trace
    sent, arrived = arrived, fast.mean(0)
    if sent is not None:
      d = (previous if anchor == 'previous' else slow) - sent
      moved = np.linalg.norm(slow - previous)
      divisor = penalty or 1 + moved / (np.linalg.norm(d) + 1e-12)
      m = np.clip(momentum * m + d / divisor, -clip, clip)
      previous, slow = slow, slow - rate * m
    starts.append(slow)
  return np.stack(starts)


@pytest.mark.parametrize(
  ('rate', 'momentum', 'clip', 'penalty', 'anchor'),
  [
    (1.0, 0.5, 0.05, None, 'previous'),
    (0.7, 0.2, 1.0, None, 'current'),
    (0.5, 0.9, 0.1, 2.0, 'previous'),
  ],
)
def test_co2_is_the_loop(rate, momentum, clip, penalty, anchor):
  tx = jd.co2(
    INNER,
    MEAN,
    EVERY,
    learning_rate=rate,
    momentum=momentum,
    clip=clip,
    penalty=penalty,
    anchor=anchor,
  )
  grads = gradients(7 * EVERY)
  path = walk(tx, grads)
  want = loop(grads, rate, momentum, clip, penalty, anchor)
  for worker in range(WORKERS):
    np.testing.assert_allclose(path[worker, EVERY - 1 :: EVERY], want, **CLOSE)


def test_without_delay_and_momentum_it_is_local_sgd():
  grads = gradients(8)
  tx = jd.co2(INNER, MEAN, EVERY, momentum=0.0, clip=np.inf, delay=0)
  want = walk(jd.local_sgd(INNER, MEAN, EVERY), grads)
  np.testing.assert_allclose(walk(tx, grads), want, **CLOSE)


def test_without_delay_it_is_slow_momentum():
  grads = gradients(8)
  tx = jd.co2(
    INNER, MEAN, EVERY, learning_rate=0.7, momentum=0.5, clip=np.inf, delay=0
  )
  slow_momentum = jd.diloco(INNER, optax.sgd(0.7, momentum=0.5), MEAN, EVERY)
  np.testing.assert_allclose(
    walk(tx, grads), walk(slow_momentum, grads), **CLOSE
  )


def test_bare_it_is_the_closed_recursion():
  """On a quadratic: x' = x - c x_before, with c what a round contracts."""
  tx = jd.co2(optax.sgd(0.2), MEAN, 3, momentum=0.0, clip=np.inf, penalty=1.0)

  def worker(_):
    def one(carry, _):
      p, state, zero = carry
      updates, state = tx.update(p + zero, state, p)
      return (optax.apply_updates(p, updates), state, zero), p

    zero = 0.0 * jax.lax.axis_index(public.AXIS)
    start = jnp.array([1.0, -2.0]) + zero
    carry = (start, tx.init(start), zero)
    return jax.lax.scan(one, carry, length=25)[1]

  path = jax.jit(jax.vmap(worker, axis_name=public.AXIS))(jnp.arange(2))
  before = x = np.array([1.0, -2.0])
  contracted = 1 - 0.8**3
  arrived = 0.0
  for start in np.asarray(path)[0, ::3]:
    np.testing.assert_allclose(start, x, **CLOSE)
    # Nothing has arrived at the end of the first round.
    before, x, arrived = x, x - arrived, contracted * x
  del before


def test_anchored_at_the_current_parameters_every_other_round_is_a_run():
  """Even rounds and odd ones are local SGD, each on its own."""
  grads = gradients(6 * EVERY)
  tx = jd.co2(
    optax.sgd(0.1),
    MEAN,
    EVERY,
    momentum=0.0,
    clip=np.inf,
    penalty=1.0,
    anchor='current',
  )
  path = walk(tx, grads)[0, EVERY - 1 :: EVERY]
  rounds = grads.reshape(6, EVERY, WORKERS, 6)
  for first in (0, 1):
    own = rounds[first::2].reshape(-1, WORKERS, 6)
    alone = walk(jd.local_sgd(optax.sgd(0.1), MEAN, EVERY), own)
    ends = alone[0, EVERY - 1 :: EVERY]
    # What a round ended with is where the next but one begins.
    np.testing.assert_allclose(path[first + 1 :: 2], ends[: 3 - first], **CLOSE)


def test_nothing_moves_without_steps():
  tx = jd.co2(optax.sgd(0.0), MEAN, EVERY, momentum=0.5)
  path = walk(tx, gradients(6))
  np.testing.assert_array_equal(path, np.tile(np.arange(6.0), (4, 6, 1)))


def test_equal_workers_are_one_worker():
  tx = jd.co2(INNER, MEAN, EVERY, momentum=0.5, clip=0.1)
  one = gradients(8, workers=1)
  got, want = walk(tx, one.repeat(WORKERS, 1)), walk(tx, one)
  np.testing.assert_array_equal(got, got[:1].repeat(WORKERS, 0))
  np.testing.assert_allclose(got[:1], want, **CLOSE)


def test_safeguards_hold_where_the_bare_method_diverges():
  """Long rounds and much momentum on a quadratic with noise, 3 seeds."""
  ends = {}
  for name, options in {
    'bare': {'penalty': 1.0, 'clip': np.inf},
    'penalty': {'clip': np.inf},
    'both': {'clip': 0.1},
  }.items():
    tx = jd.co2(optax.sgd(0.1), MEAN, 24, momentum=0.5, **options)

    def worker(key, tx=tx):
      def one(carry, key):
        p, state = carry
        grad = p + 0.1 * jax.random.normal(key, p.shape)
        updates, state = tx.update(grad, state, p)
        p = optax.apply_updates(p, updates)
        return (p, state), None

      keys = jax.random.split(key, 24 * 25)
      start = jnp.ones(20)
      return jax.lax.scan(one, (start, tx.init(start)), keys)[0][0]

    seeds = jax.random.split(jax.random.key(0), (3, WORKERS))
    end = jax.jit(jax.vmap(jax.vmap(worker, axis_name=public.AXIS)))(seeds)
    ends[name] = np.linalg.norm(end, axis=-1).max(-1)
  assert (ends['bare'] > 20).all()
  assert (ends['penalty'] < ends['bare'] / 5).all()
  assert (ends['both'] < 2).all()


def test_a_rounds_bytes_are_the_communicators(make_mesh):
  communicator = jd.mean(public.AXIS, jd.quantize(bits=4, block_size=128))
  tx = jd.co2(INNER, communicator, every=12)
  where = {'axis': public.AXIS, 'mesh': make_mesh(8)}
  params = {'w': jnp.ones((24, 20))}
  step = jd.train_step(lambda p, x: jnp.mean((x @ p['w']) ** 2), tx, **where)
  traffic = jd.traffic(step, jd.init(tx, params, **where), jnp.ones((8, 24)))
  claimed = communicator.bytes_sent(params, 8) / 12
  assert traffic.bytes_a_step == pytest.approx(claimed, rel=1e-9)


def test_a_diverged_round_is_dropped_by_all():
  grads = gradients(10)
  grads[2, 1:3] = 3e38  # Finite on each worker; their sum is not.
  tx = jd.co2(optax.sgd(1.0), MEAN, EVERY)
  path, state = public.run(tx, grads, jnp.arange(6.0), walk=True)
  assert np.isfinite(path).all()
  np.testing.assert_array_equal(state.meeting.skipped, np.ones(WORKERS))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.meeting))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'learning_rate': -1.0}, r'learning_rate must be at least 0, got -1'),
    ({'momentum': 1.0}, r'momentum must be in \[0, 1\), got 1'),
    ({'clip': 0.0}, r'clip must be positive, got 0'),
    ({'penalty': 0.5}, r'penalty must be at least 1, got 0\.5'),
    ({'delay': 2}, r'delay must be 0 or 1 rounds, got 2'),
    ({'decay': 0.5}, r'decay does nothing without feedback'),
    ({'communicator': jd.gossip(public.AXIS)}, 'same result'),
  ],
)
def test_bad_options_are_refused(options, message):
  options = {'communicator': MEAN, 'every': 2} | options
  with pytest.raises(ValueError, match=message):
    jd.co2(optax.sgd(0.1), **options)
