"""SCALLION and SCAFCOM against NumPy, in the form of their paper."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import public
import pytest

import jaxdist as jd
from jaxdist.outer.participation import drawn_weight

WORKERS, SIZE = 4, 6
# Float32 against float64, of numbers of size one.
CLOSE = {'rtol': 1e-4, 'atol': 2e-5}
MEAN = jd.mean(public.AXIS)
TOP = jd.mean(public.AXIS, jd.global_top_k(1 / 3), 'gather')
RATE, SERVER, EVERY = 0.1, 0.7, 3


def gradients(steps, size=SIZE):
  rng = np.random.default_rng(0)
  return rng.normal(size=(steps, WORKERS, size)).astype(np.float32)


def walk(tx, grads):
  """Parameters of each worker after each step, and the state."""
  start = jnp.arange(float(grads.shape[-1]))
  path, state = public.run(tx, grads, start, walk=True)
  return np.asarray(path), state


def top(x):
  """The two largest of six."""
  kept = np.argsort(-abs(x))[:2]
  return np.where(np.isin(np.arange(SIZE), kept), x, 0)


def who(rounds, participation):
  """Whether each worker takes part, for each round."""
  weight = drawn_weight(public.AXIS, participation, 0)
  every = lambda count: jax.vmap(
    lambda i: weight(count) + 0 * i, axis_name=public.AXIS
  )(jnp.arange(WORKERS))
  return np.array([every(count) > 0 for count in range(rounds)])


def paper(grads, taking_part, code, scale, beta, rates):
  """The paper's rounds: messages are read off the way that y went."""
  x = np.arange(float(SIZE))
  c, ci, vi = np.zeros(SIZE), *np.zeros((2, WORKERS, SIZE))
  path = []
  for turn, part in enumerate(taking_part):
    y = np.tile(x, (WORKERS, 1))
    eta = rates[turn * EVERY]
    for k in range(EVERY):
      g = grads[turn * EVERY + k]
      y[part] -= eta * (beta * g + (1 - beta) * vi - ci + c)[part]
      path.append(y.copy())
    sent = np.zeros((WORKERS, SIZE))
    for i in np.flatnonzero(part):
      delta = (x - y[i]) / (eta * EVERY) - c
      vi[i] = ci[i] + delta if beta < 1 else 0
      sent[i] = code(scale * delta)
    ci += sent
    x = x - SERVER * eta * EVERY * (sent.sum(0) / part.sum() + c)
    c = c + sent.sum(0) / WORKERS
    path[-1][:] = x
  return np.stack(path, axis=1), c, ci, vi


@pytest.mark.parametrize('method', ['scallion', 'scafcom'])
def test_it_is_the_paper(method):
  rounds = 5
  grads = gradients(rounds * EVERY)
  # A rate that changes between rounds, by a schedule over steps.
  rates = [RATE / (1 + step // EVERY) for step in range(rounds * EVERY)]
  schedule = lambda step: RATE / (1 + step // EVERY)
  options = {'participation': 0.5, 'server_learning_rate': SERVER}
  if method == 'scallion':
    tx = jd.scallion(schedule, MEAN, EVERY, scale=0.4, **options)
    arguments = (lambda x: x, 0.4, 1.0)
  else:
    tx = jd.scafcom(schedule, TOP, EVERY, beta=0.3, **options)
    arguments = (top, 1.0, 0.3)
  taking_part = who(rounds, 0.5)
  assert (taking_part.sum(1) == 2).all()
  assert len(np.unique(taking_part, axis=0)) > 1
  path, state = walk(tx, grads)
  want, c, ci, vi = paper(grads, taking_part, *arguments, rates)
  np.testing.assert_allclose(path, want, **CLOSE)
  found = state.meeting
  np.testing.assert_allclose(found.control[0], c, **CLOSE)
  np.testing.assert_allclose(found.own.value, ci, **CLOSE)
  np.testing.assert_allclose(np.mean(found.own.value, 0), c, **CLOSE)
  if method == 'scafcom':
    np.testing.assert_allclose(found.momentum.value, vi, **CLOSE)


@pytest.mark.parametrize('method', ['scallion', 'scafcom'])
def test_without_loss_it_is_scaffold(method):
  """Which sends both the change of the parameters and of the control."""
  rounds = 4
  grads = gradients(rounds * EVERY)
  make = {
    'scallion': lambda **options: jd.scallion(scale=1.0, **options),
    'scafcom': lambda **options: jd.scafcom(beta=1.0, **options),
  }[method]
  tx = make(
    learning_rate=RATE,
    communicator=MEAN,
    every=EVERY,
    participation=0.5,
    server_learning_rate=SERVER,
  )
  x, c, ci = np.arange(float(SIZE)), np.zeros(SIZE), np.zeros((WORKERS, SIZE))
  path, _ = walk(tx, grads)
  for turn, part in enumerate(who(rounds, 0.5)):
    y = np.tile(x, (WORKERS, 1))
    for k in range(EVERY):
      y -= RATE * (grads[turn * EVERY + k] - ci + c)
    new = ci - c + (x - y) / (EVERY * RATE)
    x = x + SERVER * (y - x)[part].mean(0)
    c = c + (new - ci)[part].sum(0) / WORKERS
    ci[part] = new[part]
    last = path[:, (turn + 1) * EVERY - 1]
    np.testing.assert_allclose(last, np.tile(x, (WORKERS, 1)), **CLOSE)


def test_one_step_rounds_of_all_are_data_parallelism_and_ef21_sgdm():
  grads = gradients(6)
  step = optax.scale(-RATE * SERVER)
  options = {'every': 1, 'server_learning_rate': SERVER}
  dense, _ = walk(optax.chain(jd.communicate(MEAN), step), grads)
  path, _ = walk(jd.scallion(RATE, MEAN, scale=1.0, **options), grads)
  np.testing.assert_allclose(path, dense, **CLOSE)
  momentum = jd.per_worker(optax.ema(0.8, debias=False))
  ef21, _ = walk(optax.chain(momentum, jd.ef21(TOP), step), grads)
  path, _ = walk(jd.scafcom(RATE, TOP, beta=0.2, **options), grads)
  np.testing.assert_allclose(path, ef21, **CLOSE)


def test_worker_without_a_finite_gradient_leaves_its_step_out():
  grads = gradients(2 * EVERY)
  grads[1, 2, 3] = np.nan
  path, state = walk(jd.scafcom(RATE, TOP, EVERY), grads)
  assert np.isfinite(path).all()
  np.testing.assert_array_equal(path[2, 1], path[2, 0])
  np.testing.assert_array_equal(state.skipped.value, [0, 0, 1, 0])
  found = state.meeting
  assert found.skipped[0] == 0
  np.testing.assert_allclose(
    found.control[0], np.mean(found.own.value, 0), **CLOSE
  )


def test_bytes_are_those_of_a_round(make_mesh):
  where = {'axis': public.AXIS, 'mesh': make_mesh(8)}
  code = jd.random_k(0.25, block_size=128, unbiased=True)
  communicator = jd.mean(public.AXIS, code)
  tx = jd.scallion(0.1, communicator, 5, participation=0.5)
  params = {'w': jnp.ones((24, 20))}
  step = jd.train_step(lambda p, x: jnp.mean((x @ p['w']) ** 2), tx, **where)
  traffic = jd.traffic(step, jd.init(tx, params, **where), jnp.ones((8, 24)))
  claimed = communicator.bytes_sent(params, 8) / 5
  assert traffic.bytes_a_step == pytest.approx(claimed, rel=1e-9)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: jd.scallion(0.1, TOP, 2), 'unbiased code.*Use jd.scafcom'),
    (
      lambda: jd.scafcom(
        0.1, jd.mean('data', jd.random_k(0.1, unbiased=True)), 2
      ),
      'needs a code that contracts',
    ),
    (lambda: jd.scallion(0.1, MEAN, 0), 'every must be an integer of at least'),
    (lambda: jd.scallion(0.1, MEAN, 2, scale=0.0), r'scale must be in \(0, 1'),
    (lambda: jd.scafcom(0.1, MEAN, 2, beta=1.5), r'beta must be in \(0, 1'),
    (
      lambda: jd.scallion(0.1, MEAN, 2, participation=0.0),
      r'participation must be in \(0, 1\], got 0',
    ),
    (
      lambda: jd.scafcom(0.1, MEAN, 2, server_learning_rate=-1.0),
      r'server_learning_rate must be positive, got -1',
    ),
  ],
)
def test_bad_options_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_second_encoding_that_would_add_up_is_refused():
  code = jd.random_k(0.25, block_size=128, unbiased=True)
  with pytest.raises(ValueError, match="may take 'two_shot'"):
    jd.scallion(0.1, jd.mean(public.AXIS, code, 'two_shot'), 1)
