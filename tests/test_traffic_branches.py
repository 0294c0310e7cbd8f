"""How often collectives in branches run.

Of a worker's 24 floats, over eight devices unless said.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from compiled import every, psum, sharded
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxdist as jd

DATA = P('data')
STEP = jnp.int32(0)


def test_branch_with_scope(traffic_of):
  sent = traffic_of(functools.partial(every, 5, psum), STEP)
  (row,) = sent.rows
  # 168 bytes in one of five steps.
  assert row.times == 0.2
  assert sent.bytes_a_step == pytest.approx(33.6)
  assert not row.in_unknown_branch
  assert row.source == 'psum'


def test_branch_without_scope_is_flagged(traffic_of):
  def step(x, i):
    return lax.cond(i % 5 == 0, psum, lambda x: x, x)

  sent = traffic_of(step, STEP)
  (row,) = sent.rows
  assert row.in_unknown_branch
  assert (row.times, sent.bytes_a_step) == (1, 168)
  assert 'unknown frequency' in str(sent)


def test_rotating_branches(traffic_of):
  def hop(distance, x):
    with jax.named_scope('jaxdist.every.3'):
      return lax.ppermute(
        x, 'data', [(i, (i + distance) % 8) for i in range(8)]
      )

  def step(x, i):
    branches = [functools.partial(hop, distance) for distance in (1, 3, 5)]
    return lax.switch(i % 3, branches, x)

  # Each branch sends 96 bytes in a third of the steps.
  sent = traffic_of(step, STEP)
  assert [row.kind for row in sent.rows] == ['collective-permute'] * 3
  assert [row.times for row in sent.rows] == [1 / 3] * 3
  assert sent.bytes_a_step == pytest.approx(96)
  assert sent.by_axis() == {'data': pytest.approx(96)}


def test_nested_branches_multiply(traffic_of):
  def step(x, i):
    return every(5, lambda x: every(2, psum, x, i + 1), x, i)

  (row,) = traffic_of(step, STEP).rows
  assert row.times == 0.1
  assert not row.in_unknown_branch


def test_branch_within_a_branch_without_scope_is_flagged(traffic_of):
  def step(x, i):
    return lax.cond(i > 3, lambda x: every(5, psum, x, i), lambda x: x, x)

  (row,) = traffic_of(step, STEP).rows
  assert row.times == 0.2
  assert row.in_unknown_branch


def test_scan_in_branch(traffic_of):
  def step(x, i):
    def body(carry, _):
      return psum(carry), None

    return every(5, lambda x: lax.scan(body, x, None, length=4)[0], x, i)

  # 4 runs in one of five steps.
  (row,) = traffic_of(step, STEP).rows
  assert row.times == 0.8


def test_branch_in_scan(traffic_of):
  def step(x, i):
    def body(carry, number):
      return every(5, psum, carry, number), None

    return lax.scan(body, x, i + jnp.arange(10))[0]

  (row,) = traffic_of(step, STEP).rows
  assert row.times == 2


def test_branch_that_vmap_takes_always(traffic_of):
  """A select runs both of its branches, whatever its scope says."""

  def step(x, i):
    per_row = jax.vmap(lambda row, j: every(5, psum, row, j))
    return per_row(x.reshape(3, 8), i + jnp.arange(3)).reshape(24)

  sent = traffic_of(step, STEP)
  assert sent.bytes_a_step == 168

  def within_a_branch(x, i):
    return every(4, lambda x: step(x, i), x, i)

  assert traffic_of(within_a_branch, STEP).bytes_a_step == 42


def test_branch_that_the_compiler_takes_always(traffic_of):
  def step(x, i):
    return every(4, lambda x: every(5, psum, x, 0), x, i)

  assert traffic_of(step, STEP).bytes_a_step == 42


@pytest.mark.parametrize('remat', [False, True])
def test_branch_that_is_differentiated(traffic_of, remat):
  def step(x, i):
    def loss(x):
      return jnp.sum(jnp.square(every(5, psum, x, i)))

    return jax.grad(jax.checkpoint(loss) if remat else loss)(x)

  rows = traffic_of(step, STEP).rows
  assert rows
  assert all(row.times == 0.2 for row in rows)


def test_collective_of_the_partitioner_in_a_branch(make_mesh):
  """What the partitioner inserts may bear the name of an argument."""
  mesh = make_mesh()

  @jax.jit
  def step(x, i):
    def gather(x):
      return jnp.sin(
        lax.with_sharding_constraint(jnp.cos(x), NamedSharding(mesh, P()))
      )

    return every(5, gather, x, i)

  sent = jd.traffic(step, sharded(mesh, (16, 4), DATA), STEP)
  assert sent.rows
  assert all(row.times == 0.2 for row in sent.rows)
  assert not any(row.in_unknown_branch for row in sent.rows)
