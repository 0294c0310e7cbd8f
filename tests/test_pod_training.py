"""Training steps compiled for two slices: what crosses, and behind what."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P
from needs import needs_tpu_compiler

import jaxdist as jd

pytestmark = needs_tpu_compiler

SLICES = 'between slices'
SPECS = {'w': P(None, 'fsdp'), 'v': P(None, None, 'fsdp'), 'b': P()}
LAYERS, WIDTH, ROWS = 2, 512, 1024


def loss(params, x):
  def layer(x, p):
    p = jax.tree.map(lambda a: a.astype(jnp.bfloat16), p)
    return x + jax.nn.relu(x @ p['w']) @ p['v'] + p['b'], None

  y, _ = jax.lax.scan(layer, x.astype(jnp.bfloat16), params)
  return jnp.mean((y.astype(jnp.float32) - x) ** 2)


def step_traffic(communicator):
  """Traffic of a training step on two slices of four chips with FSDP."""
  mesh = jd.topology_mesh('v5e:2x2', {'dcn': 2, 'fsdp': 4}, slices=2)
  shapes = {
    'w': (LAYERS, WIDTH, 4 * WIDTH),
    'v': (LAYERS, 4 * WIDTH, WIDTH),
    'b': (LAYERS, WIDTH),
  }
  params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
  sharded = jd.per_shard(communicator, SPECS)
  tx = optax.chain(jd.error_feedback(sharded), optax.sgd(0.1))
  where = {'mesh': mesh, 'axis': 'dcn', 'specs': SPECS}
  state = jd.init(tx, params, **where)
  step = jd.train_step(loss, tx, batch_spec=P('fsdp'), **where)
  batch = jax.ShapeDtypeStruct((2 * ROWS, WIDTH), jnp.float32)
  return jd.traffic(step, state, batch), sharded.bytes_sent(state.params, 2)


@pytest.fixture(scope='module')
def dense():
  return step_traffic(jd.mean('dcn'))


def inside(traffic):
  """Kinds and shapes of what stays inside a slice."""
  return sorted((r.kind, r.shape) for r in traffic.rows if r.link != SLICES)


@pytest.mark.parametrize(
  'communicator',
  [
    jd.mean('dcn', jd.sign(), 'two_shot'),
    jd.mean('dcn', jd.top_k(0.01)),
    jd.low_rank_mean('dcn', rank=4),
  ],
  ids=repr,
)
def test_only_payloads_are_new_and_only_between_slices(communicator, dense):
  traffic, claimed = step_traffic(communicator)
  assert inside(traffic) == inside(dense[0])
  between = [r for r in traffic.rows if r.link == SLICES]
  sent = sum(r.bytes_a_step - r.padding_sent * r.times for r in between)
  flag = 512  # One int32 of the step itself, in a tile.
  # Sums of small arrays fill tiles that cannot be told from numbers.
  tiles = 3 * 4 * 1024 if 'low_rank' in repr(communicator) else 0
  assert claimed <= sent <= claimed + flag + tiles
  assert claimed < dense[1] / 10


@pytest.mark.parametrize('code', [None, jd.quantize(bits=8)], ids=repr)
def test_delayed_mean_travels_behind_all_matmuls(code):
  traffic, claimed = step_traffic(jd.mean('dcn', code, delay=1))
  between = [r for r in traffic.rows if r.link == SLICES]
  hidden = [r for r in between if r.spans_all_matmuls]
  waited = sum(r.bytes_sent for r in between if not r.spans_all_matmuls)
  assert sum(r.bytes_sent for r in hidden) > 0.9 * claimed
  # What is coded is there when the step begins: it opens before the rest.
  assert max(r.start for r in hidden) < 0.1
  assert waited <= 1024  # The flags of this step.


def test_without_delay_the_step_waits(dense):
  assert not any(r.spans_all_matmuls for r in dense[0].rows if r.link == SLICES)
