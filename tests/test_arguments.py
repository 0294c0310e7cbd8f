"""Bad arguments are refused where they are given, by name, rule and value."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import jaxdist as jd
from jaxdist.transforms.base import check_communicator


def unchecked(function):
  """A user runs without the type checks that these tests switch on."""
  return getattr(function, '__wrapped__', function)


MEAN = jd.mean('data')
TOP_K = jd.mean('data', jd.top_k(0.1))
LATE = jd.mean('data', delay=1)
PARAMS = {'w': jnp.ones(3)}


def chosen(errors=None, **changes):
  """A choice of one level for one leaf."""
  options = {'uniform': 'a', 'workers': 2} | changes
  errors = jnp.ones((1, 1)) if errors is None else errors
  return jd.lgreco({'a': MEAN}, errors, PARAMS, **options)


AT_CONSTRUCTION = [
  (lambda: jd.mean(''), r"axis must be the name of an axis, got ''"),
  (
    lambda: unchecked(jd.mean)('data', 'sign'),
    r"compressor must be .* got 'sign'",
  ),
  (
    lambda: unchecked(jd.mean)('data', method='ring'),
    r"method must be one of .*'ring'",
  ),
  (
    lambda: jd.mean('data', jd.sign(), 'psum'),
    r'sums payloads .* sign\(.*\) is not',
  ),
  (
    lambda: jd.mean('data', jd.global_top_k(0.1), 'two_shot'),
    r'global_top_k\(.*\) has only one',
  ),
  (lambda: jd.mean('data', bucket_bytes=0), r'bucket_bytes .* got 0'),
  (
    lambda: unchecked(jd.mean)('data', bucket_bytes=1.5),
    r'bucket_bytes must be an integer .* got 1\.5',
  ),
  (lambda: jd.mean('data', delay=2), r'delay .* in \[0, 2\), got 2'),
  (lambda: jd.mean('data', delay=True), r'delay .* got True'),
  (lambda: jd.mean('data', seed=2**32), r'seed .* got 4294967296'),
  (lambda: jd.low_rank_mean('data', 1, seed=-1), r'seed .* got -1'),
  (lambda: unchecked(jd.gossip)('data', seed='a'), r"seed .* got 'a'"),
  (lambda: unchecked(jd.low_rank_mean)(('a', 'b'), 2), r"axis .*\('a', 'b'\)"),
  (lambda: jd.gossip(''), r"axis must be the name of an axis, got ''"),
  (
    lambda: unchecked(jd.gossip)('data', compressor='sign'),
    r"compressor must be .* got 'sign'",
  ),
  (lambda: jd.low_rank_mean('data', 0), r'rank must be .* got 0'),
  (
    lambda: unchecked(jd.low_rank_mean)('data', 1.5),
    r'rank must be .* got 1\.5',
  ),
  (lambda: unchecked(jd.gossip)('data', 'star'), r"topology must be .*'star'"),
  (lambda: jd.gossip('data', mixing=0.0), r'mixing must be in \(0, 1\], got 0'),
  (
    lambda: unchecked(jd.gossip)('data', mixing=True),
    r'mixing must be .* got True',
  ),
  (lambda: unchecked(jd.partition)({'a': 'x'}, None), r"communicator .*'x'"),
  (lambda: unchecked(jd.per_shard)('x', None), r"communicator .*'x'"),
  (lambda: unchecked(jd.per_worker)(3), r'tx must be an optax .* got 3'),
  (lambda: jd.partition({}, None), r'at least one entry'),
  (lambda: jd.per_leaf({}, None), r'at least one entry'),
  (
    lambda: jd.level_errors({1: MEAN, 2: jd.gossip('data')}, None),
    r'all agree',
  ),
  (lambda: chosen(uniform='z'), r"uniform must be among \['a'\], got 'z'"),
  (lambda: chosen(tolerance=0.0), r'tolerance must be positive, got 0'),
  (lambda: chosen(workers=0), r'workers must be .* got 0'),
  (
    lambda: chosen(errors=jnp.ones((2, 1))),
    r'row for each of 1 leaves .*\(2, 1\)',
  ),
  (lambda: chosen(errors=-jnp.ones((1, 1))), r'not negative'),
  (
    lambda: jd.partition({'a': MEAN, 'b': jd.mean('model')}, None),
    r"share one axis, got \['data', 'model'\]",
  ),
  (
    lambda: jd.partition({'a': MEAN, 'b': jd.gossip('data')}, None),
    r'must all agree',
  ),
  (
    lambda: unchecked(check_communicator)('data', agrees=True),
    r"communicator must be .* got 'data'",
  ),
  (lambda: jd.low_rank_mean('data', True), r'rank must be .* got True'),
  (lambda: jd.error_feedback(TOP_K, decay=1.5), r'decay .* got 1\.5'),
  (
    lambda: unchecked(jd.error_feedback)(TOP_K, decay='half'),
    r"decay must be in \(0, 1\], got 'half'",
  ),
  (lambda: jd.error_feedback(jd.gossip('data')), r'same result'),
  (lambda: jd.communicate(jd.gossip('data')), r'same result'),
  (lambda: jd.staged([MEAN, TOP_K], []), r'one fewer than the 2 .* got \[\]'),
  (lambda: jd.staged([], []), r'one fewer than the 0'),
  (lambda: jd.staged([MEAN, TOP_K], [0]), r'rise from at least 1, got \[0\]'),
  (
    lambda: jd.staged([MEAN, TOP_K, MEAN], [5, 5]),
    r'boundaries must rise from at least 1, got \[5, 5\]',
  ),
  (
    lambda: jd.staged([MEAN, jd.mean('model')], [1]),
    r"share one axis, got \['data', 'model'\]",
  ),
  (lambda: jd.staged([MEAN, jd.gossip('data')], [1]), r'must all agree'),
  *(
    (lambda make=make: make(0.1, LATE), r'without delay=1: .*delay=1\)')
    for make in (
      jd.masha1,
      jd.masha2,
      lambda rate, c: jd.scallion(rate, c, every=2),
      lambda rate, c: jd.scafcom(rate, jd.staged([MEAN, c], [1]), every=2),
    )
  ),
  (
    lambda: jd.scallion(0.1, jd.mean('data', jd.ternary()), every=2),
    r"encode once .*ternary.* may take 'two_shot'. Use method='gather'",
  ),
  (lambda: jd.dgc(jd.gossip('data')), r'same result'),
  (lambda: jd.dgc(TOP_K, momentum=1.0), r'momentum must be .* got 1\.0'),
  (lambda: jd.dgc(TOP_K, max_norm=0.0), r'max_norm must be .* got 0\.0'),
  (lambda: jd.one_bit_adam(1e-3, jd.gossip('data'), 9), r'same result'),
  (lambda: jd.one_bit_adam(1e-3, MEAN, 0), r'warmup_steps must .* got 0'),
  (lambda: jd.one_bit_adam(1e-3, MEAN, 9, b1=1.0), r'b1 must be .* got 1\.0'),
  (lambda: jd.one_bit_lamb(1e-3, jd.gossip('data'), 9), r'same result'),
  (lambda: jd.one_bit_lamb(1e-3, MEAN, 0), r'warmup_steps must .* got 0'),
  (lambda: jd.one_bit_lamb(1e-3, MEAN, 9, b2=-1.0), r'b2 must be .* got -1\.0'),
  (lambda: jd.zero_one_adam(1e-3, jd.gossip('data'), 9), r'same result'),
  (lambda: jd.zero_one_adam(1e-3, MEAN, 0), r'freeze_step must .* got 0'),
  (lambda: jd.zero_one_adam(1e-3, MEAN, 9, eps=-1.0), r'eps must .* got -1\.0'),
  (lambda: jd.zero_one_adam(1e-3, MEAN, 9, refreshes=0), r'refreshes .* got 0'),
  (
    lambda: jd.zero_one_adam(1e-3, MEAN, 9, double_every=0),
    r'double_every must be .* got 0',
  ),
  (
    lambda: jd.zero_one_adam(1e-3, MEAN, 9, max_local=3),
    r'max_local must be a power of two, got 3',
  ),
  (lambda: jd.ef21(jd.gossip('data')), r'same result'),
  (lambda: jd.ef21(jd.mean('data', jd.ternary())), r'code that contracts'),
  (lambda: jd.econtrol(jd.gossip('data')), r'same result'),
  (lambda: jd.econtrol(TOP_K, control=-1.0), r'control must be .* got -1\.0'),
  (
    lambda: jd.econtrol(jd.low_rank_mean('data', 2)),
    r'control must be given where the contraction is not known',
  ),
  (
    lambda: jd.ef21_stepsize(1.0, [1.0], 0.0),
    r'contraction must be in \(0, 1\], got 0',
  ),
  (
    lambda: jd.ef21_stepsize(0.0, [1.0], 0.1),
    r'smoothness must be positive, got 0',
  ),
  (
    lambda: jd.ef21_stepsize(1.0, [1.0, 0.0], 0.1),
    r'worker_smoothness must be positive .* got \[1\.0, 0\.0\]',
  ),
  (
    lambda: unchecked(jd.ef21_stepsize)(1.0, [1.0], 0.1, mean='max'),
    r"mean must be .* got 'max'",
  ),
  (
    lambda: jd.estimate_smoothness(jnp.sum, PARAMS, None, iterations=0),
    r'iterations must be at least 1, got 0',
  ),
  (
    lambda: jd.local_sgd(optax.sgd(1.0), MEAN, every=0),
    r'every must be .* got 0',
  ),
  (
    lambda: jd.local_sgd(optax.sgd(1.0), MEAN, every=2, decay=0.9),
    r'decay does nothing without feedback, got 0\.9',
  ),
  (
    lambda: jd.local_sgd(
      optax.sgd(1.0), jd.gossip('data'), every=2, feedback=True
    ),
    r'feedback=True',
  ),
  (
    lambda: jd.diloco(optax.sgd(1.0), optax.sgd(1.0), jd.gossip('data'), 2),
    r'same result',
  ),
  (
    lambda: jd.init(optax.sgd(1.0), PARAMS, axis='data'),
    r'either mesh .* or workers',
  ),
  (
    lambda: jd.init(optax.sgd(1.0), PARAMS, axis='data', workers=0),
    r'workers must be an integer of at least 1, got 0',
  ),
  (
    lambda: jd.train_step(lambda p, x: 0.0, optax.sgd(1.0), axis='data'),
    r'either mesh .* or workers',
  ),
  (
    lambda: jd.train_step(
      lambda p, x: 0.0,
      optax.sgd(1.0),
      axis='data',
      workers=2,
      batch_spec=PartitionSpec('fsdp'),
    ),
    r"batch_spec .* got batch_spec=P\S*\('fsdp',?\) and mesh=None",
  ),
]


@pytest.mark.parametrize(('make', 'message'), AT_CONSTRUCTION)
def test_refused_at_construction(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_axis_must_be_in_the_mesh(make_mesh):
  with pytest.raises(ValueError, match=r"axis must be one of .*got 'dta'"):
    jd.init(optax.sgd(1.0), PARAMS, axis='dta', mesh=make_mesh(2))


def simulate(fn, workers=2):
  return jax.vmap(fn, axis_name='data')(jnp.arange(float(workers)))


def update_with(grads, params=PARAMS, tx=None):
  tx = tx or jd.error_feedback(TOP_K)
  return simulate(lambda _: tx.update(grads, tx.init(params), params)[0])


def test_integers_and_floats_of_numpy_are_numbers():
  one = np.int64(1)
  for make in (
    lambda number: unchecked(jd.mean)(
      'data', bucket_bytes=number, seed=number, delay=number
    ),
    lambda number: unchecked(jd.low_rank_mean)('data', number, seed=number),
    lambda number: unchecked(jd.top_k)(0.5, block_size=128 * number),
  ):
    assert repr(make(one)) == repr(make(1))
  unchecked(jd.error_feedback)(TOP_K, decay=np.float32(0.5))
  unchecked(jd.gossip)('data', mixing=np.float32(0.5))
  assert repr(unchecked(jd.top_k)(np.float32(0.5))) == repr(jd.top_k(0.5))


@pytest.mark.parametrize('where', [{'mesh': 2}, {'workers': 2}])
@pytest.mark.parametrize(
  'tx',
  [
    jd.error_feedback(jd.mean('dta', jd.top_k(0.1))),
    jd.communicate(jd.mean('dta')),
    jd.error_feedback(jd.low_rank_mean('dta', 1)),
    jd.local_sgd(optax.sgd(1.0), jd.gossip('dta'), every=2),
  ],
)
def test_unbound_axis_is_named(tx, where, make_mesh):
  if 'mesh' in where:
    where = {'mesh': make_mesh(2)}
  with pytest.raises(ValueError, match=r"'dta' is not bound here"):
    jd.init(tx, PARAMS, axis='data', **where)


@pytest.mark.parametrize(
  'communicator',
  [
    MEAN,
    jd.mean('data', jd.global_top_k(0.1)),
    jd.low_rank_mean('data', 1),
    jd.gossip('data'),
    jd.gossip('data', compressor=jd.global_top_k(0.1), mixing=0.5),
  ],
)
def test_a_tree_without_numbers_passes_by(communicator):
  empty = {'e': jnp.zeros((2, 0, 3))}
  exchange = lambda x: communicator.exchange(x, communicator.init(x))[:2]
  for tree in jax.vmap(exchange, axis_name='data')(empty):
    assert tree['e'].shape == (2, 0, 3)
  assert communicator.bytes_sent(empty, 2) == 0


@pytest.mark.parametrize('dtype', ['int32', 'complex64', 'bool'])
def test_only_real_floating_point_is_averaged(dtype):
  params = {'w': jnp.ones(3, dtype)}
  with pytest.raises(TypeError, match=rf"updates\['w'\] is {dtype}"):
    update_with(params, params)


def test_empty_tree():
  with pytest.raises(ValueError, match='at least one leaf'):
    update_with({}, {})


@pytest.mark.parametrize(
  ('grads', 'message'),
  [
    ({'w': jnp.ones(4)}, r"\['w'\] was float32\[3\] .* is float32\[4\] now"),
    ({'w': jnp.ones(3, 'bfloat16')}, r'was float32\[3\] .* is bfloat16\[3\]'),
    ({'v': jnp.ones(3)}, r"\['w'\] was float32\[3\] at init and is missing"),
  ],
)
@pytest.mark.parametrize(
  'tx',
  [
    jd.error_feedback(TOP_K),
    jd.communicate(MEAN),
    jd.local_sgd(optax.sgd(1.0), TOP_K, every=2),
  ],
)
def test_leaf_that_changed_since_init(grads, message, tx):
  with pytest.raises(ValueError, match=message):
    update_with(grads, tx=tx)


def test_unknown_label():
  communicator = jd.partition(
    {'a': MEAN}, lambda t: jax.tree.map(lambda _: 'b', t)
  )
  with pytest.raises(ValueError, match=r"among \['a'\], got 'b'"):
    communicator.bytes_sent(PARAMS, 2)


@pytest.mark.parametrize(
  'tx',
  [
    jd.local_sgd(optax.sgd(1.0), MEAN, every=2),
    jd.one_bit_lamb(1e-3, MEAN, 9),
    jd.zero_one_adam(1e-3, MEAN, 9),
  ],
)
def test_params_are_needed(tx):
  with pytest.raises(ValueError, match='params must be given'):
    simulate(lambda _: tx.update(PARAMS, tx.init(PARAMS)))


@pytest.mark.parametrize(
  'where',
  [{'mesh': 4}, {'workers': 4}],
)
def test_batch_must_divide(where, make_mesh):
  where = {'axis': 'data', **where}
  if 'mesh' in where:
    where['mesh'] = make_mesh(4)
  tx = optax.chain(jd.communicate(MEAN), optax.sgd(1.0))
  state = jd.init(tx, PARAMS, **where)
  step = jd.train_step(lambda p, x: jnp.sum(p['w'] * x['x']), tx, **where)
  # On a mesh JAX finds it first, while it places the batch.
  message = r"workers, 4: batch\['x'\] .* \(6, 3\)|partitioned 4 times, .* is 6"
  with pytest.raises(ValueError, match=message):
    step(state, {'x': np.ones((6, 3), np.float32)})
