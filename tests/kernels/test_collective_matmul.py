"""Collective products: rings against their definition, and their schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from needs import needs_tpu_compiler
from simulated import simulation

import jaxdist as jd
from jaxdist.kernels.collective_matmul import api, tpu

SPEC = PartitionSpec('i')
OPS = {
  'gather': (api.all_gather_matmul, (6, 10), (10, 4)),
  'scatter': (api.matmul_reduce_scatter, (None, 10), (10, 4)),
}


def arrays(name, workers, shapes=None, dtype=np.float32):
  """Whole numbers, whose products and sums are exact in float32."""
  rng = np.random.default_rng(workers)
  x, w = shapes or OPS[name][1:]
  x = (x[0] or 3 * workers, x[1])
  draw = lambda s: rng.integers(-4, 5, (workers, *s)).astype(dtype)
  return draw(x), draw(w)


def expected(name, x, w):
  workers = len(x)
  if name == 'gather':
    rows = np.concatenate(x)
    return np.stack([rows @ w[i] for i in range(workers)])
  total = sum(x[i] @ w[i] for i in range(workers))
  return total.reshape(workers, -1, total.shape[1])


def mapped(function, workers, check_vma=True):
  """A function of each worker's arrays, over a mesh."""
  mesh = jax.make_mesh(
    (workers,), ('i',), axis_types=(AxisType.Auto,),
    devices=jax.devices()[:workers],
  )  # fmt: skip
  each = lambda *a: jax.tree.map(
    lambda y: y[None], function(*(x[0] for x in a))
  )
  return jax.jit(
    jax.shard_map(
      each, mesh=mesh, in_specs=SPEC, out_specs=SPEC, check_vma=check_vma
    )
  )


def transposed(name, x, w, dy):
  """What a gradient of the product makes of those of the factors."""
  if name == 'gather':
    dx = sum(dy[i] @ w[i].T for i in range(len(x)))
    rows = np.concatenate(x)
    return dx.reshape(x.shape), np.stack([rows.T @ d for d in dy])
  rows = np.concatenate(dy)
  return np.stack([rows @ o.T for o in w]), np.stack([o.T @ rows for o in x])


@pytest.mark.parametrize('workers', [1, 2, 3, 8])
@pytest.mark.parametrize('name', OPS)
def test_ring_is_the_definition(name, workers):
  op, (x, w) = OPS[name][0], arrays(name, workers)
  want = expected(name, x, w)
  dy = np.arange(want.size, dtype=np.float32).reshape(want.shape) % 7

  def step(x, w, dy):
    y, pull = jax.vjp(lambda x, w: op(x, w, 'i'), x, w)
    return y, op(x, w, 'i', implementation='plain'), *pull(dy)

  y, plain, dx, dw = mapped(step, workers)(x, w, dy)
  np.testing.assert_array_equal(y, want)
  np.testing.assert_array_equal(plain, want)
  for got, should in zip((dx, dw), transposed(name, x, w, dy), strict=True):
    np.testing.assert_array_equal(got, should)


@pytest.mark.parametrize('name', OPS)
def test_gradients_where_only_one_varies_along_another_axis(name):
  """Data parallel along d, products along m: w is the same along d."""
  mesh = jax.make_mesh(
    (2, 2), ('d', 'm'), axis_types=2 * (AxisType.Auto,),
    devices=jax.devices()[:4],
  )  # fmt: skip
  op, _, _ = OPS[name]
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(16, 6)), rng.normal(size=(6, 8))
  x, w = x.astype(np.float32), w.astype(np.float32)
  gather = name == 'gather'
  x_spec = PartitionSpec(('d', 'm') if gather else 'd', None if gather else 'm')
  w_spec = PartitionSpec(None if gather else 'm', 'm' if gather else None)
  run = jax.shard_map(
    lambda x, w: jax.lax.psum(jnp.sum(op(x, w, 'm') ** 2), ('d', 'm')),
    mesh=mesh,
    in_specs=(x_spec, w_spec),
    out_specs=PartitionSpec(),
  )
  got = jax.jit(jax.grad(run, (0, 1)))(x, w)
  want = jax.grad(lambda x, w: jnp.sum((x @ w) ** 2), (0, 1))(x, w)
  for a, b in zip(got, want, strict=True):
    # Sums of a few numbers in another order.
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def test_bytes_are_those_of_the_plain_form():
  x, w = arrays('scatter', 8, ((64, 16), (16, 32)))
  for op in (api.all_gather_matmul, api.matmul_reduce_scatter):
    sent = {
      form: jd.traffic(
        mapped(lambda x, w, f=form, o=op: o(x, w, 'i', implementation=f), 8),
        x, w,
      )
      for form in ('xla', 'plain')
    }  # fmt: skip
    assert sent['xla'].bytes_a_step == sent['plain'].bytes_a_step > 0
    assert sent['xla'].by_kind().keys() == {'collective-permute'}
    assert len(sent['xla'].rows) == 7


@pytest.mark.parametrize('workers', [2, 3, 4])
@pytest.mark.parametrize('name', OPS)
def test_tpu_form_is_the_definition(name, workers):
  rows = 16 * (workers if name == 'scatter' else 1)
  x, w = arrays(name, workers, ((rows, 128), (128, 384)))
  op = getattr(tpu, OPS[name][0].__name__)

  def twice(x, w):  # A semaphore that is left over would show.
    y = op(x, w, axis='i')
    return y, op(x + 0 * y[0, 0], w, axis='i')

  with simulation():
    for y in mapped(twice, workers, check_vma=False)(x, w):
      np.testing.assert_array_equal(y, expected(name, x, w))


def test_a_kernel_that_never_ran_is_not_chosen():
  text = jax.export.export(
    mapped(lambda x, w: api.all_gather_matmul(x, w, 'i'), 2), platforms=['tpu']
  )(*arrays('gather', 2, ((16, 128), (128, 128)))).mlir_module()
  assert 'tpu_custom_call' not in text


@needs_tpu_compiler
@pytest.mark.parametrize(
  'op', [api.all_gather_matmul, api.matmul_reduce_scatter]
)
def test_transfers_are_open_while_products_run(op):
  mesh = jd.topology_mesh('v5e:2x2', {'i': 4})
  shapes = [(4 * 4096, 2048), (4 * 2048, 2048)]
  place = jax.sharding.NamedSharding(mesh, SPEC)
  arrays = [jax.ShapeDtypeStruct(s, 'bfloat16', sharding=place) for s in shapes]

  def traffic(form):
    step = jax.shard_map(
      lambda x, w: op(x, w, 'i', implementation=form),
      mesh=mesh, in_specs=SPEC, out_specs=SPEC,
    )  # fmt: skip
    return jd.traffic(jax.jit(step), *arrays)

  ring = traffic('xla')
  assert len(ring.rows) == 3
  assert all(row.matmuls_inside for row in ring.rows)
  if op is api.all_gather_matmul:  # What it is when they don't overlap.
    assert not any(row.matmuls_inside for row in traffic('plain').rows)


@needs_tpu_compiler
@pytest.mark.parametrize(
  'op', [tpu.all_gather_matmul, tpu.matmul_reduce_scatter]
)
def test_kernels_compile(op):
  mesh = jd.topology_mesh('v5e:2x2', {'i': 4})
  place = jax.sharding.NamedSharding(mesh, SPEC)
  array = jax.ShapeDtypeStruct((4 * 512, 512), 'bfloat16', sharding=place)
  step = jax.shard_map(
    lambda x, w: op(x, w, axis='i'),
    mesh=mesh, in_specs=SPEC, out_specs=SPEC, check_vma=False,
  )  # fmt: skip
  assert (
    'tpu_custom_call' in jax.jit(step).lower(array, array).compile().as_text()
  )


def test_bad_arguments():
  x, w = jnp.zeros((3, 5, 4)), jnp.zeros((3, 4, 2))
  run = jax.vmap(
    lambda x, w: api.matmul_reduce_scatter(x, w, 'i'), axis_name='i'
  )
  with pytest.raises(ValueError, match=r'a multiple of 3 rows.*shape \(5, 4\)'):
    run(x, w)
  with pytest.raises(
    ValueError, match='one floating dtype, got float32 and bf'
  ):
    run(x, w.astype('bfloat16'))
