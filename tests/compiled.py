"""Programs to compile for a mesh, which need not exist, and to read."""

import jax
import jax.numpy as jnp
import public
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxdist as jd

# Of a worker, for one_of_each: kilonumbers as its place.
SHAPES = [(8 * kilo, 128) for kilo in (8, 16, 24, 32, 40)]


def sharded(mesh, shape, spec=None, dtype=jnp.float32):
  """An array's shape and place: cut over all axes, if nothing else is said."""
  spec = P(mesh.axis_names) if spec is None else spec
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def worker_traffic(function, mesh, *shapes, dtype=jnp.float32, others=()):
  """Traffic of a function of each device's arrays."""
  spec = P(mesh.axis_names)
  step = jax.shard_map(
    function,
    mesh=mesh,
    in_specs=(*(spec for _ in shapes), *(P() for _ in others)),
    out_specs=spec,
    check_vma=False,
  )
  arrays = [
    sharded(mesh, (mesh.size * s[0], *s[1:]), spec, dtype) for s in shapes
  ]
  return jd.traffic(jax.jit(step), *arrays, *others)


def psum(x, axis='data'):
  return lax.psum(jnp.sin(x), axis)


def every(k, then, x, step):
  """What transforms do: a branch says how often it is taken."""

  def branch(x):
    with jax.named_scope(f'jaxdist.every.{k}'):
      return then(x)

  return lax.cond(step % k == 0, branch, lambda x: x, x)


def traffic_of_floats(function, mesh, *others, spec=None, **kwargs):
  """Traffic of a worker's function of 24 floats."""
  spec = P('data') if spec is None else spec
  step = jax.jit(
    jax.shard_map(
      function,
      mesh=mesh,
      in_specs=(spec, *(P() for _ in others)),
      out_specs=spec,
      check_vma=False,
    ),
    **kwargs,
  )
  return jd.traffic(step, sharded(mesh, (mesh.size * 24,), spec), *others)


def one_of_each(axis, size):
  """One of each collective."""

  def step(a, b, c, d, e):
    ring = [(i, (i + 1) % size) for i in range(size)]
    return (
      lax.psum(jnp.sin(a), axis),
      lax.all_gather(jnp.sin(b), axis, axis=1).sum(1),
      lax.all_to_all(jnp.sin(c), axis, 0, 0, tiled=True),
      jnp.tile(lax.psum_scatter(jnp.sin(d), axis, tiled=True), (size, 1)),
      lax.ppermute(jnp.sin(e), axis, ring),
    )

  return step


def loop_and_branch(along, between):
  """Seven gathers along an axis; in one of five steps a sum along another."""

  def step(x, number):
    def body(carry, _):
      return carry + lax.all_gather(jnp.sin(carry), along).sum(0), None

    x = lax.scan(body, x, None, length=7)[0]
    return every(5, lambda x: psum(x, between), x, number)

  return step


def table(traffic):
  """Link, axis, kind and bytes of each row, in order of the kinds."""
  return sorted((r.link, r.axis, r.kind, r.bytes_sent) for r in traffic.rows)


def exchange_traffic(communicator, params, mesh):
  """Traffic of one exchange along an axis of a mesh."""
  spec = P(public.AXIS)

  def exchange(tree):
    tree = jax.tree.map(lambda x: x[0], tree)
    state = communicator.init(tree, feedback=True)
    # The compiler must not know what is in the state.
    tree, state = lax.optimization_barrier((tree, state))
    result, sent, state = communicator.exchange(tree, state)
    return jax.tree.map(lambda x: x[None], (result, sent))

  step = jax.shard_map(
    exchange, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={public.AXIS}
  )
  workers = mesh.shape[public.AXIS]
  tree = jax.tree.map(
    lambda x: sharded(mesh, (workers, *x.shape), spec, x.dtype), params
  )
  return jd.traffic(jax.jit(step), tree)
