"""EF21 and EControl: limits, identities, and a loop over workers in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import public
import pytest

import jaxdist as jd
from jaxdist.compressors.base import Compressor

AXIS, WORKERS, STEPS, BLOCK = public.AXIS, 5, 6, 128
TOP_K = jd.top_k(0.1, block_size=BLOCK)
GATHER = jd.mean(AXIS, TOP_K, 'gather')
TWO_SHOT = jd.mean(AXIS, TOP_K, 'two_shot')
# Sums in another order, over at most a few hundred numbers of size one.
CLOSE = {'rtol': 1e-5, 'atol': 1e-5}

METHODS = {
  'ef21': jd.ef21,
  'econtrol': jd.econtrol,
  'econtrol_0.03': lambda c: jd.econtrol(c, control=0.03),
}


def top_13(x):
  """The codes of a long vector, block by block."""
  out = np.zeros_like(x)
  for start in range(0, len(x), BLOCK):
    row = x[start : start + BLOCK]
    kept = sorted(range(len(row)), key=lambda i: (-abs(row[i]), i))[:13]
    out[start : start + BLOCK][kept] = row[kept]
  return out


def steps_of(gradients):
  """(steps, workers, numbers), with leaves laid end to end."""
  leaves = jax.tree.leaves(gradients)
  return np.concatenate([x.reshape(*x.shape[:2], -1) for x in leaves], axis=2)


def flat(tree, axes):
  leaves = [np.asarray(x) for x in jax.tree.leaves(tree)]
  return np.concatenate([x.reshape(*x.shape[:axes], -1) for x in leaves], axes)


@pytest.mark.parametrize('name', METHODS)
@pytest.mark.parametrize('communicator', [GATHER, TWO_SHOT])
def test_is_the_loop(name, communicator):
  gradients = public.gradients(WORKERS, STEPS)
  tx = METHODS[name](communicator)
  updates, state = public.run(tx, gradients, public.params())
  eta = {'ef21': 0.0, 'econtrol': 13 / 128, 'econtrol_0.03': 0.03}[name]

  numbers = steps_of(gradients)
  size = -(-numbers.shape[2] // (BLOCK * WORKERS)) * BLOCK * WORKERS
  grads = np.zeros((*numbers.shape[:2], size), np.float32)
  grads[..., : numbers.shape[2]] = numbers
  estimate, error = np.zeros((2, WORKERS, size))
  mean, dropped = np.zeros(size), np.zeros(size)
  for step in range(STEPS):
    change = grads[step] - estimate
    sent = np.stack([top_13(x) for x in (eta * error + change)])
    error += change - sent
    estimate += sent
    arrives = sent.mean(0)
    if communicator is TWO_SHOT:
      wanted = arrives + dropped
      arrives = top_13(wanted)
      dropped = wanted - arrives
    mean += arrives
    got = flat(updates, 2)[0, step]
    np.testing.assert_allclose(got, mean[: len(got)], **CLOSE)
  got = flat(state.estimate.value, 1)
  np.testing.assert_allclose(got, estimate[:, : got.shape[1]], **CLOSE)


@pytest.mark.parametrize('name', ['ef21', 'econtrol'])
def test_exact_code_is_data_parallel(name):
  gradients = public.gradients(WORKERS, 4)
  exact = METHODS[name](jd.mean(AXIS, jd.top_k(1.0, block_size=BLOCK)))
  dense = jd.communicate(jd.mean(AXIS))
  got, state = public.run(exact, gradients, public.params())
  want, _ = public.run(dense, gradients, public.params())
  # The mean is a sum of changes: it is rounded once a step.
  np.testing.assert_allclose(flat(got, 2), flat(want, 2), rtol=0, atol=1e-6)
  if name != 'ef21':
    np.testing.assert_allclose(flat(state.error.value, 1), 0, atol=1e-6)


def test_econtrol_without_control_is_ef21():
  gradients = public.gradients(WORKERS, STEPS)
  run = lambda tx: public.run(tx, gradients, public.params(), walk=True)
  want, ef21 = run(optax.chain(jd.ef21(TWO_SHOT), optax.sgd(0.1)))
  got, econtrol = run(
    optax.chain(jd.econtrol(TWO_SHOT, control=0.0), optax.sgd(0.1))
  )
  jax.tree.map(np.testing.assert_array_equal, got, want)
  jax.tree.map(
    np.testing.assert_array_equal,
    (econtrol[0].estimate, econtrol[0].communicator),
    (ef21[0].estimate, ef21[0].communicator),
  )


@pytest.mark.parametrize('name', ['ef21', 'econtrol_0.03'])
def test_errors_and_the_mean_add_up_after_many_steps(name):
  """Of a thousand steps: the mean of estimates, and what they missed."""
  steps = 1000
  grads = np.random.default_rng(0).normal(size=(steps, WORKERS, 300))
  tx = METHODS[name](GATHER)
  updates, state = public.run(tx, grads.astype(np.float32), jnp.zeros(300))
  mean = np.asarray(state.estimate.value, np.float64).mean(0)
  # Two sums of a thousand float32 numbers of size one.
  np.testing.assert_allclose(state.mean[0], mean, atol=1e-5)
  if name != 'ef21':
    missed = grads.sum(0).mean(0) - np.asarray(updates[0], np.float64).sum(0)
    owed = np.asarray(state.error.value, np.float64).mean(0)
    np.testing.assert_allclose(owed, missed, atol=1e-3)


def test_virtual_iterate_takes_the_steps_of_sgd():
  """Params minus the rate times the mean error: whatever code and control."""
  rate, steps = 0.05, 40
  grads = np.random.default_rng(1).normal(size=(steps, WORKERS, 300))
  tx = optax.chain(jd.econtrol(GATHER), optax.sgd(rate))
  path, state = public.run(
    tx, grads.astype(np.float32), jnp.zeros(300), walk=True
  )
  virtual = path[0, -1] - rate * np.mean(state[0].error.value, axis=0)
  sgd = -rate * grads.mean(1).sum(0)
  np.testing.assert_allclose(virtual, sgd, atol=1e-5)


@pytest.mark.parametrize('name', ['ef21', 'econtrol'])
def test_what_is_left_to_send_vanishes_when_gradients_rest(name):
  grad = np.random.default_rng(2).normal(size=(1, WORKERS, 300))
  same = np.repeat(grad.astype(np.float32), 120, axis=0)
  for communicator in (GATHER, TWO_SHOT):
    updates, state = public.run(METHODS[name](communicator), same, same[0, 0])
    left = np.asarray(state.estimate.value) - same[0]
    if name == 'ef21':  # Thirteen of a block a step, each whole: ten steps.
      np.testing.assert_allclose(left, 0, atol=1e-6)
      np.testing.assert_allclose(updates[0, -1], same[0].mean(0), atol=1e-5)
    else:  # The error that is fed back fades by a part a step.
      assert np.abs(left).max() < 0.02


def weighted(communicator, gradients, factors):
  """EF21-W as it is published, for weights ``factors / workers``."""

  def worker(grads, factor):
    def step(carry, grad):
      estimate, mean, state = carry
      change = grad / factor - estimate
      _, sent, state = communicator.exchange(change, state)
      mean = mean + jax.lax.pmean(factor * sent, AXIS)
      return (estimate + sent, mean, state), mean

    zeros = jnp.zeros_like(grads[0])
    carry = (zeros, zeros, communicator.init(zeros, feedback=False))
    (estimate, _, _), means = jax.lax.scan(step, carry, grads)
    return estimate, means

  return jax.jit(jax.vmap(worker, (1, 0), axis_name=AXIS))(gradients, factors)


FACTORS = np.array([2, 1, 0.5, 0.25, 1.25], np.float32)  # Of mean one.


@pytest.mark.parametrize(
  'code', [TOP_K, jd.sign(block_size=BLOCK), jd.quantize(block_size=BLOCK)]
)
def test_weights_of_ef21_w_cancel(code):
  communicator = jd.mean(AXIS, code, 'gather')
  grads = np.random.default_rng(3).normal(size=(20, WORKERS, 300))
  grads = grads.astype(np.float32)
  want, state = public.run(jd.ef21(communicator), grads, grads[0, 0])
  estimate, means = weighted(communicator, grads, FACTORS)
  np.testing.assert_allclose(
    FACTORS[:, None] * estimate, state.estimate.value, **CLOSE
  )
  np.testing.assert_allclose(means, want, **CLOSE)
  # The first four are powers of two: not a bit differs.
  np.testing.assert_array_equal(
    FACTORS[:4, None] * estimate[:4], state.estimate.value[:4]
  )


def test_weights_matter_for_a_code_that_does_not_scale():
  threshold = Compressor(
    'threshold',
    lambda x, key: jnp.where(abs(x) >= 1, x, 0),
    lambda x: x,
    block_size=BLOCK,
    contraction=0.1,  # It has none; that does not matter here.
  )
  communicator = jd.mean(AXIS, threshold, 'gather')
  grads = np.random.default_rng(4).normal(size=(20, WORKERS, 300))
  grads = grads.astype(np.float32)
  want, _ = public.run(jd.ef21(communicator), grads, grads[0, 0])
  _, means = weighted(communicator, grads, FACTORS)
  assert np.abs(means - want).max() > 0.1


def test_stepsize():
  """The figures of the papers, and the limit without compression."""
  workers = [1.0, 1.0, 1.0, 100.0]
  new = jd.ef21_stepsize(25.75, workers, 0.5)
  old = jd.ef21_stepsize(25.75, workers, 0.5, mean='quadratic')
  theta = 1 - 0.5**0.5
  xi = (0.5 / theta / theta) ** 0.5
  assert 1 / new == pytest.approx(25.75 + 25.75 * xi)
  assert 1 / old == pytest.approx(25.75 + (10003 / 4) ** 0.5 * xi)
  assert jd.ef21_stepsize(3.0, workers, 1.0) == pytest.approx(1 / 3)
  equal = [2.0] * 4
  assert jd.ef21_stepsize(2.0, equal, 0.1) == pytest.approx(
    jd.ef21_stepsize(2.0, equal, 0.1, mean='quadratic')
  )


def test_smoothness_of_each_worker():
  """Of a quadratic it is the largest eigenvalue."""
  rng = np.random.default_rng(5)
  a = rng.normal(size=(3, 40, 12)).astype(np.float32)

  def loss(params, a):
    x = jnp.concatenate([params['x'], params['y']])
    return jnp.sum((a @ x) ** 2) / 2

  params = {'x': jnp.ones(5), 'y': jnp.zeros(7)}
  got = jax.vmap(lambda a: jd.estimate_smoothness(loss, params, a))(a)
  want = [np.linalg.eigvalsh(m.T.astype(np.float64) @ m)[-1] for m in a]
  # A hundred products bring the second eigenvalue, at 0.9 of the first, to
  # 1e-8 of it.
  np.testing.assert_allclose(got, want, rtol=1e-3)
  flat_loss = lambda p, _: jnp.sum(p)
  assert jd.estimate_smoothness(flat_loss, jnp.ones(3), None) == 0
