"""One worker's code gives the same numbers wherever it runs."""

import re

import jax
import numpy as np
import optax
import public
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxdist as jd
from jaxdist.state import map_per_worker

WORKERS, STEPS = 4, 3

# Sums in another order; orthogonalisation and Adam's division by a small root
# blow the last bit of a number near zero up to some of these.
CLOSE = {'rtol': 2e-5, 'atol': 1e-5}


def run_worker(tx, params, gradients):
  """All steps of one worker, in a scan; its parameters after each."""

  def step(carry, grad):
    params, state = carry
    updates, state = tx.update(grad, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), params

  return jax.lax.scan(step, (params, tx.init(params)), gradients)[1]


def under_vmap(tx, gradients):
  run = lambda g: run_worker(tx, public.params(), g)
  return jax.jit(jax.vmap(run, 1, axis_name=public.AXIS))(gradients)


def under_pmap(tx, gradients):
  run = lambda g: run_worker(tx, public.params(), g)
  return jax.pmap(run, public.AXIS, in_axes=1, devices=jax.devices()[:WORKERS])(
    gradients
  )


def under_shard_map(tx, gradients, mesh):
  """With a user's own shard_map: their gradients, our transform.

  Returns:
    The traced function and its arguments.
  """
  spec = PartitionSpec(None, public.AXIS)

  def run(params, gradients):
    params = jax.tree.map(
      lambda x: jax.lax.pcast(x, public.AXIS, to='varying'), params
    )
    gradients = jax.tree.map(lambda g: g[:, 0], gradients)
    path = run_worker(tx, params, gradients)
    return jax.tree.map(lambda x: x[None], path)

  mapped = jax.shard_map(
    run,
    mesh=mesh,
    in_specs=(PartitionSpec(), spec),
    out_specs=PartitionSpec(public.AXIS),
  )
  place = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
  args = (place(public.params(), PartitionSpec()), place(gradients, spec))
  return jax.jit(mapped).trace(*args), args


def workers_program(lowered):
  """The manual region and the functions it calls, their values numbered."""
  main, *functions = lowered.as_text().split('func.func')[1:]
  region = main.split('sdy.manual_computation', 1)[1].split('sdy.return')[0]

  def numbered(text):
    numbers = {}
    number = lambda name: f'%{numbers.setdefault(name[0], len(numbers))}'
    return re.sub(r'%\w+', number, text)

  return [numbered(text) for text in (region, *functions)]


@pytest.mark.parametrize('name', public.TRANSFORMS)
def test_same_numbers_everywhere(name, make_mesh):
  """The form of pmap is that of shard_map with check_vma=False, too."""
  tx = public.TRANSFORMS[name]
  gradients = public.gradients(WORKERS, STEPS)
  traced, args = under_shard_map(tx, gradients, make_mesh(WORKERS))
  lowered = traced.lower()
  expected = under_vmap(tx, gradients)
  others = {
    'pmap': under_pmap(tx, gradients),
    'shard_map': lowered.compile()(*args),
  }
  for context, path in others.items():
    for want, got in zip(
      jax.tree.leaves(expected), jax.tree.leaves(path), strict=True
    ):
      np.testing.assert_allclose(got, want, **CLOSE, err_msg=context)

  explicit = make_mesh(WORKERS, axis_type=AxisType.Explicit)
  other, _ = under_shard_map(tx, gradients, explicit)
  assert workers_program(other.lower()) == workers_program(lowered)


def check_foretold(tx, state, mesh):
  """An abstract init and specs say what a state is, and where."""
  shapes = jax.eval_shape(public.params)
  abstract = jd.init(tx, shapes, axis=public.AXIS, mesh=mesh)
  assert jax.tree.structure(abstract) == jax.tree.structure(state)
  specs = jd.specs(state, public.AXIS)
  is_leading = map_per_worker(lambda _: True, lambda _: False, state)
  for got, foretold, spec, leading in zip(
    *map(jax.tree.leaves, (state, abstract, specs, is_leading)), strict=True
  ):
    assert (foretold.shape, foretold.dtype) == (got.shape, got.dtype)
    if got.size:  # JAX places empty arrays as it likes.
      assert foretold.sharding.is_equivalent_to(got.sharding, got.ndim)
    assert spec == (PartitionSpec(public.AXIS) if leading else PartitionSpec())
    if leading:
      assert got.shape[0] == WORKERS


@pytest.mark.parametrize('name', public.TRANSFORMS)
def test_train_step_on_mesh_is_train_step_simulated(name, make_mesh):
  tx = public.TRANSFORMS[name]
  # No number of these comes so near to the middle of two levels of a code that
  # its last bit decides.
  rng = np.random.default_rng(3)
  batch = rng.normal(size=(2 * WORKERS, 24)).astype(np.float32)

  def loss(params, x):
    hidden = x @ params['w'] + params['b']
    others = sum((p**2).sum() for n, p in params.items() if n in 'vs')
    return (hidden**2).mean() + others

  ends = []
  for where in ({'mesh': make_mesh(WORKERS)}, {'workers': WORKERS}):
    state = jd.init(tx, public.params(), axis=public.AXIS, **where)
    if 'mesh' in where:
      check_foretold(tx, state, where['mesh'])
    step = jd.train_step(loss, tx, axis=public.AXIS, **where)
    before = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state)
    for _ in range(STEPS):
      state, metrics = step(state, batch)
    after = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state)
    if 'mesh' in where:
      assert jax.tree.all(jax.tree.map(lambda a, b: a == b, before, after)), (
        'state changes its type'
      )
    assert step._cache_size() == 1, 'the step compiles twice'
    assert metrics['loss'].shape == (WORKERS,)
    ends.append(state)
  for want, got in zip(*map(jax.tree.leaves, ends), strict=True):
    np.testing.assert_allclose(got, want, **CLOSE)
