"""Programs of GPU clusters, compiled on a CPU: bytes, links, axes.

The meshes are of two hosts with two GPUs each. W is the number of devices in a
group; float32 has 4 bytes.
"""

import jax
import jax.numpy as jnp
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
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from needs import needs_gpu_compiler

import jaxdist as jd
from jaxdist.accounting import gpus
from jaxdist.kernels import bench

HOSTS, INSIDE = 'between hosts', 'inside a host'
KILO = 1024


@pytest.fixture(scope='session')
def cluster():
  return jd.topology_mesh('h100:2', {public.AXIS: 2, 'gpus': 2}, slices=2)


@needs_gpu_compiler
@pytest.mark.parametrize(
  ('axis', 'link'), [(public.AXIS, HOSTS), ('gpus', INSIDE)]
)
def test_one_of_each_collective(axis, link, cluster):
  sent = worker_traffic(one_of_each(axis, 2), cluster, *SHAPES)
  kilobytes = 4 * KILO
  # W = 2. All-reduce 2B/2, all-gather B, all-to-all and reduce-scatter B/2,
  # permute B.
  assert table(sent) == [
    (link, axis, 'all-gather', 16 * kilobytes),
    (link, axis, 'all-reduce', 8 * kilobytes),
    (link, axis, 'all-to-all', 12 * kilobytes),
    (link, axis, 'collective-permute', 40 * kilobytes),
    (link, axis, 'reduce-scatter', 16 * kilobytes),
  ]
  assert not sent.padding_a_step


@needs_gpu_compiler
def test_scan_branch_and_matrix_product(cluster):
  twice = loop_and_branch('gpus', public.AXIS)
  step = lambda x, number: twice(x @ x.T @ x, number)
  sent = worker_traffic(step, cluster, (64, 128), others=[jnp.int32(0)])
  num_bytes = 4 * 64 * 128
  gather, reduce = sorted(sent.rows, key=lambda row: row.kind)
  assert (gather.times, gather.bytes_sent, gather.within) == (
    7,
    num_bytes,
    'loop',
  )
  assert (reduce.times, reduce.bytes_sent, reduce.within) == (
    0.2,
    num_bytes,
    'branch',
  )
  assert sent.by_link() == {HOSTS: num_bytes * 0.2, INSIDE: num_bytes * 7}
  assert sent.work.flops == 2 * 2 * 64 * 128 * 64
  assert sent.memory.arguments == num_bytes + 4


@needs_gpu_compiler
def test_a_group_over_hosts_counts_as_between_them(cluster):
  both = (public.AXIS, 'gpus')
  sent = worker_traffic(lambda x: lax.psum(jnp.sin(x), both), cluster, (8, 128))
  (row,) = sent.rows
  assert (row.link, row.axis) == (HOSTS, ','.join(both))
  assert row.bytes_sent == 2 * 4 * 8 * 128 * 3 / 4


@needs_gpu_compiler
def test_what_gpus_widen_is_said(cluster):
  psum = lambda x: lax.psum(x + x, public.AXIS)
  sent = worker_traffic(psum, cluster, (8, 128), dtype=jnp.int16)
  assert sent.bytes_a_step == 4 * 8 * 128
  assert any('int16' in note and 'int32' in note for note in sent.notes)


@needs_gpu_compiler
@pytest.mark.parametrize('name', public.COMMUNICATORS)
def test_claimed_bytes_are_compiled_bytes(name, cluster):
  communicator, params = public.COMMUNICATORS[name], public.params()
  sent = exchange_traffic(communicator, params, cluster)
  claimed = communicator.bytes_sent(params, 2)
  assert sent.bytes_a_step == pytest.approx(claimed, rel=1e-9)
  assert sent.by_link().keys() == {HOSTS}
  assert sent.by_axis().keys() == {public.AXIS}


@needs_gpu_compiler
@pytest.mark.parametrize('gpu', gpus.GPUS)
def test_each_gpu_by_the_topology_alone(gpu):
  step = jax.jit(
    jax.shard_map(
      lambda x: lax.psum(x @ x, 'i'), mesh=None, in_specs=P('i'), out_specs=P()
    )
  )
  mesh = AbstractMesh((8,), ('i',), axis_types=(AxisType.Auto,))
  x = sharded(mesh, (8 * 256, 256), P('i'))
  with jax.sharding.use_abstract_mesh(mesh):
    sent = jd.traffic(step, x, topology=f'{gpu}:8')
  assert sent.by_link() == {INSIDE: 2 * 4 * 256 * 256 * 7 / 8}
  assert sent.work.flops == 2 * 256**3
  kind = gpus.GPUS[gpu].kind
  assert jd.LINKS[kind].keys() == {HOSTS, INSIDE}
  seconds = jd.step_time(sent, jd.LINKS[kind]).transfer[INSIDE]
  assert 0 < seconds < 1e-4


@needs_gpu_compiler
def test_bytes_that_forms_in_xla_move():
  # One pass over the words of eight workers; for the largest of a row, two.
  (mean,) = bench.gpu_table('h100', 1024, '^mean of 8 int8$')
  assert 0.95 < mean['share'] <= 1
  (coded,) = bench.gpu_table('h100', 1024, '^quantize int8$')
  numbers = 4 * 2**24
  assert 2 * numbers < coded['moved'] < 2.3 * numbers
  # What is scattered is written where the zeros are.
  (placed,) = bench.gpu_table('h100', 1024, '^mean of 1 top-10$')
  assert numbers < placed['moved'] < 1.1 * numbers


@needs_gpu_compiler
def test_a_mesh_that_does_not_fit(cluster):
  x = sharded(cluster, (8, 8), P(public.AXIS))
  step = jax.jit(lambda x: x + 1)
  with pytest.raises(ValueError, match=r'must fit .* got 4 devices of NVIDIA'):
    jd.traffic(step, x, topology='h100:4', slices=2)
  with pytest.raises(ValueError, match='go over the 4 slices first'):
    jd.topology_mesh('h100:3', {'a': 3, 'b': 4}, slices=4)


@pytest.mark.parametrize('topology', ['h100', 'h100:', 'h100:0', 'h100:2x4'])
def test_how_many_gpus_must_be_said(topology):
  with pytest.raises(ValueError, match=f"such as 'h100:8', got '{topology}'"):
    jd.topology_mesh(topology, {'data': 8})


def test_without_the_compiler(monkeypatch, tmp_path):
  monkeypatch.setenv(gpus.FOLDER, str(tmp_path))
  with pytest.raises(ImportError, match=r'pip install .* jax-cuda13-pjrt=='):
    gpus.compiler('h100:8')
  folder = tmp_path / 'jax_cuda13_pjrt-0.9.0.dist-info'
  folder.mkdir()
  (folder / 'METADATA').write_text('Name: jax-cuda13-pjrt\nVersion: 0.9.0\n')
  with pytest.raises(ImportError, match=r'same version as jaxlib, .* got 0\.9'):
    gpus.compiler('h100:8')
