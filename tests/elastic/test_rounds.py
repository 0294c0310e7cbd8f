"""Rounds of elastic replicas: which changes count, by a script of faults."""

import functools
import time

import jax.numpy as jnp
import numpy as np
import optax
import pools
import pytest

import jaxdist as jd

pytest.importorskip('ray', reason='needs jaxdist[ray]')

from jaxdist import elastic
from jaxdist.elastic.replica import at_step

REPLICAS, EVERY, ROUNDS = 2, 3, 4
NESTEROV = optax.sgd(0.7, momentum=0.9, nesterov=True)
INNER = optax.adam(optax.linear_schedule(0.1, 0.01, 10))


def params():
  rng = np.random.default_rng(0)
  return {
    'a': jnp.asarray(rng.normal(size=(3, 50)), jnp.float32),
    'empty': jnp.zeros((0, 2)),
    'half': jnp.asarray(rng.normal(size=40), jnp.bfloat16),
  }


def batch(replica, step):
  return np.float32(np.random.default_rng((replica, step)).normal())


def loss_fn(params, x):
  return sum(jnp.sum((p.astype(jnp.float32) - x) ** 2) for p in params.values())


def build(replica):
  return elastic.program(loss_fn, INNER, lambda step: batch(replica, step))


@pytest.mark.parametrize(
  'code',
  [None, jd.chained(jd.random_k(0.25), jd.quantize(bits=8, stochastic=True))],
  ids=repr,
)
def test_equals_diloco(code):
  communicator = jd.mean('data', code, 'gather' if code else 'auto')
  tx = jd.diloco(INNER, NESTEROV, communicator, every=EVERY)
  workers = {'axis': 'data', 'workers': REPLICAS}
  state = jd.init(tx, params(), **workers)
  step = jd.train_step(lambda p, x: loss_fn(p, x[0]), tx, **workers)
  for i in range(EVERY * ROUNDS):
    state, _ = step(state, np.stack([batch(r, i) for r in range(REPLICAS)]))
  want = jd.mean_params(state)
  with elastic.Coordinator(
    build,
    params(),
    replicas=REPLICAS,
    outer=NESTEROV,
    every=EVERY,
    deadline=60.0,
    compressor=code,
    pool=pools.Here,
  ) as coordinator:
    reports = list(coordinator.rounds(ROUNDS))
    owed = [seat.owed for seat in coordinator.seats]
  assert [report.fresh for report in reports] == [(0, 1)] * ROUNDS
  assert coordinator.counts == {'given': 2 * ROUNDS, 'fresh': 2 * ROUNDS}
  assert all(owed) == (code is not None and not code.unbiased)
  for name, x in coordinator.params.items():
    assert x.dtype == want[name].dtype
    x, y = np.float32(x), np.float32(want[name])
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
  # It went somewhere.
  assert np.abs(want['a'] - params()['a']).max() > 0.1


NEVER = 99
SCRIPT = {
  (3, 1): 'die',
  (2, 2): 'die',
  (3, 3): 'raise',
  (1, 3): 5,  # Two rounds late.
  (3, 6): 'garbage',
  (0, 7): 'twice',
  (0, 8): 12,  # When it has been given up.
  **{(replica, 13): 14 for replica in range(4)},
  **{(1, round): 'garbage' for round in (16, 17, 18)},
}
FRESH = {1: (0, 1, 2), 2: (0, 1), 3: (0,), 4: (0, 2, 3), 5: (0, 2, 3)}
FRESH |= {6: (0, 1), **dict.fromkeys((8, 9, 10, 11), (1, 2, 3)), 13: (), 14: ()}
FRESH |= dict.fromkeys((16, 17, 18, 19), (0, 2, 3))
LATE = {5: {1: 2}, 14: dict.fromkeys(range(4), 1)}


def build_telling(replica):
  program = pools.telling(replica)

  def step(params, state, step):
    params, state, loss = program.step(params, state, step)
    # One round of one replica.
    return params * (np.nan if (replica, step) == (2, 6) else 1), state, loss

  return program._replace(step=step)


def test_faults(monkeypatch):
  start = np.ones(5, np.float32)
  deadline, clock = 2.5, pools.Clock()
  monkeypatch.setattr('jaxdist.elastic.coordinator.time', clock)
  with elastic.Coordinator(
    build_telling,
    start,
    replicas=4,
    outer=optax.sgd(1.0),
    every=1,
    deadline=deadline,
    max_staleness=2,
    staleness=pools.STALENESS,
    pool=functools.partial(pools.Here, script=SCRIPT, clock=clock),
  ) as coordinator:
    reports = list(coordinator.rounds(21))
  for report in reports:
    assert report.fresh == FRESH.get(report.round, (0, 1, 2, 3)), report
    assert report.late == LATE.get(report.round, {}), report
    assert report.committed == (report.round != 13)
    # Only who was given this round and says nothing is waited for.
    assert report.seconds == deadline * (report.round in (3, 8, 13)), report
  np.testing.assert_allclose(
    coordinator.params, start + pools.moved(reports), rtol=1e-5
  )
  seen = [
    (event.round, event.kind, event.replica, event.incarnation)
    for report in reports[1:]
    for event in report.events
    if event.kind != 'ready'
  ]
  assert sorted(seen) == sorted(
    [
      (1, 'died', 3, 1),
      (2, 'died', 2, 1),
      (3, 'failed', 3, 2),
      (5, 'late', 1, 1),
      (6, 'not finite', 2, 2),
      (6, 'damaged', 3, 3),
      (7, 'unknown', 0, 1),
      (11, 'fenced', 0, 1),
      (12, 'fenced', 0, 1),  # It woke up.
      (14, 'late', 0, 2),
      (14, 'late', 1, 1),
      (14, 'late', 2, 2),
      (14, 'late', 3, 3),
      (16, 'damaged', 1, 1),
      (17, 'damaged', 1, 1),
      (18, 'damaged', 1, 1),
      (18, 'fenced', 1, 1),
    ]
  )
  counts = coordinator.counts
  ended = ('fresh', 'late', 'stale', 'unsound', 'lost')
  assert counts['given'] == sum(counts.get(name, 0) for name in ended)


def test_what_is_lost_with_a_residual():
  def without_largest(x):
    return np.where(np.arange(x.size) == np.argmax(np.abs(x)), 0, x)

  with elastic.Coordinator(
    build_telling,
    np.ones(5, np.float32),
    replicas=3,
    outer=optax.sgd(1.0),
    every=1,
    deadline=2.5,
    compressor=jd.global_top_k(0.2),  # One of five.
    pool=functools.partial(pools.Here, script={(1, 3): 'die'}),
  ) as coordinator:
    reports = list(coordinator.rounds(6))
    seat = coordinator.seats[1]
  (died,) = (
    event
    for report in reports
    for event in report.events
    if event.kind == 'died'
  )
  # What it had said last, after three rounds, as the mean would have had it.
  owed = np.zeros(5)
  for round in range(3):
    owed = without_largest(pools.change(1, round) + owed)
  np.testing.assert_allclose(died.lost, np.linalg.norm(owed) / 3, rtol=1e-5)
  assert (died.round, died.replica) == (3, 1)
  # It began anew with nothing held back.
  (again,) = (r.round for r in reports[4:] if 1 in r.fresh)
  owed = without_largest(pools.change(1, again))
  np.testing.assert_allclose(seat.owed, np.linalg.norm(owed), rtol=1e-5)


def test_schedules_go_on():
  rate = optax.linear_schedule(1.0, 0.0, 10)
  inject = optax.inject_hyperparams(optax.sgd)(learning_rate=rate)
  tx = optax.chain(optax.scale_by_adam(), optax.sgd(rate), inject)
  adam, sgd, injected = at_step(tx.init(jnp.zeros(2)), 7)
  assert adam.count == 0 and sgd[1].count == 7
  update, _ = inject.update(jnp.ones(2), injected)
  np.testing.assert_allclose(update, -0.3, rtol=1e-5)
  assert at_step((), 7) == ()


BAD = {
  'replicas': (0, 'replicas must be an integer of at least 1, got 0'),
  'quorum': (3, 'quorum must be at most the number of replicas, 2, got 3'),
  'deadline': (0.0, 'deadline must be positive seconds, got 0.0'),
  'start_timeout': (float('inf'), 'start_timeout must be positive seconds'),
  'every': (0, 'every must be an integer of at least 1, got 0'),
  'max_staleness': (-1, 'max_staleness must be an integer of at least 0'),
  'staleness': (2.0, r'staleness must be in \(0, 1\], got 2.0'),
  'save_every': (0, 'save_every must be an integer of at least 1, got 0'),
  'seed': (-1, 'seed must be an integer'),
  'decay': (0.5, 'decay does nothing without feedback, got 0.5'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_arguments(name):
  value, message = BAD[name]
  arguments = {'replicas': 2, 'every': 1, 'deadline': 1.0, name: value}
  with pytest.raises(ValueError, match=message):
    elastic.Coordinator(build, params(), outer=optax.sgd(1.0), **arguments)


def test_feedback_needs_a_code_that_contracts():
  with pytest.raises(ValueError, match='feedback needs a code that contracts'):
    elastic.Coordinator(
      build,
      params(),
      replicas=2,
      outer=optax.sgd(1.0),
      every=1,
      deadline=1.0,
      compressor=jd.quantize(bits=2, stochastic=True),
      feedback=True,
    )


class Interrupted(pools.Here):
  """One is interrupted while it waits in the second round."""

  def wait(self, seconds):
    if self.round == 1 and self.script.pop('interrupt', False):
      raise KeyboardInterrupt
    return super().wait(seconds)


class Swapped(pools.Here):
  """In the second round each of two messages says to be of the other."""

  def wait(self, seconds):
    answers = super().wait(seconds)
    if self.round == 1:
      answers = [a._replace(replica=1 - a.replica) for a in answers]
    return answers


class Stuck(pools.Here):
  """The first process of the second replica does not come up."""

  def start(self, replica, incarnation, message):
    super().start(replica, incarnation, message)
    if (replica, incarnation) == (1, 1):
      self.answers.pop()

  def stop(self, replica, incarnation):
    super().stop(replica, incarnation)
    end = RuntimeError('it was killed')
    self.answers.append(pools.Answer(replica, incarnation, 'begin', end, True))

  def wait(self, seconds):
    self.clock.now += 1
    return super().wait(seconds)


def two_replicas(monkeypatch, pool, **options):
  clock = pools.Clock()
  monkeypatch.setattr('jaxdist.elastic.coordinator.time', clock)
  return elastic.Coordinator(
    pools.telling,
    np.ones(5, np.float32),
    replicas=2,
    outer=optax.sgd(1.0),
    every=1,
    deadline=2.0,
    pool=functools.partial(pool, clock=clock, **options),
    start_timeout=2.5,
  )


def test_a_round_that_was_interrupted_goes_on(monkeypatch):
  script = {'interrupt': True}
  with two_replicas(monkeypatch, Interrupted, script=script) as coordinator:
    with pytest.raises(KeyboardInterrupt):
      list(coordinator.rounds(4))
    reports = list(coordinator.rounds(4))
  assert [report.fresh for report in reports] == [(0, 1)] * 3
  assert coordinator.counts == {'given': 8, 'fresh': 8}


def test_messages_of_another_replica_are_refused(monkeypatch):
  with two_replicas(monkeypatch, Swapped) as coordinator:
    reports = list(coordinator.rounds(4))
  assert [r.fresh for r in reports] == [(0, 1), (), (0, 1), (0, 1)]
  assert [event.kind for event in reports[1].events] == ['damaged'] * 2
  np.testing.assert_allclose(
    coordinator.params, 1 + pools.moved(reports), rtol=1e-5
  )


def test_a_replica_that_does_not_come_up_is_replaced(monkeypatch):
  with two_replicas(monkeypatch, Stuck) as coordinator:
    reports = list(coordinator.rounds(5))
  seen = [
    (event.kind, event.incarnation)
    for report in reports
    for event in report.events
    if event.replica == 1
  ]
  assert seen == [('failed', 1), ('ready', 2)]
  assert reports[-1].fresh == (0, 1)


def test_a_program_that_cannot_start():
  def broken(replica):
    raise KeyError('no data')

  class Raises(pools.Here):
    def start(self, replica, incarnation, message):
      try:
        super().start(replica, incarnation, message)
      except KeyError as error:
        answer = pools.Answer(replica, incarnation, 'begin', error)
        self.answers.append(answer)

  coordinator = elastic.Coordinator(
    broken,
    np.ones(5, np.float32),
    replicas=2,
    outer=optax.sgd(1.0),
    every=1,
    deadline=1.0,
    pool=Raises,
  )
  began = time.monotonic()
  with coordinator, pytest.raises(elastic.ReplicaError) as error:
    next(coordinator.rounds(1))
  assert isinstance(error.value.__cause__, KeyError)
  assert time.monotonic() - began < 10
