"""Workers of several devices: FSDP and TP inside, codes between."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxdist as jd

SPECS = {'w': P('fsdp'), 'v': P(None, ('fsdp', 'tp')), 'b': P()}
PARTS = {'fsdp': ['w'], 'fsdp,tp': ['v'], 'replicated': ['b']}


def make_mesh(dcn, fsdp, tp, axis_type=AxisType.Auto):
  return jax.make_mesh(
    (dcn, fsdp, tp),
    ('dcn', 'fsdp', 'tp'),
    (axis_type,) * 3,
    devices=jax.devices()[: dcn * fsdp * tp],
  )


def params():
  rng = np.random.default_rng(0)
  shapes = {'w': (64, 48), 'v': (48, 64), 'b': (64,)}
  return {
    name: jnp.asarray(0.1 * rng.normal(size=shape), jnp.float32)
    for name, shape in shapes.items()
  }


def loss(params, x):
  hidden = jnp.tanh(x @ params['w'])
  return jnp.mean((hidden @ params['v'] + params['b'] - x) ** 2)


def batches(steps):
  rng = np.random.default_rng(1)
  return rng.normal(size=(steps, 16, 64)).astype(np.float32)


def train(tx, steps, specs=SPECS, **where):
  cut = {'specs': specs, 'batch_spec': P('fsdp')} if 'mesh' in where else {}
  state = jd.init(
    tx,
    params(),
    axis='dcn',
    **where,
    **{k: cut[k] for k in cut if k == 'specs'},
  )
  step = jd.train_step(loss, tx, axis='dcn', **where, **cut)
  places = jax.tree.map(lambda x: x.sharding, state)
  for batch in batches(steps):
    state, metrics = step(state, batch)
  assert step._cache_size() == 1, 'the step compiles twice'
  if 'mesh' in where:
    jax.tree.map(
      lambda x, s: (
        x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(f'{s}')
      ),
      state,
      places,
    )
  return state, metrics, step


def optimizers(communicator):
  adam = optax.adam(1e-2)
  return {
    'error_feedback': optax.chain(jd.error_feedback(communicator), adam),
    'diloco': jd.diloco(adam, optax.sgd(0.7), communicator, every=2),
    'dgc': optax.chain(jd.dgc(communicator, max_norm=1.0), optax.sgd(0.1)),
  }


@pytest.mark.parametrize('name', ['error_feedback', 'diloco', 'dgc'])
def test_uncompressed_shards_are_data_parallel(name):
  """Cut over 4 devices a worker, or whole on one: the same training."""
  mean = jd.mean('dcn')
  got, metrics, _ = train(
    optimizers(jd.per_shard(mean, SPECS))[name], 4, mesh=make_mesh(2, 2, 2)
  )
  want, want_metrics, _ = train(optimizers(mean)[name], 4, workers=2)
  np.testing.assert_allclose(metrics['loss'], want_metrics['loss'], rtol=1e-5)
  got_params, want_params = jd.mean_params(got), jd.mean_params(want)
  for key, leaf in got_params.items():  # Adam's roots blow up a last bit.
    np.testing.assert_allclose(leaf, want_params[key], rtol=2e-5, atol=1e-5)
  # What is shaped as a parameter is cut as it is, along the workers too.
  residual_like = jax.tree.leaves_with_path(got.opt_state)
  cut = {
    x.sharding.spec
    for path, x in residual_like
    if path[-1] == jax.tree_util.DictKey('v')
  }
  assert cut <= {SPECS['v'], P('dcn', *SPECS['v'])}, cut


@pytest.mark.parametrize('name', ['error_feedback', 'diloco'])
def test_one_worker_of_several_devices_loses_nothing(name):
  coded = jd.mean('dcn', jd.sign(block_size=128))
  got, *_ = train(
    optimizers(jd.per_shard(coded, SPECS))[name], 3, mesh=make_mesh(1, 2, 2)
  )
  want, *_ = train(optimizers(jd.mean('dcn'))[name], 3, workers=1)
  got_params, want_params = jd.mean_params(got), jd.mean_params(want)
  for key, leaf in got_params.items():
    np.testing.assert_allclose(leaf, want_params[key], rtol=2e-5, atol=1e-5)


CODED = {
  'two_shot_sign': jd.mean('dcn', jd.sign(block_size=128), 'two_shot'),
  'gather_quantize': jd.mean(
    'dcn', jd.quantize(bits=4, block_size=128), 'gather'
  ),
  'delayed_top_k': jd.mean('dcn', jd.top_k(0.1, block_size=128), delay=1),
  'low_rank': jd.low_rank_mean('dcn', rank=1),
  'partition': jd.partition(
    {'matrix': jd.mean('dcn', jd.sign(block_size=128)), 'rest': jd.mean('dcn')},
    lambda tree: jax.tree.map(
      lambda x: 'matrix' if x.ndim > 1 else 'rest', tree
    ),
  ),
}


def shards(tree, mesh):
  """Each device's part of a tree of NumPy arrays, by its place in a worker."""
  cut = jax.tree.map(
    lambda x, s: jax.device_put(x, jax.NamedSharding(mesh, s)), tree, SPECS
  )
  first_worker = mesh.devices[0].ravel()
  data = jax.tree.map(
    lambda x: {s.device: np.asarray(s.data) for s in x.addressable_shards}, cut
  )
  return [{k: v[d] for k, v in data.items()} for d in first_worker]


@pytest.mark.parametrize('name', CODED)
def test_a_shard_is_exchanged_as_by_itself(name):
  """Two exchanges, against the communicator on each device's shards alone."""
  mesh, workers = make_mesh(2, 2, 2), 2
  communicator = CODED[name]
  sharded = jd.per_shard(communicator, SPECS)
  rng = np.random.default_rng(0)
  trees = [
    {
      k: rng.normal(size=(workers, *p.shape)).astype(np.float32)
      for k, p in params().items()
    }
    for _ in range(2)
  ]

  def twice(first, second, which=sharded):
    state = which.init(first, feedback=True)
    one, _, state = which.exchange(first, state)
    two, sent, state = which.exchange(second, state)
    return (one, two), sent

  is_worker = P('dcn')
  run = jax.jit(
    jax.shard_map(
      lambda *trees: jax.tree.map(
        lambda x: x[None], twice(*jax.tree.map(lambda x: x[0], trees))
      ),
      mesh=mesh,
      in_specs=(is_worker, is_worker),
      out_specs=is_worker,
      axis_names={'dcn'},
    )
  )
  got = run(*trees)

  # By hand: for each device's place, each group of leaves that lie alike.
  alone = jax.jit(
    jax.vmap(lambda a, b: twice(a, b, communicator), axis_name='dcn')
  )
  of_worker = lambda tree, w: shards({k: x[w] for k, x in tree.items()}, mesh)
  cut = [[of_worker(tree, w) for w in range(workers)] for tree in trees]
  got_cut = [of_worker(tree, 0) for tree in (*got[0], got[1])]
  for device, keys in itertools.product(
    range(mesh.devices[0].size), PARTS.values()
  ):
    own = [
      {k: np.stack([part[device][k] for part in parts]) for k in keys}
      for parts in cut
    ]
    (one, two), sent = alone(*own)
    for mine, theirs in zip(got_cut, (one, two, sent), strict=True):
      for k in keys:
        # Products of low-rank factors are added up in another order.
        np.testing.assert_allclose(mine[device][k], theirs[k][0], atol=1e-5)


def step_traffic(tx):
  """Of the compiled step, and what the parameters look like."""
  where = {'mesh': make_mesh(2, 2, 2), 'axis': 'dcn', 'specs': SPECS}
  state = jd.init(tx, jax.eval_shape(params), **where)
  step = jd.train_step(loss, tx, **where, batch_spec=P('fsdp'))
  batch = jax.ShapeDtypeStruct((16, 64), jnp.float32)
  return jd.traffic(step, state, batch), state.params


def inside(traffic):
  """Kinds and shapes of what stays inside a worker."""
  return sorted((r.kind, r.shape) for r in traffic.rows if r.axis != 'dcn')


@pytest.fixture(scope='module')
def dense_inside():
  sharded = jd.per_shard(jd.mean('dcn'), SPECS)
  tx = optax.chain(jd.error_feedback(sharded), optax.sgd(0.1))
  return inside(step_traffic(tx)[0])


@pytest.mark.parametrize('name', CODED)
def test_bytes_between_workers_are_claimed_and_none_more_inside(
  name, dense_inside
):
  sharded = jd.per_shard(CODED[name], SPECS)
  tx = optax.chain(jd.error_feedback(sharded), optax.sgd(0.1))
  traffic, shapes = step_traffic(tx)
  skip_flag = 4  # 2 * 4 * (2 - 1) / 2 bytes: the step's own all-reduce.
  assert traffic.by_axis()['dcn'] == sharded.bytes_sent(shapes, 2) + skip_flag
  assert inside(traffic) == dense_inside


@pytest.mark.parametrize('name', ['one_bit_lamb', 'masha2', 'dgc'])
def test_what_a_method_sends_whole_goes_shard_by_shard_too(name, dense_inside):
  """Warm-ups, reference points and vectors gather nothing inside a worker."""
  sharded = jd.per_shard(CODED['two_shot_sign'], SPECS)
  mixed = jd.partition(
    {'bias': jd.mean('dcn'), 'matrix': sharded},
    {'w': 'matrix', 'v': 'matrix', 'b': 'bias'},
  )
  tx = {
    'one_bit_lamb': lambda: jd.one_bit_lamb(1e-2, mixed, warmup_steps=2),
    'masha2': lambda: jd.masha2(0.1, sharded, keep=0.5),
    'dgc': lambda: optax.chain(jd.dgc(sharded), optax.sgd(0.1)),
  }[name]()
  traffic, _ = step_traffic(tx)
  arrays = [row for row in inside(traffic) if row[1]]  # Norms are scalars.
  assert arrays == [row for row in dense_inside if row[1]]


def test_labels_of_all_leaves_fit_the_shards():
  """A group of shards sees None for other leaves; labels need not."""
  where = {'mesh': make_mesh(2, 2, 2), 'axis': 'dcn', 'specs': SPECS}
  placed = jd.init(optax.sgd(0.1), jax.eval_shape(params), **where).params
  coded, whole = jd.mean('dcn', jd.sign(block_size=128)), jd.mean('dcn')
  labels = {'w': 'coded', 'v': 'coded', 'b': 'whole'}
  for make in (jd.partition, jd.per_leaf):
    communicator = make({'coded': coded, 'whole': whole}, labels)
    blocks, bytes_a_block = 12 + 6, 16 + 4  # Of 32 x 48 and 48 x 16 numbers.
    assert (
      jd.per_shard(communicator, SPECS).bytes_sent(placed, 2)
      == blocks * bytes_a_block + 4 * 128  # A bucket of whole rows.
    )


def test_another_number_of_workers_keeps_what_each_shard_is_owed(tmp_path):
  communicator = jd.per_shard(CODED['two_shot_sign'], SPECS)
  tx = optimizers(communicator)['error_feedback']
  state, *_ = train(tx, 2, mesh=make_mesh(2, 2, 1))
  jd.save(tmp_path, 2, state)
  like = jd.init(
    tx, jax.eval_shape(params), mesh=make_mesh(4, 2, 1), axis='dcn', specs=SPECS
  )
  more = jd.restore(tmp_path, like)
  for key, leaf in more.opt_state[0].residual.value.items():
    np.testing.assert_allclose(  # A sum of four in another order.
      leaf.mean(0), state.opt_state[0].residual.value[key].mean(0), atol=1e-8
    )
  dropped = lambda s: s.opt_state[0].communicator['fsdp'].value.dropped.value[0]
  old, new = (np.asarray(dropped(s)) for s in (state, more))
  assert np.any(old)
  rows = lambda x: x.reshape(-1, *x.shape[2:])  # (rows, shards, block)
  np.testing.assert_array_equal(rows(new)[: len(rows(old))], rows(old))
  step = jd.train_step(
    loss, tx, mesh=make_mesh(4, 2, 1), axis='dcn', specs=SPECS
  )
  step(more, batches(1)[0])


@pytest.mark.parametrize(
  ('specs', 'message'),
  [
    ({**SPECS, 'w': P('dcn')}, r"axes inside a worker.*got P\S*\('dcn',?\)"),
    ({**SPECS, 'w': P('ep')}, r"axes inside a worker, \('fsdp', 'tp'\)"),
    ({**SPECS, 'b': P(None, 'tp')}, r"more dimensions.*\['b'\].*\(64,\)"),
    ({'w': P()}, r'with the structure'),
  ],
)
def test_specs_that_cannot_be(specs, message):
  mesh = make_mesh(2, 2, 2)
  plain = optax.chain(jd.communicate(jd.mean('dcn')), optax.sgd(0.1))
  with pytest.raises(ValueError, match=message):
    jd.init(plain, params(), mesh=mesh, axis='dcn', specs=specs)
  tx = jd.communicate(jd.per_shard(jd.mean('dcn'), specs))
  with pytest.raises(ValueError, match=message):
    jd.init(tx, params(), mesh=mesh, axis='dcn')


def test_uneven_shards_name_the_leaf():
  tx = jd.communicate(jd.per_shard(jd.mean('dcn'), P('fsdp')))
  with pytest.raises(
    ValueError, match=r"evenly: updates\['w'\] has shape \(3,"
  ):
    jd.init(tx, {'w': jnp.ones((3, 2))}, mesh=make_mesh(2, 2, 1), axis='dcn')


def test_shards_need_a_mesh():
  tx = jd.communicate(jd.per_shard(jd.mean('dcn'), SPECS))
  with pytest.raises(ValueError, match='needs a mesh'):
    jd.init(tx, params(), workers=2, axis='dcn')
  with pytest.raises(ValueError, match='without mesh'):
    jd.init(tx, params(), workers=2, axis='dcn', specs=SPECS)
  with pytest.raises(ValueError, match='type Auto'):
    mesh = make_mesh(2, 2, 2, AxisType.Explicit)
    jd.init(tx, params(), mesh=mesh, axis='dcn', specs=SPECS)
