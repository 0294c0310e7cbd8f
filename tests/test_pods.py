"""Programs of TPU pods, compiled on a CPU: bytes, links, axes, schedules.

The meshes are of two slices of 2 x 2 chips unless a test says otherwise. W is
the number of devices in a group; float32 has 4 bytes.
"""

import json

import jax
import jax.numpy as jnp
import optax
import public
import pytest
from compiled import (
  SHAPES,
  exchange_traffic,
  loop_and_branch,
  one_of_each,
  sharded,
  table,
  worker_traffic,
)
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from needs import needs_tpu_compiler

import jaxdist as jd

pytestmark = needs_tpu_compiler

SLICES, CHIPS = 'between slices', 'chip links'
BOTH = P(('dcn', 'ici'))
KILO = 1024  # numbers in a tile of 8 x 128


@pytest.fixture(scope='session')
def pod():
  return jd.topology_mesh('v5e:2x2', {'dcn': 2, 'ici': 4}, slices=2)


def test_between_slices(pod):
  # W = 2. All-reduce 2B/2, all-gather B, all-to-all and reduce-scatter B/2,
  # permute B.
  kilobytes = 4 * KILO
  assert table(worker_traffic(one_of_each('dcn', 2), pod, *SHAPES)) == [
    (SLICES, 'dcn', 'all-gather', 16 * kilobytes),
    (SLICES, 'dcn', 'all-reduce', 8 * kilobytes),
    (SLICES, 'dcn', 'all-to-all', 12 * kilobytes),
    (SLICES, 'dcn', 'collective-permute', 40 * kilobytes),
    (SLICES, 'dcn', 'reduce-scatter', 16 * kilobytes),
  ]


def test_inside_a_slice(pod):
  # W = 4. 2B 3/4, 3B, B 3/4, B 3/4, B.
  kilobytes = 4 * KILO
  assert table(worker_traffic(one_of_each('ici', 4), pod, *SHAPES)) == [
    (CHIPS, 'ici', 'all-gather', 48 * kilobytes),
    (CHIPS, 'ici', 'all-reduce', 12 * kilobytes),
    (CHIPS, 'ici', 'all-to-all', 18 * kilobytes),
    (CHIPS, 'ici', 'collective-permute', 40 * kilobytes),
    (CHIPS, 'ici', 'reduce-scatter', 24 * kilobytes),
  ]


def test_over_both_levels(pod):
  def step(a, b, c):
    both = ('dcn', 'ici')
    return (
      lax.psum(jnp.sin(a), both),
      lax.all_to_all(jnp.sin(b), both, 0, 0, tiled=True),
      lax.ppermute(jnp.sin(c), both, [(i, (i + 1) % 8) for i in range(8)]),
    )

  a, b, c = 8 * 4 * KILO, 16 * 4 * KILO, 24 * 4 * KILO
  shapes = [(8 * kilo, 128) for kilo in (8, 16, 24)]
  assert table(worker_traffic(step, pod, *shapes)) == [
    # Half of the chunks are for the other slice; all go through the hosts.
    (SLICES, 'dcn', 'all-reduce', 2 * (a / 4) / 2),
    (SLICES, 'dcn,ici', 'all-to-all', b / 2),
    # Two of eight chips send to the other slice, six to their neighbour.
    (SLICES, 'dcn,ici', 'collective-permute', c * 2 / 8),
    (CHIPS, 'ici', 'all-gather', a / 4 * 3),
    (CHIPS, 'ici', 'collective-permute', c * 6 / 8),
    (CHIPS, 'ici', 'reduce-scatter', a * 3 / 4),
  ]


def test_scan_and_branch(pod):
  step = loop_and_branch('dcn', 'dcn')
  sent = worker_traffic(step, pod, (64, 128), others=[jnp.int32(0)])
  kilobytes = 8 * 4 * KILO
  gather, reduce = sorted(sent.rows, key=lambda row: row.kind)
  assert (gather.times, gather.bytes_sent, gather.within) == (
    7,
    kilobytes,
    'loop',
  )
  assert (reduce.times, reduce.bytes_sent, reduce.within) == (
    0.2,
    kilobytes,
    'branch',
  )
  assert sent.bytes_a_step == pytest.approx(7.2 * kilobytes)
  assert not reduce.in_unknown_branch


def test_nested_shard_map():
  """A payload of each chip's own shard crosses, and nothing dense."""
  mesh = jd.topology_mesh('v5e:2x2', {'dcn': 2, 'a': 2, 'b': 2}, slices=2)

  def codes(x):
    return lax.all_gather(x.astype(jnp.int8), 'dcn').sum(0, dtype=jnp.float32)

  def step(x):
    inner = jax.shard_map(
      codes,
      in_specs=P('a', 'b'),
      out_specs=P('a', 'b'),
      axis_names={'a', 'b'},
      check_vma=False,
    )
    return inner(x * 2)

  outer = jax.shard_map(
    step,
    mesh=mesh,
    in_specs=P('dcn'),
    out_specs=P('dcn'),
    axis_names={'dcn'},
    check_vma=False,
  )
  # 2 x 64 x 256 numbers over 8 chips, in bytes: 32 x 128 each.
  x = sharded(mesh, (128, 256), P(('dcn', 'a'), 'b'))
  (row,) = jd.traffic(jax.jit(outer), x).rows
  assert (row.kind, row.dtype, row.bytes_sent) == ('all-gather', 'int8', 4096)
  assert (row.axis, row.link) == ('dcn', SLICES)


def test_padding_is_counted(pod):
  # 24 x 20 numbers in tiles of 8 x 128 take 24 x 128.
  gather = lambda x: lax.all_gather(jnp.sin(x), 'dcn').sum(0)
  sent = worker_traffic(gather, pod, (24, 20))
  assert sent.bytes_a_step == 4 * 24 * 128
  assert sent.padding_a_step == 4 * 24 * 108
  assert '84% of it is padding' in str(sent)


def mesh_of(slices):
  return jd.topology_mesh(
    'v5e:2x2', {public.AXIS: slices, 'ici': 4}, slices=slices
  )


# XLA sums what it can in one array of whole tiles, whose padding it doesn't
# tell from numbers: these get arrays that fill tiles.
SUMMED = {
  'mean',
  'mean_psum_random_k',
  'mean_delayed',
  'low_rank_mean',
}
CLAIMS = [(name, 2) for name in public.COMMUNICATORS] + [
  ('mean', 4),
  ('mean_two_shot_sign', 4),
  ('mean_gather_top_k', 4),
  ('gossip_exponential', 4),
]


@pytest.mark.parametrize(('name', 'slices'), CLAIMS)
def test_claimed_bytes_are_compiled_bytes(name, slices):
  communicator = public.COMMUNICATORS[name]
  params = public.params()
  if name in SUMMED:
    params = {'w': jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
  sent = exchange_traffic(communicator, params, mesh_of(slices))
  claimed = communicator.bytes_sent(params, slices)
  if 'delayed' in name:  # Its flag of 4 bytes fills a tile.
    claimed += 512 - 4
  numbers = sent.bytes_a_step - sent.padding_a_step
  assert numbers == pytest.approx(claimed, rel=1e-9)
  assert sent.by_link().keys() == {SLICES}
  assert sent.by_axis().keys() == {public.AXIS}
  if name in SUMMED:
    assert not sent.padding_a_step


@pytest.mark.parametrize(
  ('topology', 'chips'),
  [
    ('v4:2x2x1', 4),
    ('v5e:2x4', 8),
    ('v5p:2x2x1', 4),
    ('v6e:2x2', 4),
    ('tpu7x:2x2x1', 8),  # two devices a chip
  ],
)
def test_generations(topology, chips):
  """The same function, over a mesh of no devices, on every kind of pod."""
  mesh = AbstractMesh(
    (2, chips), ('dcn', 'ici'), axis_types=(AxisType.Auto,) * 2
  )

  @jax.jit
  def step(weights, x):
    loss = lambda w: jnp.mean(jnp.square(x @ w), dtype=jnp.float32)
    return weights - jax.grad(loss)(weights)

  weights = sharded(mesh, (1024, 512), P(), jnp.bfloat16)
  x = sharded(mesh, (2 * chips * 64, 1024), BOTH, jnp.bfloat16)
  sent = jd.traffic(step, weights, x, topology=topology, slices=2)
  # Two products of 64 x 1024 by 1024 x 512 a device.
  assert sent.work.flops == 2 * 2 * 64 * 1024 * 512
  # The gradient's share of a device crosses, and all of it runs around a slice.
  gradient = 2 * 1024 * 512
  assert sent.by_link()[SLICES] == pytest.approx(gradient / chips, rel=0.1)
  around = 2 * gradient * (chips - 1) / chips
  assert sent.by_link()[CHIPS] == pytest.approx(around, rel=0.1)
  memory = sent.memory
  assert memory.arguments == gradient + 2 * 64 * 1024
  assert memory.outputs == gradient
  assert memory.total >= memory.arguments + memory.outputs


def layers(x, weights):
  for weight in weights:
    x = jax.nn.relu(x @ weight)
  return x


def overlapping(x, sent, weights):
  """The transfer of the last step's value runs beside this step's layers.

  Without the barrier the sum is fused into the last product, which then waits.
  """
  received = lax.psum(sent, 'dcn')
  received, y = lax.optimization_barrier((received, layers(x, weights)))
  return y + received


def exposed(x, sent, weights):
  """What is sent is known only behind the layers."""
  return sent + lax.psum(layers(x, weights), 'dcn')


def scheduled(pod, function):
  arguments = [
    sharded(pod, (8 * 512, 512)),
    sharded(pod, (8 * 512, 512)),
    [sharded(pod, (512, 512), P()) for _ in range(4)],
  ]
  step = jax.shard_map(
    function, mesh=pod, in_specs=(BOTH, BOTH, P()), out_specs=BOTH
  )
  return jd.traffic(jax.jit(step), *arguments)


def test_transfer_beside_all_matmuls(pod):
  (row,) = scheduled(pod, overlapping).rows
  # Four layers; XLA fuses neighbours.
  assert row.matmuls == row.matmuls_inside >= 2
  assert row.spans_all_matmuls
  assert row.start < 0.05
  # Behind it only the sum: 3 x 1 MB of the 8 x 1 MB that go through memory.
  assert 0.6 < row.overlap == row.end - row.start < 0.9


def test_transfer_behind_all_matmuls(pod):
  (row,) = scheduled(pod, exposed).rows
  assert row.matmuls >= 2
  assert row.matmuls_inside == 0
  assert not row.spans_all_matmuls
  assert row.start > 0.6
  assert row.overlap < 0.1


def test_transfer_in_a_branch(pod):
  """A branch has a schedule of its own."""

  def step(x, sent, weights):
    branch = lambda: overlapping(x, sent, weights)
    return lax.cond(jnp.sum(weights[0]) > 0, branch, lambda: x)

  sent = scheduled(pod, step)
  (row,) = sent.rows
  assert row.within == 'branch'
  assert row.spans_all_matmuls
  assert row.overlap > 0.6
  assert {each.kind for each in sent.schedules} == {'program', 'branch'}


def test_schedule_as_json_and_picture(pod, tmp_path):
  sent = scheduled(pod, overlapping)
  (row,) = json.loads(sent.to_json())['rows']
  assert row['bytes_received'] == row['bytes_sent'] == 4 * 512 * 512
  assert row['overlap'] == sent.rows[0].overlap
  again = jd.Traffic.from_json(sent.to_json())
  assert again == sent
  assert again.schedules == sent.schedules
  assert again.rows[0].overlap == sent.rows[0].overlap
  spans = sent.schedules[0].spans
  assert [s.kind for s in spans].count('matmul') == sent.rows[0].matmuls
  assert (spans[0].start, spans[-1].end) == (0, pytest.approx(1))
  sent.plot_schedule(tmp_path / 'schedule.png')
  assert (tmp_path / 'schedule.png').read_bytes().startswith(b'\x89PNG')


def test_batched_products_count_once(pod):
  """TPUs spell them as convolutions with holes."""
  step = jax.jit(lambda a, b: jnp.einsum('bmk,bkn->bmn', a, b))
  a = sharded(pod, (8, 128, 256), P())
  b = sharded(pod, (8, 256, 384), P())
  sent = jd.traffic(step, a, b)
  assert sent.rows == ()
  assert sent.work.flops == 2 * 8 * 128 * 256 * 384
  assert 'nothing is sent' in str(sent)


def test_step_over_another_mesh_moves_to_a_pod(make_mesh):
  """Arguments on CPUs are read for their axes only."""
  mesh = make_mesh(8)
  x = jax.device_put(jnp.ones((64, 128)), NamedSharding(mesh, P('data')))
  step = jax.jit(lambda x: jnp.sum(x, 0))
  sent = jd.traffic(step, x, topology='v5e:2x2', slices=2)
  assert sent.by_link().keys() == {SLICES, CHIPS}


def test_train_step_over_an_abstract_mesh():
  types = (AxisType.Auto, AxisType.Auto)
  mesh = AbstractMesh((2, 4), ('dcn', 'ici'), axis_types=types)
  tx = optax.chain(
    jd.error_feedback(jd.mean('dcn', jd.sign(), 'gather')), optax.sgd(0.1)
  )
  params = {'w': jax.ShapeDtypeStruct((256, 1024), jnp.float32)}
  state = jd.init(tx, params, mesh=mesh, axis='dcn')
  loss = lambda p, x: jnp.mean(jnp.square(x @ p['w']))
  step = jd.train_step(loss, tx, mesh=mesh, axis='dcn')
  batch = jax.ShapeDtypeStruct((16, 256), jnp.float32)
  sent = jd.traffic(step, state, batch, topology='v5e:2x2', slices=2)
  numbers = sum(
    row.bytes_sent - row.padding_sent
    for row in sent.rows
    if row.kind == 'all-gather' and row.link == SLICES
  )
  assert numbers == 256 * (1024 / 8 + 4)


@pytest.mark.parametrize(
  ('topology', 'axes', 'slices', 'message'),
  [
    ('v9:2x2', {'a': 4}, 1, 'These compile: v4: 2x2x1'),
    ('v5e', {'a': 4}, 1, "got 'v5e'"),
    ('v5e:3x5', {'a': 15}, 1, "got 'v5e:3x5'"),
    ('v5e:2x2', {'a': 3}, 1, 'must take all 4 devices of 1 x v5e:2x2'),
    ('v5e:2x2', {'a': 4}, 2, 'must take all 8 devices of 2 x v5e:2x2'),
    ('v5e:2x2', {'a': 4, 'b': 6}, 6, 'over the 6 slices first'),
    ('v5e:2x2', {'a': 4}, 0, 'slices must be at least 1, got 0'),
  ],
)
def test_topologies_that_cannot_be(topology, axes, slices, message):
  with pytest.raises(ValueError, match=message):
    jd.topology_mesh(topology, axes, slices=slices)


def test_arguments_that_do_not_fit_the_topology(pod, make_mesh):
  step = jax.jit(lambda x: jnp.sum(x, 0))
  x = sharded(pod, (64, 128))
  with pytest.raises(ValueError, match='mesh of the arguments must fit'):
    jd.traffic(step, x, topology='v5e:2x2', slices=4)
  with pytest.raises(ValueError, match='mesh of the arguments must fit'):
    jd.traffic(step, x, topology='v6e:2x2', slices=2)
  with pytest.raises(ValueError, match='axes must take all 16 devices'):
    x = sharded(make_mesh(8), (64, 128), P('data'))
    jd.traffic(step, x, topology='v5e:2x2', slices=4)
  with pytest.raises(ValueError, match='over which axes they lie'):
    jd.traffic(step, jnp.ones(8), topology='v5e:2x2', slices=2)
  with pytest.raises(ValueError, match='slices must come with the topology'):
    jd.traffic(step, jnp.ones(8), slices=2)
  bound = jax.shard_map(
    lambda x: lax.psum(x, 'data'),
    mesh=make_mesh(8),
    in_specs=P('data'),
    out_specs=P(),
  )
  with pytest.raises(ValueError, match='must not be bound to other devices'):
    jd.traffic(jax.jit(bound), x, topology='v5e:2x2', slices=2)
