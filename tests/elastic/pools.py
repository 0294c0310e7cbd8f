"""Replicas without processes, and a program whose changes tell their makers."""

import time

import numpy as np

import jaxdist as jd
from jaxdist import elastic
from jaxdist.elastic.pool import Answer
from jaxdist.elastic.replica import Replica

STALENESS = 0.2


class Clock:
  """Goes on only where somebody waits."""

  now = 0.0

  def monotonic(self):
    return self.now


class Here:
  """A pool in this process; a script may say how replicas answer.

  ``script[replica, round]`` is what happens instead of an answer: ``'die'``,
  ``'raise'``, ``'garbage'``, ``'twice'``, or the round in which it comes.
  """

  def __init__(self, build, agreement, options, script=None, clock=None):
    del options
    self.clock = clock or Clock()
    self.make = lambda *key: Replica(build, agreement, *key)
    self.script = script or {}
    self.replicas, self.answers, self.waiting = {}, [], []
    self.round, self.wire = 0, None

  def share(self, message):
    self.round = jd.unpack(message)['round']
    return message

  def start(self, replica, incarnation, message):
    made = self.replicas[replica, incarnation] = self.make(replica, incarnation)
    made._wire = self.wire = self.wire or made._wire  # Compiled once.
    value = made.begin(message)
    self.answers.append(Answer(replica, incarnation, 'begin', value))

  def give(self, replica, incarnation, message):
    made = self.replicas[replica, incarnation]
    answer = Answer(replica, incarnation, 'work', made.work(message))
    how = self.script.get((replica, self.round), 'answer')
    if how == 'die':
      error = RuntimeError('it died\nof this')
      self.answers.append(answer._replace(value=error, died=True))
    elif how == 'raise':
      self.answers.append(answer._replace(value=RuntimeError('it raised')))
    elif how == 'garbage':
      self.answers.append(answer._replace(value=answer.value[:-1]))
    elif how == 'twice':
      self.answers += [answer, answer]
    elif how == 'answer':
      self.answers.append(answer)
    else:
      self.waiting.append((how, answer))

  def stop(self, replica, incarnation):
    del self.replicas[replica, incarnation]

  def wait(self, seconds):
    for item in [item for item in self.waiting if item[0] <= self.round]:
      self.waiting.remove(item)
      self.answers.append(item[1])
    if not self.answers:
      self.clock.now += seconds
    answers, self.answers = self.answers, []
    return answers

  def close(self):
    pass


def change(replica, round):
  """What a replica adds to the parameters in a round."""
  rng = np.random.default_rng((replica, round))
  return rng.normal(size=5).astype(np.float32)


def telling(replica, seconds=0.0, slowed=None):
  """A program whose rounds, of one step, have the changes above.

  One replica may be slowed ten times.
  """

  def step(params, state, step):
    time.sleep(10 * seconds if replica == slowed else seconds)
    return params + change(replica, step), state, np.float32(0)

  return elastic.Program(lambda params, step: None, step)


def moved(reports):
  """How far SGD of rate 1 outside goes, by what a coordinator reported."""
  total = np.zeros(5)
  for report in reports:
    applied = [(1.0, change(i, report.round)) for i in report.fresh]
    for replica, age in report.late.items():
      applied.append((STALENESS**age, change(replica, report.round - age)))
    if applied:
      weights, changes = zip(*applied, strict=True)
      total += np.dot(weights, changes) / max(1, sum(weights))
  return total
