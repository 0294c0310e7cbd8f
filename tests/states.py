"""Where states of the tests of checkpoints lie, and whether two agree."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

import jaxdist as jd


def place(state, mesh):
  """Puts the JAX arrays of a state on a mesh, others where they are."""
  return jax.tree.map(
    lambda x, spec: (
      jax.device_put(x, NamedSharding(mesh, spec))
      if isinstance(x, jax.Array)
      else x
    ),
    state,
    jd.specs(state, 'data'),
  )


def abstract(state):
  return jax.tree.map(
    lambda x: (
      jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
      if isinstance(x, jax.Array)
      else x
    ),
    state,
  )


def bits(x):
  is_key = isinstance(x, jax.Array) and jnp.issubdtype(
    x.dtype, jax.dtypes.prng_key
  )
  return np.asarray(jax.random.key_data(x) if is_key else x).tobytes()


def assert_same(x, y):
  """The same structure, and every leaf the same in all that can be seen."""
  assert jax.tree.structure(x) == jax.tree.structure(y)
  for (path, one), other in zip(
    jax.tree.leaves_with_path(x), jax.tree.leaves(y), strict=True
  ):
    name = jax.tree_util.keystr(path)
    assert bits(one) == bits(other), name
    assert type(one) is type(other), name
    if isinstance(one, np.ndarray | jax.Array):
      assert one.dtype == other.dtype and one.shape == other.shape, name
    if isinstance(one, jax.Array):
      assert one.sharding.is_equivalent_to(other.sharding, one.ndim), name
      assert one.committed == other.committed, name
