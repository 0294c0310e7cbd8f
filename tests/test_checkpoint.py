"""Checkpoints come back bit for bit, or not at all."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp
from states import abstract, assert_same, place

import jaxdist as jd
from jaxdist.digest import digest
from jaxdist.state import Drifts

SMALL = range(1, 6)


def make_state(seed=0, workers=8):
  """One of everything that a state may hold."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params = {'a/b': normal(3, 4), 'a.b': [normal(5), normal()], 'é %': normal(2)}
  return {
    'params': params,
    'opt': optax.adamw(optax.constant_schedule(1.0)).init(params),
    'residual': jd.PerWorker({'w': normal(workers, 3, 4)}),
    'rows': jd.PerWorker(normal(workers, 2), 'split'),
    'own': jd.PerWorker(normal(workers), None),
    'empty': [jnp.zeros((0, 3)), jd.PerWorker(jnp.zeros((workers, 0)))],
    'no keys': jax.random.split(jax.random.key(0), 0),
    'none': None,
    'mark': Drifts(),
    'bf16': normal(3).astype(jnp.bfloat16),
    'bits': jnp.array([0.0, -0.0, jnp.inf, -jnp.nan, 1e-45]),
    'zero': -jnp.zeros(4),
    'int4': jnp.array([-8, 7], jnp.int4),
    'float8': jnp.array([0.5, -2.0], jnp.float8_e4m3fn),
    'bool': jnp.array([True, False]),
    'uint8': jnp.arange(5, dtype=jnp.uint8),
    'complex': jnp.array([1 + 2j]),
    'key': jax.random.key(seed),
    'keys': jd.PerWorker(jax.random.split(jax.random.key(seed), workers)),
    'rbg': jax.random.key(seed, impl='rbg'),
    'numpy': np.arange(3) + seed,
    'step': 3 + seed,
    'rate': 0.1 + seed,
  }


@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit])
def test_round_trip_over_a_mesh(tmp_path, make_mesh, axis_type):
  mesh = make_mesh(axis_type=axis_type)
  state = place(make_state(), mesh)
  jd.save(tmp_path, 5, state)
  assert_same(jd.restore(tmp_path, abstract(state)), state)
  # A concrete state works as well, and its values do not matter.
  assert_same(jd.restore(tmp_path, place(make_state(1), mesh)), state)


def test_round_trip_on_one_device(tmp_path):
  state = make_state()
  jd.save(str(tmp_path), np.int64(5), state)
  assert_same(jd.restore(str(tmp_path), make_state(1)), state)
  shapes = jax.eval_shape(lambda: {'bf16': state['bf16']})
  with pytest.raises(ValueError, match='not in `like`'):
    jd.restore(tmp_path, shapes)


def test_a_state_is_read_onto_another_mesh(tmp_path, make_mesh):
  state = {
    'w': jnp.arange(8.0),
    'e': jd.PerWorker(jnp.arange(16.0).reshape(8, 2)),
  }
  jd.save(tmp_path, 1, place(state, make_mesh(8)))
  like = place(state, make_mesh(4))
  assert_same(jd.restore(tmp_path, like), like)
  turned = NamedSharding(make_mesh(2), PartitionSpec('data'))
  like['w'] = jax.device_put(like['w'], turned)
  assert_same(jd.restore(tmp_path, like), like)


def test_donated_state_tells_what_to_restore(tmp_path, make_mesh):
  state = place({'w': jnp.ones(8)}, make_mesh())
  jd.save(tmp_path, 1, state)
  jax.jit(lambda state: jax.tree.map(jnp.negative, state), donate_argnums=0)(
    state
  )
  with pytest.raises(ValueError, match=r"\['w'\] was deleted: save the state"):
    jd.save(tmp_path, 2, state)
  restored = jd.restore(tmp_path, state)
  assert_same(restored, place({'w': jnp.ones(8)}, make_mesh()))


@pytest.mark.parametrize(
  'state',
  [
    jnp.arange(3.0),
    (),
    {'none': None, 'mark': Drifts()},
    [jnp.zeros((0, 2), jnp.bfloat16), np.zeros(0), jd.PerWorker(())],
  ],
)
def test_small_states(tmp_path, state):
  jd.save(tmp_path, 0, state)
  assert jd.latest_step(tmp_path) == 0
  assert_same(jd.restore(tmp_path, state), state)


def test_training_goes_on_as_if_it_had_not_stopped(tmp_path, make_mesh):
  mesh = make_mesh()
  tx = optax.adamw(1e-2)
  params = {'w': jnp.arange(6.0).reshape(2, 3), 'b': jnp.ones(3)}
  state = {
    'params': params,
    'opt': tx.init(params),
    'residual': jd.PerWorker(
      jax.tree.map(lambda x: jnp.zeros((8, *x.shape)), params)
    ),
  }
  state = place(state, mesh)

  @jax.jit
  def step(state):
    residual = jax.tree.map(
      lambda e, p: (
        0.9 * e + jnp.sin(p * jnp.arange(8.0).reshape(8, 1, 1)[:, 0])
        if p.ndim == 1
        else 0.9 * e + jnp.sin(p * jnp.arange(8.0).reshape(8, 1, 1))
      ),
      state['residual'].value,
      state['params'],
    )
    grads = jax.tree.map(lambda e: e.mean(axis=0), residual)
    updates, opt = tx.update(grads, state['opt'], state['params'])
    return {
      'params': optax.apply_updates(state['params'], updates),
      'opt': opt,
      'residual': jd.PerWorker(residual),
    }

  for _ in range(3):
    state = step(state)
  jd.save(tmp_path, 3, state)
  restored = jd.restore(tmp_path, abstract(state))
  for _ in range(3):
    state, restored = step(state), step(restored)
  assert_same(restored, state)


def test_another_number_of_workers(tmp_path, make_mesh):
  old, new = 3, 5

  def state(workers, seed):
    state = make_state(seed, workers)
    del state['own']
    rows = -(-16 // workers)
    state['rows'] = jd.PerWorker(
      jnp.zeros((workers * rows, 2)).at[:16].set(1.0).reshape(workers, rows, 2),
      'split',
    )
    return place(state, make_mesh(workers))

  before = state(old, 0)
  like = state(new, 1)
  jd.save(tmp_path, 1, before)
  after = jd.restore(tmp_path, abstract(like))
  assert_same(after, jd.resize(before, like))
  np.testing.assert_allclose(
    np.mean(after['residual'].value['w'], axis=0),
    np.mean(before['residual'].value['w'], axis=0),
    atol=2e-7,  # One float32 rounding of a mean of numbers near one.
  )
  np.testing.assert_array_equal(
    np.reshape(after['rows'].value, (-1, 2))[:16], np.ones((16, 2))
  )


def rows_of(workers):
  """Eleven rows of one array, cut for a number of workers."""
  each = -(-11 // workers)
  rows = np.zeros((workers * each, 2), np.float32)
  rows[:11] = np.arange(22).reshape(11, 2) + 1
  return rows.reshape(workers, each, 2)


def test_any_number_of_workers_to_any_other(tmp_path, make_mesh):
  """All 25 pairs of 1 to 5, over meshes, against means in NumPy."""
  rng = np.random.default_rng(0)
  residuals = {n: rng.normal(size=(n, 7)).astype(np.float32) for n in SMALL}

  def state(workers, residual):
    return place(
      {
        'w': jnp.arange(3.0),
        'residual': jd.PerWorker(jnp.asarray(residual)),
        'rows': jd.PerWorker(jnp.asarray(rows_of(workers)), 'split'),
        'count': jd.PerWorker(jnp.full(workers, 7)),
      },
      make_mesh(workers),
    )

  for old in SMALL:
    jd.save(tmp_path / str(old), 1, state(old, residuals[old]))
    for new in SMALL:
      like = state(new, np.zeros((new, 7), np.float32))
      got = jd.restore(tmp_path / str(old), like)
      e = np.asarray(got['residual'].value)
      assert e.shape == (new, 7)
      np.testing.assert_allclose(
        e.mean(axis=0), residuals[old].mean(axis=0), rtol=0, atol=1e-6
      )
      if old == new:
        np.testing.assert_array_equal(e, residuals[old])
      np.testing.assert_array_equal(got['rows'].value, rows_of(new))
      np.testing.assert_array_equal(got['count'].value, np.full(new, 7))
      np.testing.assert_array_equal(got['w'], np.arange(3))
      assert got['residual'].value.sharding == like['residual'].value.sharding


def test_many_leaves_are_resized_a_few_at_a_time(tmp_path, monkeypatch):
  monkeypatch.setattr('jaxdist.checkpoint.loading._RESIZE_BATCH_BYTES', 100)

  def state(workers):
    rows = jnp.arange(workers * 5.0).reshape(workers, 5)
    return [jd.PerWorker(rows + i) for i in range(7)]

  jd.save(tmp_path, 1, state(4))
  assert_same(jd.restore(tmp_path, state(2)), jd.resize(state(4), state(2)))


def test_newest_checkpoints_are_kept(tmp_path):
  assert jd.latest_step(tmp_path / 'none') is None
  assert jd.latest_step(tmp_path) is None
  for step in (1, 5, 10, 20):
    jd.save(tmp_path, step, {'w': jnp.full(2, step)})
    assert jd.latest_step(tmp_path) == step
  assert sorted(os.listdir(tmp_path)) == ['10', '20', 'saving-1']
  like = {'w': jnp.zeros(2, int)}
  assert jd.restore(tmp_path, like)['w'].tolist() == [20, 20]
  assert jd.restore(tmp_path, like, step=10)['w'].tolist() == [10, 10]
  with pytest.raises(
    FileNotFoundError, match=r'no checkpoint of step 5 in .*, only of 10, 20\.'
  ):
    jd.restore(tmp_path, like, step=5)
  jd.save(tmp_path, 30, {'w': jnp.full(2, 30)}, keep=1)
  assert sorted(os.listdir(tmp_path)) == ['30', 'saving-1']


@pytest.mark.parametrize('step', [10, 9])
def test_step_must_be_newer(tmp_path, step):
  jd.save(tmp_path, 10, {'w': jnp.ones(2)})
  with pytest.raises(ValueError, match=f'newest .* 10, got {step}'):
    jd.save(tmp_path, step, {'w': jnp.zeros(2)})
  assert jd.restore(tmp_path, {'w': jnp.zeros(2)})['w'].tolist() == [1, 1]


def test_metadata_comes_back(tmp_path):
  metadata = {'seed': 7, 'data': {'batch': [1, 2.5, None]}, 'é': '"'}
  jd.save(tmp_path, 1, jnp.ones(2), metadata=metadata)
  jd.save(tmp_path, 2, jnp.ones(2))
  assert jd.checkpoint_metadata(tmp_path, 1) == metadata
  assert jd.checkpoint_metadata(tmp_path) == {}


@pytest.mark.parametrize(
  'metadata',
  [{'x': np.ones(1)}, {'x': {1: 2}}, {'x': (1, 2)}, {'x': float('nan')}],
)
def test_metadata_that_is_not_json_is_refused(tmp_path, metadata):
  with pytest.raises(ValueError, match='metadata must be a dict that JSON'):
    jd.save(tmp_path, 1, jnp.ones(2), metadata=metadata)
  assert os.listdir(tmp_path) == []


def test_nothing_to_restore(tmp_path):
  for directory in (tmp_path, tmp_path / 'none'):
    with pytest.raises(FileNotFoundError, match='no checkpoint in'):
      jd.restore(directory, {})
    with pytest.raises(FileNotFoundError, match='no checkpoint in'):
      jd.checkpoint_metadata(directory)
  assert not (tmp_path / 'none').exists()


OTHER_MODELS = {
  'missing': (
    lambda s: s | {'new': jnp.ones(2)},
    r"\['new'\] is in `like` but",
  ),
  'extra': (
    lambda s: {'e': s['e']},
    r"\['w'\] is in the checkpoint .*/7 but not in `like`",
  ),
  'shape': (
    lambda s: s | {'w': jnp.ones(4)},
    r"\['w'\] has shape \(3,\) in the checkpoint .*/7 and \(4,\) in `like`",
  ),
  'dtype': (
    lambda s: s | {'w': jnp.ones(3, jnp.bfloat16)},
    r"\['w'\] has dtype float32 in the checkpoint .*/7 and bfloat16 in `like`",
  ),
  'shape of a worker': (
    lambda s: s | {'e': jd.PerWorker(jnp.ones((2, 3)))},
    r"\['e'\].value has shape \(4, 2\) in .* and \(2, 3\) in `like`",
  ),
  'place': (
    lambda s: s | {'e': jnp.ones((4, 2))},
    r"\['e'\] is in `like` but not",
  ),
  'resize=None': (
    lambda s: s | {'e': jd.PerWorker(jnp.ones((2, 2)), None)},
    r"\['e'\].value is of 4 workers in .* of 2 in `like`, and cannot be",
  ),
}


@pytest.mark.parametrize('case', OTHER_MODELS)
def test_another_model_is_refused_by_name(tmp_path, case):
  change, message = OTHER_MODELS[case]
  state = {'w': jnp.ones(3), 'e': jd.PerWorker(jnp.ones((4, 2)))}
  jd.save(tmp_path, 7, state)
  with pytest.raises(ValueError, match=message):
    jd.restore(tmp_path, change(state))
  assert_same(jd.restore(tmp_path, state), state)


BAD_STATES = {
  'text': (
    {'a': ['text']},
    r"\['a'\]\[0\] must be an array or a number, got str",
  ),
  'object': ({'a': object()}, r"\['a'\] must be an array or a number"),
  'abstract': (
    {'a': jax.ShapeDtypeStruct((2,), jnp.float32)},
    r"\['a'\] must be an array or a number, got ShapeDtypeStruct",
  ),
  'worker view': (jd.PerWorker(jnp.ones(())), '.value .* has no worker axis'),
  'workers': (
    {'a': jd.PerWorker(jnp.ones(4)), 'b': jd.PerWorker(jnp.ones(2))},
    r"\['a'\].value is of 4 and \['b'\].value of 2",
  ),
}


@pytest.mark.parametrize('case', BAD_STATES)
def test_bad_state_is_refused_by_name(tmp_path, case):
  state, message = BAD_STATES[case]
  with pytest.raises(ValueError, match=message):
    jd.save(tmp_path, 1, state)
  assert os.listdir(tmp_path) == []


def test_bad_numbers_are_refused(tmp_path):
  with pytest.raises(ValueError, match='step must be at least 0, got -1'):
    jd.save(tmp_path, -1, jnp.ones(2))
  with pytest.raises(ValueError, match='keep must be at least 1, got 0'):
    jd.save(tmp_path, 1, jnp.ones(2), keep=0)
  with pytest.raises(ValueError, match=r"\['w'\] is traced: call save outside"):
    jax.jit(lambda w: jd.save(tmp_path, 1, {'w': w}))(jnp.ones(2))
  assert os.listdir(tmp_path) == []


def test_checkpoints_of_others_are_refused(tmp_path):
  ocp.save(tmp_path / '3', {'w': jnp.ones(2)})
  with pytest.raises(ValueError, match=r'3 was not written by jaxdist\.save'):
    jd.restore(tmp_path, {'w': jnp.ones(2)})
  (tmp_path / '4').mkdir()
  with pytest.raises(ValueError, match=r'4 was not written by jaxdist\.save'):
    jd.checkpoint_metadata(tmp_path)


def test_a_half_deleted_checkpoint_is_refused_and_removed(tmp_path):
  jd.save(tmp_path, 1, {'w': jnp.ones(2)})
  shutil.rmtree(tmp_path / '1' / 'jaxdist')
  with pytest.raises(ValueError, match=r'1 was not written .*not whole'):
    jd.restore(tmp_path, {'w': jnp.ones(2)})
  jd.save(tmp_path, 2, {'w': jnp.ones(2)}, keep=1)
  assert sorted(os.listdir(tmp_path)) == ['2', 'saving-1']


def test_checkpoints_of_another_format_are_refused(tmp_path):
  jd.save(tmp_path, 1, {'w': jnp.ones(2)})
  path = tmp_path / '1' / 'jaxdist' / 'data.json'
  record = json.loads(path.read_text()) | {'format': 99}
  del record['digest']
  words = json.dumps(record, sort_keys=True).encode()
  newer = record | {'digest': digest(words).hex()}
  # The first format had no digests.
  for other in (newer, record | {'format': 1}):
    path.write_text(json.dumps(other))
    message = f'has format {other["format"]}; this version .* reads format 2'
    with pytest.raises(ValueError, match=message) as caught:
      jd.restore(tmp_path, {'w': jnp.ones(2)})
    assert not isinstance(caught.value, jd.CorruptCheckpointError)


def test_what_a_killed_save_leaves_is_ignored_and_removed(tmp_path):
  jd.save(tmp_path, 1, {'w': jnp.ones(2)})
  left = tmp_path / 'saving-4' / 'abc'
  shutil.copytree(tmp_path / '1', left / '2.orbax-checkpoint-tmp')
  shutil.copytree(tmp_path / '1', left / '2')
  (tmp_path / 'saving-x').mkdir()
  assert jd.latest_step(tmp_path) == 1
  jd.restore(tmp_path, {'w': jnp.ones(2)})
  with jd.Saver(tmp_path) as saver:
    saver.save(3, {'w': jnp.ones(2)})
  assert sorted(os.listdir(tmp_path)) == ['1', '3', 'saving-5', 'saving-x']
