"""The bytes of small programs, each worked out by hand.

In the comments W is the number of devices in a group. float32 has 4 bytes.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import psum, sharded
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxdist as jd

DATA = P('data')
BOTH = P(('dcn', 'data'))
DCN = P('dcn')
STEP = jnp.int32(0)


@pytest.fixture(scope='session')
def dcn_mesh():
  return jax.make_mesh(
    (2, 4), ('dcn', 'data'), axis_types=(AxisType.Auto, AxisType.Auto)
  )


def test_psum(traffic_of):
  # 24 floats are 96 bytes; 2 * 96 * 7/8.
  sent = traffic_of(psum)
  assert sent.rows == (
    jd.Collective(
      kind='all-reduce',
      dtype='float32',
      shape=(24,),
      operand_bytes=96,
      bytes_sent=168.0,
      axis='data',
      link='inside a host',
      group_size=8,
      times=1.0,
      source='psum',
    ),
  )
  assert sent.bytes_a_step == 168
  assert sent.payload_bytes == 96
  assert sent.by_axis() == {'data': 168}
  assert sent.by_kind() == {'all-reduce': 168}


@pytest.mark.parametrize('workers', [2, 3, 5])
def test_odd_numbers_of_devices(traffic_of, make_mesh, workers):
  (row,) = traffic_of(psum, mesh=make_mesh(workers)).rows
  assert row.group_size == workers
  # 2 * 96 * 2/3 = 128 with three devices.
  expected = {2: 96.0, 3: 128.0, 5: 153.6}[workers]
  assert row.bytes_sent == expected
  assert row.axis == 'data'


def test_mesh_of_other_devices(traffic_of):
  mesh = jax.make_mesh(
    (3,), ('data',), devices=jax.devices()[4:7], axis_types=(AxisType.Auto,)
  )
  assert traffic_of(psum, mesh=mesh).by_axis() == {'data': 128}


def test_all_gather_in_scan(traffic_of):
  def step(x):
    def body(carry, _):
      return carry + lax.all_gather(carry, 'data').sum(0), None

    return lax.scan(body, x, None, length=7)[0]

  # A device's 96 bytes reach 7 others, 7 times: 96 * 7 * 7.
  sent = traffic_of(step)
  (row,) = sent.rows
  assert (row.kind, row.times, row.bytes_sent) == ('all-gather', 7, 672)
  assert sent.bytes_a_step == 4704
  assert sent.payload_bytes == 672


def test_axes_of_a_mesh(traffic_of, dcn_mesh):
  def step(x):
    both = psum(x, ('dcn', 'data'))
    return psum(x, 'dcn') + psum(2 * x, 'data') + both

  # W is 2, 4 and 8: 2 * 96 times 1/2, 3/4 and 7/8.
  sent = traffic_of(step, mesh=dcn_mesh, spec=BOTH)
  assert sent.by_axis() == {'data': 144, 'dcn': 96, 'dcn,data': 168}
  assert {row.axis: row.group_size for row in sent.rows} == {
    'data': 4,
    'dcn': 2,
    'dcn,data': 8,
  }


def test_mesh_found_in_the_program(dcn_mesh):
  """Arguments without a sharding: the outputs' tells the mesh."""
  step = jax.jit(
    jax.shard_map(
      lambda x: psum(x, 'dcn'),
      mesh=dcn_mesh,
      in_specs=BOTH,
      out_specs=P('data'),
    )
  )
  assert jd.traffic(step, jnp.zeros(16)).by_axis() == {'dcn': 8}


def test_manual_over_one_axis(dcn_mesh):
  step = jax.jit(
    jax.shard_map(
      lambda x: lax.psum(x, 'dcn'),
      mesh=dcn_mesh,
      in_specs=P('dcn'),
      out_specs=P(),
      axis_names={'dcn'},
    )
  )
  sent = jd.traffic(step, sharded(dcn_mesh, (2, 16), P('dcn', 'data')))
  # A device holds 4 of the 16 floats; 2 * 16 * 1/2.
  assert sent.by_axis() == {'dcn': 16}


def test_nested_shard_map(dcn_mesh):
  """A gather of each device's part, within one over the outer axis alone."""

  def part(x):
    return lax.all_gather(x, 'data').sum(0) + lax.psum(x, 'dcn')

  def step(x):
    inner = jax.shard_map(
      part, in_specs=P('data'), out_specs=P('data'), axis_names={'data'}
    )
    return inner(2 * x)

  outer = jax.shard_map(
    step, mesh=dcn_mesh, in_specs=DCN, out_specs=DCN, axis_names={'dcn'},
    check_vma=False,
  )  # fmt: skip
  sent = jd.traffic(jax.jit(outer), sharded(dcn_mesh, (8 * 24,), BOTH))
  # 96 bytes to 3 others of a slice; 2 * 96 * 1/2 to its like in the other.
  assert sent.by_axis() == {'data': 288, 'dcn': 96}


def test_groups_that_are_no_axis(traffic_of):
  groups = [[0, 3], [1, 2], [4, 5], [6, 7]]
  (row,) = traffic_of(
    lambda x: lax.psum(x, 'data', axis_index_groups=groups)
  ).rows
  assert (row.axis, row.group_size, row.bytes_sent) == ('?', 2, 96)


def test_permute_of_some(traffic_of, dcn_mesh):
  sent = traffic_of(
    lambda x: lax.ppermute(x, 'data', [(0, 1), (1, 2), (3, 3)]),
    mesh=dcn_mesh,
    spec=BOTH,
  )
  (row,) = sent.rows
  # Two of four devices send 96 bytes to another one.
  assert (row.axis, row.bytes_sent, row.group_size) == ('data', 48, 3)


@pytest.mark.parametrize('tiled', [False, True])
def test_all_to_all(traffic_of, tiled):
  sent = traffic_of(
    lambda x: lax.all_to_all(
      x if tiled else x.reshape(8, 3), 'data', 0, 0, tiled=tiled
    ).reshape(24)
  )
  (row,) = sent.rows
  # One eighth of 96 bytes stays.
  assert (row.kind, row.bytes_sent) == ('all-to-all', 84)
  assert np.prod(row.shape) == 24


def test_psum_scatter(traffic_of):
  sent = traffic_of(
    lambda x: jnp.tile(lax.psum_scatter(x, 'data', tiled=True), 8)
  )
  (row,) = sent.rows
  assert (row.kind, row.shape, row.bytes_sent) == ('reduce-scatter', (24,), 84)


def test_bfloat16_is_widened_on_cpu(traffic_of):
  sent = traffic_of(lambda x: psum(x.astype(jnp.bfloat16)))
  (row,) = sent.rows
  assert (row.dtype, row.bytes_sent) == ('float32', 168)
  assert 'bfloat16 is sent as float32' in str(sent)
  assert traffic_of(psum).notes == ()
  # Of one size, so that the compiler sums both at once.
  both = lambda x: psum(x.astype(jnp.bfloat16)) + psum(jnp.cos(x))
  (note,) = traffic_of(both).notes
  assert note.startswith('bfloat16 is sent as float32')


@pytest.mark.parametrize(
  ('dtype', 'num_bytes'), [(jnp.uint32, 96), (jnp.uint8, 24), (jnp.bool, 24)]
)
def test_dtypes_that_cost_what_they_say(traffic_of, dtype, num_bytes):
  (row,) = traffic_of(
    lambda x: lax.all_gather(x.astype(dtype), 'data').sum(0) * x
  ).rows
  assert row.dtype == jnp.dtype(dtype).name
  assert (row.operand_bytes, row.bytes_sent) == (num_bytes, num_bytes * 7)


def test_one_row_for_each_array_of_a_combined_collective(traffic_of):
  def step(x):
    parts = [x[:3], x[3:], x[:12].reshape(3, 4)]
    return sum(psum(part).sum() for part in parts) + x

  sent = traffic_of(step)
  assert sorted(row.shape for row in sent.rows) == [(3,), (3, 4), (21,)]
  assert sent.payload_bytes == 4 * 36
  assert sent.bytes_a_step == 2 * 4 * 36 * 7 / 8


def test_loop_of_unknown_length_is_flagged(traffic_of):
  sent = traffic_of(
    lambda x, i: lax.fori_loop(0, i, lambda _, x: psum(x), x), STEP
  )
  (row,) = sent.rows
  assert row.in_unknown_loop
  assert row.times == 1
  assert 'unknown length' in str(sent)


def test_collective_in_the_condition_of_a_loop(traffic_of):
  def step(x):
    def go_on(carry):
      return (carry[1] < 6) & (lax.psum(carry[0].sum(), 'data') < 9)

    def body(carry):
      return carry[0] + 1, carry[1] + 1

    return lax.while_loop(go_on, body, (x, 0))[0]

  (row,) = traffic_of(step).rows
  assert row.in_unknown_loop


def test_matrix_product_of_the_partitioner(dcn_mesh):
  """Not our collective: the partitioner's, for a contracted dimension."""
  left = sharded(dcn_mesh, (32, 64), P(None, 'data'))
  right = sharded(dcn_mesh, (64, 16), P('data', None))
  sent = jd.traffic(jax.jit(jnp.matmul), left, right)
  (row,) = sent.rows
  # 32 x 16 floats are 2048 bytes; 2 * 2048 * 3/4.
  assert (row.kind, row.axis, row.bytes_sent) == ('all-reduce', 'data', 3072)
  assert row.source == 'dot_general'


def test_chips_can_be_added(monkeypatch):
  """Two products of 64 x 32 by 32 x 16 each, at rates of the user's own."""
  step = jax.jit(lambda a, b: jnp.tanh(a @ b) @ b.T)
  shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 32), (32, 16))]
  monkeypatch.setitem(jd.CHIPS, 'cpu', jd.Chip(flops=1e3, memory_bytes=1e12))
  work = jd.traffic(step, *shapes).work
  assert work.flops == 2 * 2 * 64 * 32 * 16
  assert work.seconds == pytest.approx(work.flops / 1e3, rel=1e-3)


def test_no_collectives():
  sent = jd.traffic(jax.jit(jnp.sin), jnp.zeros(3))
  assert sent.rows == ()
  assert sent.bytes_a_step == 0
  assert str(sent) == 'no collectives: nothing is sent'


def test_collective_among_one_device_sends_nothing(traffic_of, make_mesh):
  assert traffic_of(psum, mesh=make_mesh(1)).rows == ()

  def itself(x):
    return lax.ppermute(x, 'data', [(i, i) for i in range(8)])

  assert traffic_of(itself).rows == ()


def test_arguments_stay_alive(make_mesh):
  mesh = make_mesh()
  x = jax.device_put(jnp.arange(16.0), NamedSharding(mesh, DATA))
  ran = []

  def worker(x):
    jax.debug.callback(lambda: ran.append(1))
    return x - lax.pmean(x, 'data')

  step = jax.jit(
    jax.shard_map(
      worker, mesh=mesh, in_specs=DATA, out_specs=DATA, check_vma=False
    ),
    donate_argnums=0,
  )
  assert jd.traffic(step, x).bytes_a_step == 14
  jax.effects_barrier()
  assert not ran
  assert not x.is_deleted()
  np.testing.assert_array_equal(x, np.arange(16.0))


def test_keyword_arguments(make_mesh):
  mesh = make_mesh()

  @jax.jit
  def step(tree, *, scale):
    total = jax.shard_map(psum, mesh=mesh, in_specs=DATA, out_specs=P())
    return total(tree['x']) * scale

  x = sharded(mesh, (16,), DATA)
  assert jd.traffic(step, {'x': x}, scale=2.0).bytes_a_step == 14


def test_compiled_program(make_mesh):
  mesh = make_mesh()
  step = jax.jit(jax.shard_map(psum, mesh=mesh, in_specs=DATA, out_specs=P()))
  x = sharded(mesh, (16,), DATA)
  compiled = step.lower(x).compile()
  assert jd.traffic(compiled) == jd.traffic(step, x)
  with pytest.raises(ValueError, match='args and topology must be left out'):
    jd.traffic(compiled, x)


@pytest.mark.parametrize('step', [np.sum, 'step', None])
def test_not_jitted(step):
  with pytest.raises(ValueError, match='step must be a jitted function'):
    jd.traffic(step, jnp.zeros(3))


def test_json_round_trip(traffic_of):
  def step(x, i):
    return lax.cond(i > 3, psum, lambda x: x, x)

  sent = traffic_of(step, STEP)
  parsed = json.loads(sent.to_json())
  assert parsed['bytes_a_step'] == 168
  assert parsed['payload_bytes'] == 96
  assert parsed['rows'][0]['shape'] == [24]
  assert jd.Traffic.from_json(sent.to_json()) == sent
