"""Replicas that differ are found, down to one bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxdist as jd


def assemble(mesh, spec, shape, copies):
  """A global array from what each device of the mesh holds."""
  arrays = [
    jax.device_put(copy, device)
    for copy, device in zip(copies, mesh.devices.flat, strict=True)
  ]
  sharding = NamedSharding(mesh, PartitionSpec(*spec))
  return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def flip_bit(x, bit):
  """Flips one bit of the last element."""
  data = np.array(x).view(np.uint8).reshape(-1)
  start = data.size - x.dtype.itemsize
  data[start + bit // 8] ^= np.uint8(1 << bit % 8)
  return data.view(x.dtype).reshape(x.shape)


def test_equal_replicas_pass(make_mesh):
  mesh = make_mesh()
  replicated = NamedSharding(mesh, PartitionSpec())
  state = {
    'w': jnp.arange(6.0),
    'nan': jnp.array([jnp.nan, -0.0]),
    'key': jax.random.key(1),
    'empty': jnp.zeros((0, 3)),
    'scalar': jnp.array(3, jnp.int8),
  }
  jd.assert_in_sync(jax.device_put(state, replicated))


def test_what_has_no_replicas_passes():
  tree = {'host': np.ones(3), 'number': 3, 'none': None, 'one': jnp.ones(3)}
  jd.assert_in_sync(tree)


@pytest.mark.parametrize(
  'dtype', ['float32', 'bfloat16', 'float16', 'int32', 'uint8', 'complex64']
)
def test_every_flipped_bit_is_found(make_mesh, dtype):
  mesh = make_mesh(3)
  x = np.arange(1, 7).reshape(2, 3).astype(jnp.dtype(dtype))
  for bit in range(8 * x.dtype.itemsize):
    copies = [x, flip_bit(x, bit), x]
    state = {'layer': [assemble(mesh, (), x.shape, copies)]}
    with pytest.raises(jd.OutOfSyncError) as error:
      jd.assert_in_sync(state)
    message = str(error.value)
    assert message.startswith("['layer'][0] is out of sync")
    assert f'on {mesh.devices[1]} it differs from {mesh.devices[0]}' in message
    assert '1 of 6 elements' in message


def test_flipped_bool_is_found(make_mesh):
  copies = [np.array([True]), np.array([False])]
  with pytest.raises(AssertionError, match='by at most 1'):
    jd.assert_in_sync(assemble(make_mesh(2), (), (1,), copies))


@pytest.mark.parametrize(
  ('copy', 'largest'),
  [
    ([1.5, 2.0, 7.0], '5'),
    ([np.nan, 2.0, 2.0], 'nan'),
    ([1.0, 2.0, np.inf], 'inf'),
    ([np.nan, 2.0, 3.0], '1'),
  ],
)
def test_the_largest_difference_is_told(make_mesh, copy, largest):
  x = np.array([1.0, 2.0, 2.0], np.float32)
  copies = [x, x, np.array(copy, np.float32), x]
  with pytest.raises(jd.OutOfSyncError, match=f'by at most {largest}.$'):
    jd.assert_in_sync(assemble(make_mesh(4), (), (3,), copies))


def test_nans_and_zeros_are_compared_by_their_bits(make_mesh):
  mesh = make_mesh(2)
  nan = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
  with pytest.raises(jd.OutOfSyncError, match='1 of 1 elements'):
    jd.assert_in_sync(assemble(mesh, (), (1,), [nan[:1], nan[1:]]))
  zeros = np.array([[0.0], [-0.0]], np.float32)
  with pytest.raises(jd.OutOfSyncError, match='by at most 0'):
    jd.assert_in_sync(assemble(mesh, (), (1,), zeros))


def test_all_in_the_minority_and_further_leaves_are_told(make_mesh):
  mesh = make_mesh(5)
  x = assemble(mesh, (), (1,), np.array([[1.0], [0.0], [0.0], [2.0], [0.0]]))
  with pytest.raises(jd.OutOfSyncError) as error:
    jd.assert_in_sync({'a': jnp.ones(1), 'b': x, 'c': x, 'd': x})
  devices = mesh.devices
  odd = f'{devices[0]}, {devices[3]}'
  message = str(error.value)
  assert message.startswith(f"['b'] is out of sync: on {odd} it differs from ")
  assert message.endswith('Other leaves out of sync: 2.')


def test_keys_are_compared(make_mesh):
  mesh = make_mesh(2)
  keys = [jax.random.key(0), jax.random.key(1)]
  with pytest.raises(jd.OutOfSyncError, match='the array is out'):
    jd.assert_in_sync(assemble(mesh, (), (), keys))


def test_workers_may_differ(make_mesh):
  own = assemble(make_mesh(4), ('data',), (4, 2), np.eye(4)[:, None, :2])
  jd.assert_in_sync({'residual': jd.PerWorker(own)})


def test_copies_along_another_axis_are_compared():
  mesh = jax.make_mesh(
    (2, 2),
    ('data', 'model'),
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
    devices=jax.devices()[:4],
  )
  parts = np.array([[[0.0]], [[0.0]], [[1.0]], [[1.0]]], np.float32)
  jd.assert_in_sync(jd.PerWorker(assemble(mesh, ('data',), (2, 1), parts)))
  parts[3] = 3.0
  with pytest.raises(jd.OutOfSyncError) as error:
    jd.assert_in_sync(jd.PerWorker(assemble(mesh, ('data',), (2, 1), parts)))
  devices = mesh.devices
  assert f'on {devices[1, 1]} it differs from {devices[1, 0]}' in str(
    error.value
  )
  assert str(error.value).startswith('.value is out of sync')


def test_inside_jit_it_is_refused():
  with pytest.raises(ValueError, match=r"outside jit; \['w'\] is traced"):
    jax.jit(jd.assert_in_sync)({'w': jnp.ones(2)})
