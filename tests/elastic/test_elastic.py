"""Elastic replicas without faults: the numbers of jd.diloco."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdist as jd

pytest.importorskip('ray', reason='needs jaxdist[ray]')

from jaxdist import elastic

REPLICAS, EVERY, ROUNDS = 2, 3, 4
OUTER = optax.sgd(0.7, momentum=0.9, nesterov=True)


def params():
  rng = np.random.default_rng(0)
  return {
    'a': jnp.asarray(rng.normal(size=(3, 50)), jnp.float32),
    'empty': jnp.zeros((0, 2)),
    'half': jnp.asarray(rng.normal(size=40), jnp.bfloat16),
  }


def batch(replica, step):
  rng = np.random.default_rng((replica, step))
  return rng.normal(size=()).astype(np.float32)


def loss_fn(params, x):
  return sum(jnp.sum((p.astype(jnp.float32) - x) ** 2) for p in params.values())


def build(replica):
  inner = optax.adam(optax.linear_schedule(0.1, 0.01, 10))
  return elastic.program(loss_fn, inner, lambda step: batch(replica, step))


class Here:
  """A pool without processes: replicas answer when they are waited for."""

  def __init__(self, build, agreement, options):
    from jaxdist.elastic.replica import Replica

    self.make = lambda *key: Replica(build, agreement, *key)
    self.replicas, self.asked = {}, []

  def share(self, message):
    return message

  def start(self, replica, incarnation, message):
    self.replicas[replica, incarnation] = self.make(replica, incarnation)
    self.asked.append(('begin', replica, incarnation, message))

  def give(self, replica, incarnation, message):
    self.asked.append(('work', replica, incarnation, message))

  def stop(self, replica, incarnation):
    del self.replicas[replica, incarnation]

  def wait(self, seconds):
    from jaxdist.elastic.pool import Answer

    what, replica, incarnation, message = self.asked.pop()
    value = getattr(self.replicas[replica, incarnation], what)(message)
    return [Answer(replica, incarnation, what, value)]

  def close(self):
    pass


@pytest.mark.parametrize(
  'code', [None, jd.quantize(bits=4, stochastic=True), jd.top_k(0.1)], ids=repr
)
def test_equals_diloco(code):
  inner = optax.adam(optax.linear_schedule(0.1, 0.01, 10))
  tx = jd.diloco(
    inner, OUTER, jd.mean('data', code, method='gather'), every=EVERY
  )
  state = jd.init(tx, params(), axis='data', workers=REPLICAS)
  step = jd.train_step(
    lambda p, x: loss_fn(p, x[0]), tx, axis='data', workers=REPLICAS
  )
  for i in range(EVERY * ROUNDS):
    state, _ = step(state, np.stack([batch(r, i) for r in range(REPLICAS)]))
  want = jd.mean_params(state)
  with elastic.Coordinator(
    build,
    params(),
    replicas=REPLICAS,
    outer=OUTER,
    every=EVERY,
    deadline=60.0,
    compressor=code,
    pool=Here,
  ) as coordinator:
    for report in coordinator.rounds(ROUNDS):
      print(report)
      assert report.fresh == (0, 1)
  got = coordinator.params
  for name in want:
    np.testing.assert_allclose(
      got[name].astype(np.float32),
      want[name].astype(np.float32),
      rtol=1e-5,
      atol=1e-6,
    )
