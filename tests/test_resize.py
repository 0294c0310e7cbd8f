"""A change of the number of workers, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxdist as jd

COUNTS = range(1, 6)
PAIRS = [(old, new) for old in COUNTS for new in COUNTS]


def residuals(workers, seed=0, shape=(3, 2)):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(workers, *shape)), jnp.float32)


def to(workers, value, resize='mean'):
  """Resizes one per-worker array, of three axes in all cases here."""
  new = jax.ShapeDtypeStruct((workers, *value.shape[1:]), value.dtype)
  return jd.resize(jd.PerWorker(value, resize), jd.PerWorker(new, resize)).value


def mean(x):
  return np.mean(np.asarray(x, np.float64), axis=0)


@pytest.mark.parametrize(('old', 'new'), [*PAIRS, (8, 4), (4, 6), (8, 1)])
def test_mean_over_workers_is_kept(old, new):
  x = residuals(old)
  y = to(new, x)
  assert y.shape == (new, 3, 2)
  # One rounding to float32 of a mean of up to eight numbers near one.
  np.testing.assert_allclose(mean(y), mean(x), atol=2e-7)


def test_mean_is_kept_from_8_to_4_to_6():
  x = residuals(8)
  np.testing.assert_allclose(mean(to(6, to(4, x))), mean(x), atol=2e-7)


@given(
  hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 8), st.just(2)),
    elements=st.floats(-1e3, 1e3, width=32),
  ),
  st.integers(1, 8),
)
def test_mean_is_kept_for_any_values(x, new):
  y = to(new, x)
  assert y.dtype == np.float32
  # Eight float32 roundings of partial sums of at most 8 * largest, over 8; the
  # smallest numbers have no room for a part of them.
  atol = max(1e-6 * abs(x).max(), np.finfo(np.float32).smallest_normal)
  np.testing.assert_allclose(mean(y), mean(x), atol=atol)


def test_blocks_are_averaged_and_workers_are_copied():
  x = jnp.array([1.0, 3.0, 5.0, 7.0])
  np.testing.assert_array_equal(to(2, x), [2, 6])
  np.testing.assert_array_equal(to(8, x), [1, 1, 3, 3, 5, 5, 7, 7])
  np.testing.assert_array_equal(to(3, x), [4, 4, 4])


@pytest.mark.parametrize('workers', COUNTS)
def test_as_many_workers_change_no_bit(workers):
  x = residuals(workers).at[0, 0, 0].set(-0.0)
  assert np.asarray(to(workers, x)).tobytes() == np.asarray(x).tobytes()


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_mean_of_narrow_floats_is_accumulated_in_float32(dtype):
  # In the narrow dtype, 4096 + 1 is 4096.
  x = jnp.array([4096] + 63 * [1], dtype)
  y = to(1, x)
  assert y.dtype == dtype
  assert y[0] == jnp.array((4096 + 63) / 64, dtype)


def test_mean_of_the_largest_float16_is_itself():
  largest = jnp.full(2, jnp.finfo(jnp.float16).max)
  assert to(1, largest)[0] == largest[0]


def test_what_is_not_finite_stays_so_and_does_not_warn():
  y = to(1, jnp.array([[jnp.inf, jnp.nan, 3e38], [-jnp.inf, 1.0, 3e38]]))
  assert not jnp.isfinite(y).any()


def test_complex_numbers_keep_their_mean():
  np.testing.assert_array_equal(to(1, jnp.array([1 + 2j, 3 - 4j])), [2 - 1j])


@pytest.mark.parametrize('new', [2, 3, 8])
def test_counters_stay(new):
  np.testing.assert_array_equal(to(new, jnp.full(4, 7)), [7] * new)
  np.testing.assert_array_equal(to(new, jnp.full(4, True)), [True] * new)


@pytest.mark.parametrize(('old', 'new'), PAIRS)
def test_split_cuts_the_same_rows_anew(old, new):
  rows = np.arange(1.0, 21.0, dtype=np.float32).reshape(10, 2)

  def over(workers):
    padded = np.zeros((-(-10 // workers) * workers, 2), np.float32)
    padded[:10] = rows
    return jd.PerWorker(jnp.asarray(padded.reshape(workers, -1, 2)), 'split')

  there = jd.resize(over(old), over(new))
  np.testing.assert_array_equal(there.value, over(new).value)
  back = jd.resize(there, over(old))
  np.testing.assert_array_equal(back.value, over(old).value)


def test_split_refuses_to_drop_what_is_not_padding():
  state = {'m': jd.PerWorker(jnp.ones((4, 3)), 'split')}
  like = {'m': jd.PerWorker(jnp.ones((2, 5)), 'split')}
  with pytest.raises(
    ValueError, match=r"\['m'\].value has 12 rows over 4 work"
  ):
    jd.resize(state, like)


def test_split_optimizer_state_keeps_its_counter():
  def state(workers, rows, fill):
    adam = optax.adam(1.0).init(jnp.zeros(rows))
    stacked = jax.tree.map(
      lambda x: jnp.full((workers, *x.shape), fill, x.dtype), adam
    )
    return jd.PerWorker(stacked, 'split')

  new = jd.resize(state(4, 3, 2), state(3, 4, 0))
  assert new.value[0].count.tolist() == [2, 2, 2]
  np.testing.assert_array_equal(new.value[0].mu, jnp.full((3, 4), 2.0))


def test_none_is_refused_by_name():
  state = {'a': [jd.PerWorker({'seed': jnp.zeros((4, 2))}, None)]}
  like = {'a': [jd.PerWorker({'seed': jnp.zeros((2, 2))}, None)]}
  with pytest.raises(ValueError) as error:
    jd.resize(state, like)
  assert "['a'][0].value['seed'] is of 4 workers" in str(error.value)
  assert 'of 2 in `like`' in str(error.value)
  assert jd.resize(state, state)['a'][0].value['seed'].shape == (4, 2)


def test_no_two_workers_get_the_same_key():
  keys = jax.random.split(jax.random.key(1), (3, 2))
  data = jax.random.key_data(keys)
  more = jax.random.key_data(to(8, keys))
  assert len(np.unique(more.reshape(16, -1), axis=0)) == 16
  np.testing.assert_array_equal(more[:3], data)
  np.testing.assert_array_equal(jax.random.key_data(to(2, keys)), data[:2])


def test_other_leaves_pass_through():
  state = {'w': jnp.arange(3.0), 'n': 4, 'none': None, 'h': np.ones(2)}
  new = jd.resize(state, state)
  assert new['w'] is state['w']
  assert new['n'] == 4 and new['none'] is None
  assert isinstance(new['h'], np.ndarray)


@pytest.mark.parametrize(('old', 'new'), [(8, 4), (4, 6), (2, 8)])
def test_under_jit_it_is_the_same(old, new):
  state = {
    'e': jd.PerWorker(residuals(old)),
    'm': jd.PerWorker(residuals(old), 'split'),
    'k': jd.PerWorker(jax.random.split(jax.random.key(0), old)),
    'w': jnp.ones(3),
  }
  like = {
    'e': jd.PerWorker(jax.ShapeDtypeStruct((new, 3, 2), jnp.float32)),
    'm': jd.PerWorker(
      jax.ShapeDtypeStruct((new, 3 * old, 2), jnp.float32), 'split'
    ),
    'k': jd.PerWorker(jax.ShapeDtypeStruct((new,), jax.random.key(0).dtype)),
    'w': jax.ShapeDtypeStruct((3,), jnp.float32),
  }
  eager = jd.resize(state, like)
  jitted = jax.jit(lambda state: jd.resize(state, like))(state)
  for x, y in zip(jax.tree.leaves(eager), jax.tree.leaves(jitted), strict=True):
    assert x.dtype == y.dtype
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    # XLA and NumPy may add eight numbers in another order.
    np.testing.assert_allclose(x, y, atol=2e-7)


@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(('old', 'new'), [(8, 4), (4, 8), (8, 6)])
def test_result_has_the_shardings_that_are_asked_for(
  make_mesh, axis_type, old, new
):
  def shardings(workers):
    mesh = make_mesh(workers, axis_type=axis_type)
    return {
      'e': NamedSharding(mesh, PartitionSpec('data')),
      'k': NamedSharding(mesh, PartitionSpec('data')),
      'w': NamedSharding(mesh, PartitionSpec()),
    }

  def state(workers):
    place = shardings(workers)
    keys = jax.random.split(jax.random.key(0), workers)
    return {
      'e': jd.PerWorker(jax.device_put(residuals(workers), place['e'])),
      'k': jd.PerWorker(jax.device_put(keys, place['k'])),
      'w': jax.device_put(jnp.ones(3), place['w']),
    }

  resized = jd.resize(state(old), state(new))
  place = shardings(new)
  assert resized['e'].value.sharding == place['e']
  assert resized['k'].value.sharding.is_equivalent_to(place['k'], 1)
  assert resized['w'].sharding == place['w']
  np.testing.assert_array_equal(resized['e'].value, to(new, residuals(old)))


BAD = {
  'missing': ({'a': 1.0}, {'a': 1.0, 'b': 1.0}, r"\['b'\] is in `like` but"),
  'extra': ({'a': 1.0, 'b': 1.0}, {'a': 1.0}, r"\['b'\] is in `state` but not"),
  'dtype': (
    {'a': jnp.ones(2)},
    {'a': jnp.ones(2, int)},
    r"\['a'\] has dtype float32 in `state` and int32",
  ),
  'shape': (
    {'a': jnp.ones(2)},
    {'a': jnp.ones(3)},
    r"\['a'\] has shape \(2,\) in `state` and \(3,\) in `like`",
  ),
  'shape behind the workers': (
    {'a': jd.PerWorker(jnp.ones((4, 2)))},
    {'a': jd.PerWorker(jnp.ones((2, 3)))},
    r"\['a'\].value has shape \(4, 2\)",
  ),
  'rows without a change of workers': (
    {'a': jd.PerWorker(jnp.ones((4, 2)), 'split')},
    {'a': jd.PerWorker(jnp.ones((4, 3)), 'split')},
    r"\['a'\].value has shape \(4, 2\)",
  ),
  'axes': (
    {'a': jd.PerWorker(jnp.ones(4), 'split')},
    {'a': jd.PerWorker(jnp.ones((2, 3)), 'split')},
    r"\['a'\].value has shape \(4,\)",
  ),
  'worker view': (
    jd.PerWorker(jnp.ones(())),
    jd.PerWorker(jnp.ones(())),
    r'.value is per worker and has no worker axis',
  ),
  'not per worker': (jnp.ones(2), jd.PerWorker(jnp.ones(2)), '.value is in'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_refused_by_name(case):
  state, like, message = BAD[case]
  with pytest.raises(ValueError, match=message):
    jd.resize(state, like)
