"""Draws differ between exchanges, workers, buckets, rounds and shards.

All workers hold the same numbers, so that nothing but the draws tells them
apart. Errors of n independent draws are n times smaller, squared, in the mean.
"""

import jax
import jax.numpy as jnp
import numpy as np
import public
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxdist as jd

WORKERS, TIMES, BUCKETS, BLOCK = 8, 4, 4, 128
DRAWN = jd.quantize(bits=4, stochastic=True, block_size=BLOCK)
# One block of numbers; a bucket has one for each worker to reduce.
NUMBERS = np.random.default_rng(0).normal(size=BLOCK).astype(np.float32)
SAME = np.tile(NUMBERS, (WORKERS, BUCKETS * WORKERS))


def assert_independent(errors, axis):
  """Mean over ``axis`` of squared errors, and squared errors of the mean."""
  ratio = np.mean(errors**2) / np.mean(np.mean(errors, axis=axis) ** 2)
  # Of 512 draws at least: a tenth is their spread. Equal draws: a ratio of 1.
  assert 0.6 < ratio / errors.shape[axis] < 1.6


def exchanges(communicator):
  """Results, and what each worker sent: (workers, times, numbers)."""

  def run(x):
    def one(state, _):
      result, sent, state = communicator.exchange(x, state)
      return state, (result, sent)

    return jax.lax.scan(one, communicator.init(x), length=TIMES)[1]

  return jax.jit(jax.vmap(run, axis_name=public.AXIS))(SAME)


def blocks(x):
  return np.asarray(x).reshape(*x.shape[:-1], BUCKETS, WORKERS, BLOCK)


@pytest.mark.parametrize('method', ['gather', 'two_shot'])
def test_draws_of_a_mean(method):
  communicator = jd.mean(
    public.AXIS, DRAWN, method, bucket_bytes=4 * BLOCK * WORKERS
  )
  result, sent = map(blocks, exchanges(communicator))
  # (workers, times, buckets, rows, numbers)
  for axis in (0, 1, 2, 3):
    assert_independent(sent - NUMBERS, axis)
  for axis in (1, 2, 3):  # Row i of a bucket is worker i's to reduce.
    assert_independent(result[:1] - NUMBERS, axis)
  if method == 'gather':
    np.testing.assert_allclose(result[0], sent.mean(0), atol=1e-5)


def test_random_k_draws_columns_for_each_exchange_and_bucket():
  code = jd.random_k(0.25, block_size=BLOCK)
  communicator = jd.mean(
    public.AXIS, code, bucket_bytes=4 * BLOCK * WORKERS, seed=3
  )
  result, _ = exchanges(communicator)
  columns = blocks(result)[:, :, :, 0] != 0
  assert (columns == columns[:1]).all(), 'the same on all workers'
  different = np.unique(columns[0].reshape(-1, BLOCK), axis=0)
  assert len(different) == TIMES * BUCKETS


def test_draws_of_members_of_one_seed():
  """Labels of a partition, and leaves of one level."""
  names = 'abcd'
  labels = dict(zip(names, names, strict=True))
  whole = jd.mean(public.AXIS, DRAWN, 'gather')
  columns = jd.mean(public.AXIS, jd.random_k(0.25, block_size=BLOCK))
  parts = {
    'partition': jd.partition(dict.fromkeys(names, whole), labels),
    'per_leaf': jd.per_leaf({'a': whole}, dict.fromkeys(names, 'a')),
    'columns': jd.per_leaf({'a': columns}, dict.fromkeys(names, 'a')),
  }

  def run(x):
    tree = dict.fromkeys(names, x)
    return {
      name: each.exchange(tree, each.init(tree))[1]
      for name, each in parts.items()
    }

  sent = jax.jit(jax.vmap(run, axis_name=public.AXIS))(SAME)
  stacked = {k: np.stack([v[n] for n in names]) for k, v in sent.items()}
  for name in ('partition', 'per_leaf'):
    assert_independent(stacked[name] - SAME[0], axis=0)
  drawn = stacked['columns'][:, 0, :BLOCK] != 0
  assert len(np.unique(drawn, axis=0)) == len(names)


@pytest.mark.parametrize('topology', ['ring', 'one_peer_exponential'])
def test_draws_of_gossip(topology):
  """What a worker first tells, at different counts of rounds."""

  def told(code):
    graph = jd.gossip(public.AXIS, topology, code, mixing=0.5)

    def run(x):
      first = graph.init(x)
      tell = lambda n: graph.exchange(x, first._replace(count=n))[1]
      return jax.lax.map(tell, jnp.arange(TIMES))

    return np.asarray(jax.jit(jax.vmap(run, axis_name=public.AXIS))(SAME))

  errors = told(DRAWN) - SAME[0]  # (workers, times, numbers)
  for axis in (0, 1):
    assert_independent(errors, axis)
  columns = told(jd.random_k(0.25, block_size=BLOCK))[..., :BLOCK] != 0
  assert (columns == columns[:1]).all(), 'the same on all workers'
  assert len(np.unique(columns[0], axis=0)) == TIMES


def test_draws_of_the_shards_of_a_worker():
  """Two workers of four devices; what is whole is alike on all of these."""
  mesh = jax.make_mesh((2, 4), ('dcn', 'fsdp'), (AxisType.Auto,) * 2)
  specs = {'cut': P('fsdp'), 'whole': P()}
  communicator = jd.per_shard(jd.mean('dcn', DRAWN), specs)
  tree = {
    'cut': np.tile(NUMBERS, (2, 4, WORKERS)),
    'whole': np.tile(NUMBERS, (2, WORKERS)),
  }

  def exchange(tree):
    tree = jax.tree.map(lambda x: x[0], tree)
    return communicator.exchange(tree, communicator.init(tree))[0]

  run = jax.shard_map(
    exchange, mesh=mesh, in_specs=P('dcn'), out_specs=P(), axis_names={'dcn'}
  )
  result = jax.jit(run)(tree)
  assert_independent(
    np.asarray(result['cut']).reshape(4, WORKERS, BLOCK) - NUMBERS, axis=0
  )
  for shard in result['whole'].addressable_shards:
    np.testing.assert_array_equal(shard.data, result['whole'])
