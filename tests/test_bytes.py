"""What a communicator claims to send is what the compiled program sends."""

import jax
import jax.numpy as jnp
import optax
import public
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tables import COMPRESSORS

import jaxdist as jd


def compiled_bytes(communicator, params, workers, make_mesh):
  """What one exchange sends as compiled, with feedback's second residual."""
  mesh = make_mesh(workers)
  spec = PartitionSpec(public.AXIS)

  def exchange(tree):
    tree = jax.tree.map(lambda x: x[0], tree)
    state = communicator.init(tree, feedback=True)
    result, sent, state = communicator.exchange(tree, state)
    return jax.tree.map(lambda x: x[None], (result, sent))

  step = jax.jit(
    jax.shard_map(exchange, mesh=mesh, in_specs=spec, out_specs=spec)
  )
  tree = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      (workers, *x.shape), x.dtype, sharding=NamedSharding(mesh, spec)
    ),
    params,
  )
  return jd.traffic(step, tree)


@pytest.mark.parametrize(
  'workers',
  [2, 5, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 8))],
)
@pytest.mark.parametrize('name', public.COMMUNICATORS)
def test_claimed_bytes_are_compiled_bytes(name, workers, make_mesh):
  communicator = public.COMMUNICATORS[name]
  claimed = communicator.bytes_sent(public.params(), workers)
  traffic = compiled_bytes(communicator, public.params(), workers, make_mesh)
  assert traffic.bytes_a_step == pytest.approx(claimed, rel=1e-9)
  assert {row.axis for row in traffic.rows} == {public.AXIS}


# What is gathered is the same for any number of workers. Of two rounds the five
# blocks are padded for 3 workers, of two blocks each.
@pytest.mark.parametrize(
  ('method', 'counts'),
  [
    ('gather', [3]),
    ('two_shot', [3]),
    pytest.param('gather', [2, 5, 8], marks=pytest.mark.slow),
    pytest.param('two_shot', [2, 5, 8], marks=pytest.mark.slow),
  ],
)
@pytest.mark.parametrize('name', COMPRESSORS)
def test_every_code_in_every_pattern(name, method, counts, make_mesh):
  compressor = COMPRESSORS[name]
  if method == 'two_shot' and compressor.block_size is None:
    with pytest.raises(ValueError, match='gives each worker some of the block'):
      jd.mean(public.AXIS, compressor, method)
    return
  communicator = jd.mean(public.AXIS, compressor, method)
  params = {'w': jnp.zeros((30, 20))}  # Five blocks, the last not full.
  for workers in counts:
    claimed = communicator.bytes_sent(params, workers)
    traffic = compiled_bytes(communicator, params, workers, make_mesh)
    assert traffic.bytes_a_step == pytest.approx(claimed, rel=1e-9)
    assert all(row.dtype in ('uint32', 'float32') for row in traffic.rows)


def test_bytes_worked_out_by_hand():
  params = {'w': jax.ShapeDtypeStruct((1024, 1024), 'float32')}
  blocks = 1024
  dense = 2 * 4 * 1024 * 1024
  cases = {
    jd.mean('data'): dense * 7 / 8,
    jd.mean('data', jd.quantize(bits=4)): 2 * blocks * (512 + 4) * 7 / 8,
    jd.mean('data', jd.quantize(bits=2), 'gather'): blocks * (256 + 4) * 7,
    jd.mean('data', jd.sign()): 2 * blocks * (128 + 4) * 7 / 8,
    # 51 numbers of four bytes, 51 indices of ten bits in sixteen words.
    jd.mean('data', jd.top_k(0.05)): 2 * blocks * (204 + 64) * 7 / 8,
    jd.mean('data', jd.random_k(0.05)): 2 * blocks * 204 * 7 / 8,
    jd.low_rank_mean('data', 4): 2 * 4 * 4 * 2048 * 7 / 8,
    jd.gossip('data', 'ring'): 2 * 4 * 1024 * 1024,
    jd.gossip('data', 'one_peer_exponential'): 4 * 1024 * 1024,
  }
  for communicator, expected in cases.items():
    assert communicator.bytes_sent(params, 8) == expected, communicator
  assert all(c.bytes_sent(params, 1) == 0 for c in cases)


@pytest.mark.parametrize('workers', [2, 4, 16, 64])
def test_two_shot_does_not_grow_with_workers(workers):
  params = {'w': jax.ShapeDtypeStruct((4096, 1024), 'float32')}
  code = jd.quantize(bits=4)
  payload = 4096 * (512 + 4)
  two_shot = jd.mean('data', code, 'two_shot').bytes_sent(params, workers)
  gather = jd.mean('data', code, 'gather').bytes_sent(params, workers)
  assert two_shot <= 2 * payload
  assert gather == payload * (workers - 1)


@pytest.mark.parametrize(
  ('code', 'workers', 'expected'),
  [
    (jd.random_k(0.1), 8, 'psum'),
    (jd.quantize(bits=4), 2, 'gather'),
    (jd.quantize(bits=4), 8, 'two_shot'),
    (jd.global_top_k(0.01), 8, 'gather'),
  ],
)
def test_auto_takes_the_cheapest_pattern(code, workers, expected):
  params = {'w': jax.ShapeDtypeStruct((4096, 1024), 'float32')}
  auto = jd.mean('data', code).bytes_sent(params, workers)
  assert auto == jd.mean('data', code, expected).bytes_sent(params, workers)


def test_auto_gathers_what_is_small():
  params = {'w': jax.ShapeDtypeStruct((16, 1024), 'float32')}
  auto = jd.mean('data', jd.sign()).bytes_sent(params, 8)
  assert auto == jd.mean('data', jd.sign(), 'gather').bytes_sent(params, 8)


@pytest.mark.parametrize(
  ('wrap', 'expected'),
  [
    # One int32 all-reduce more, by which all agree to skip a bad step.
    (jd.error_feedback, lambda claim: claim + 2 * 4 * 7 / 8),
    (jd.ef21, lambda claim: claim + 2 * 4 * 7 / 8),
    (jd.econtrol, lambda claim: claim + 2 * 4 * 7 / 8),
    (lambda c: jd.local_sgd(optax.sgd(0.1), c, every=4), lambda c: c / 4),
  ],
)
def test_train_step_sends_what_the_communicator_claims(
  wrap, expected, make_mesh
):
  communicator = jd.mean(public.AXIS, jd.top_k(0.1, block_size=128))
  where = {'axis': public.AXIS, 'mesh': make_mesh(8)}
  tx, params = wrap(communicator), {'w': jnp.ones((30, 20))}
  step = jd.train_step(lambda p, x: jnp.sum((x @ p['w']) ** 2), tx, **where)
  traffic = jd.traffic(step, jd.init(tx, params, **where), jnp.ones((16, 30)))
  claim = communicator.bytes_sent(params, 8)
  assert traffic.bytes_a_step == pytest.approx(expected(claim), rel=1e-9)
