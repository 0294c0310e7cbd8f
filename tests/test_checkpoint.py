"""Checkpoints come back bit for bit, or not at all."""

import contextlib
import errno
import json
import os
import pathlib
import random
import re
import shutil
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

import jaxdist as jd
from jaxdist.checkpoint import saving
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


@pytest.mark.parametrize(('old', 'new'), [(8, 4), (3, 5)])
def test_another_number_of_workers(tmp_path, make_mesh, old, new):
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
  assert sorted(os.listdir(tmp_path)) == ['10', '20']
  like = {'w': jnp.zeros(2, int)}
  assert jd.restore(tmp_path, like)['w'].tolist() == [20, 20]
  assert jd.restore(tmp_path, like, step=10)['w'].tolist() == [10, 10]
  with pytest.raises(
    FileNotFoundError, match=r'no checkpoint of step 5 in .*, only of 10, 20\.'
  ):
    jd.restore(tmp_path, like, step=5)
  jd.save(tmp_path, 30, {'w': jnp.full(2, 30)}, keep=1)
  assert os.listdir(tmp_path) == ['30']


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
  assert os.listdir(tmp_path) == ['2']


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
  shutil.copytree(tmp_path / '1', tmp_path / '2.orbax-checkpoint-tmp')
  assert jd.latest_step(tmp_path) == 1
  jd.restore(tmp_path, {'w': jnp.ones(2)})
  jd.save(tmp_path, 3, {'w': jnp.ones(2)})
  assert sorted(os.listdir(tmp_path)) == ['1', '3']


def test_a_saver_writes_what_there_was(tmp_path, make_mesh):
  """Also when the state is donated, and overwritten, right behind it."""
  step = jax.jit(
    lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0
  )
  host = np.zeros(3)
  start = {
    'w': jnp.zeros(300_000),
    'e': jd.PerWorker(jnp.zeros((8, 1000))),
  }
  state = place(start, make_mesh())
  with jd.Saver(tmp_path, keep=3) as saver:
    for number in (1, 2, 3):
      state = jax.block_until_ready(step(state))
      host[:] = number
      saver.save(number, {**state, 'host': host}, metadata={'n': number})
    state = jax.block_until_ready(step(state))
    host[:] = 9
  for number in (1, 2, 3):
    like = {**abstract(state), 'host': host}
    for leaf in jax.tree.leaves(jd.restore(tmp_path, like, step=number)):
      np.testing.assert_array_equal(leaf, number)
    assert jd.checkpoint_metadata(tmp_path, number) == {'n': number}
  # Writing is too fast here to be overtaken for sure.
  for leaf in (host, jnp.zeros(300_000)):
    copied = saving.copied(leaf)
    assert not np.shares_memory(copied, np.asarray(leaf))


@contextlib.contextmanager
def small_files():
  """No file may grow beyond 64 kB: what a full disk does, for one process."""
  resource = pytest.importorskip('resource')
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def noise(seed):
  return {'w': np.random.default_rng(seed).normal(size=50_000)}


NOT_SAVED = (
  r'step 2 was not saved in .*: File too large\. Checkpoints that were there '
  r'still are'
)


def test_a_full_disk_is_named_and_training_can_go_on(tmp_path, capfd, caplog):
  jd.save(tmp_path, 1, noise(1))
  with small_files(), pytest.raises(OSError, match=NOT_SAVED) as caught:
    jd.save(tmp_path, 2, noise(2))
  assert caught.value.errno == errno.EFBIG
  # The error says it all; Orbax would log pages.
  assert not caplog.records and not capfd.readouterr().err
  np.testing.assert_array_equal(
    jd.restore(tmp_path, noise(0))['w'], noise(1)['w']
  )
  jd.save(tmp_path, 2, noise(2))
  assert sorted(os.listdir(tmp_path)) == ['1', '2']


def test_a_saver_raises_at_the_next_call(tmp_path):
  saver = jd.Saver(tmp_path)
  saver.save(1, noise(1))
  saver.wait()
  with small_files():
    saver.save(2, noise(2))
    with pytest.raises(OSError, match=NOT_SAVED):
      saver.save(3, noise(3))
  saver.wait()  # Once is enough.
  saver.save(3, noise(3))
  saver.wait()
  assert sorted(os.listdir(tmp_path)) == ['1', '3']
  with small_files(), pytest.raises(OSError, match='step 4 was not saved'):  # noqa: SIM117
    with jd.Saver(tmp_path) as saver:
      saver.save(4, noise(4))
  with pytest.raises(ValueError, match='keep must be at least 1, got 0'):
    jd.Saver(tmp_path, keep=0)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  message = r'step 1 was not saved in .*file/run: Not a directory'
  with pytest.raises(OSError, match=message):
    jd.save(tmp_path / 'file' / 'run', 1, noise(1))


def start(script, *args):
  """Starts Python as this one runs, with stdin and stdout as pipes."""
  root = pathlib.Path(jd.__file__).parent.parent
  return subprocess.Popen(
    [sys.executable, '-W', 'error', '-c', script, *map(str, args)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    env=os.environ | {'PYTHONPATH': str(root), 'JAX_PLATFORMS': 'cpu'},
  )


SAVES_FOR_EVER = """
import itertools, sys
import jax
import jax.numpy as jnp
import jaxdist as jd
state = lambda step: {
  'w': [jnp.full(50_000, step) for _ in range(4)],
  'e': jd.PerWorker(jnp.full((4, 1000), step)),
}
jax.block_until_ready(state(0))
directory, keep, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
if kind == 'saver':
  saver = jd.Saver(directory, keep=keep)
  save = lambda *args: (saver.save(*args), saver.wait())
else:
  save = lambda *args: jd.save(directory, *args, keep=keep)
print('ready', flush=True)
sys.stdin.readline()
for step in itertools.count(1):
  print('saving', step, flush=True)
  save(step, state(step))
  print('saved', step, flush=True)
"""


def kill_while_saving(saver, after, fraction):
  """Kills a process in its next save, and says how many it had finished."""
  with saver:
    assert saver.stdout.readline() == 'ready\n'
    saver.stdin.write('go\n')
    saver.stdin.flush()
    began = time.monotonic()
    for saved in range(1, after + 1):
      assert saver.stdout.readline() == f'saving {saved}\n'
      assert saver.stdout.readline() == f'saved {saved}\n'
    seconds_a_save = (time.monotonic() - began) / after
    assert saver.stdout.readline() == f'saving {after + 1}\n'
    time.sleep(fraction * seconds_a_save)
    saver.kill()
    return after + sum(line.startswith('saved') for line in saver.stdout)


def check_killed_saves(directory, trials, seed):
  """Of so many savers, killed at random moments, each leaves a whole state."""
  # Seeded, but the moment also depends on how busy the machine is.
  rng = random.Random(seed)
  like = {
    'w': [jax.ShapeDtypeStruct((50_000,), jnp.int32) for _ in range(4)],
    'e': jd.PerWorker(jax.ShapeDtypeStruct((4, 1000), jnp.int32)),
  }
  kinds = ['save', 'saver', 'save']
  paths = {
    directory / str(trial): (1 + trial % 2, kinds[trial % 3])
    for trial in range(trials)
  }
  savers = [start(SAVES_FOR_EVER, path, *how) for path, how in paths.items()]
  try:
    for saver, (path, (keep, _)) in zip(savers, paths.items(), strict=True):
      saved = kill_while_saving(saver, rng.randint(1, 3), rng.uniform(0, 1))
      # The save that was killed may have been committed just before.
      newest = jd.latest_step(path)
      assert newest in (saved, saved + 1)
      restored = jd.restore(path, like)
      assert jd.latest_step(path) == newest
      assert all((x == newest).all() for x in jax.tree.leaves(restored))
      jd.save(path, newest + 1, restored, keep=keep)
      kept = range(newest + 2 - keep, newest + 2)
      assert sorted(map(int, os.listdir(path))) == list(kept)
  finally:
    for saver in savers:
      saver.kill()


def test_a_killed_save_leaves_the_newest_committed_one_whole(tmp_path):
  check_killed_saves(tmp_path, trials=4, seed=0)


@pytest.mark.slow
def test_50_killed_saves_leave_the_newest_committed_one_whole(tmp_path):
  for seed in range(10):
    check_killed_saves(tmp_path / str(seed), trials=5, seed=seed)


ONE_OF_TWO = """
import sys
import jax
jax.config.update('jax_num_cpu_devices', 2)
address, rank, directory = sys.argv[1:]
jax.distributed.initialize(
  address, num_processes=2, process_id=int(rank),
  coordinator_bind_address=address, cluster_detection_method='deactivate')
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import jaxdist as jd

mesh = jax.make_mesh((4,), ('data',))
def make(value, *spec):
  return jax.make_array_from_callback(
    value.shape, NamedSharding(mesh, P(*spec)), value.__getitem__)
value = np.arange(8, dtype=np.float32).reshape(4, 2)
state = {'w': make(value), 'e': jd.PerWorker(make(value, 'data')), 'n': 3}
jd.assert_in_sync(state)
jd.save(directory, 1, state)
with jd.Saver(directory) as saver:
  saver.save(2, state)
restored = jd.restore(directory, state)
jax.tree.map(lambda x, y: np.testing.assert_array_equal(
  *(jax.experimental.multihost_utils.process_allgather(z, tiled=True)
    for z in (x, y))), state, restored)
assert restored['e'].value.sharding == state['e'].value.sharding

half = jax.make_mesh((2,), ('data',), devices=mesh.devices[::2])
small = jax.ShapeDtypeStruct(
  (2, 2), jnp.float32, sharding=NamedSharding(half, P('data')))
small = jd.restore(directory, state | {'e': jd.PerWorker(small)})['e'].value
turned = jax.ShapeDtypeStruct(
  (4, 2), jnp.float32, sharding=NamedSharding(half, P(None, 'data')))
turned = jd.restore(directory, state | {'e': jd.PerWorker(turned)})['e'].value
np.testing.assert_array_equal(
  turned.addressable_shards[0].data, value[:, int(rank):int(rank) + 1])
np.testing.assert_array_equal(
  small.addressable_shards[0].data, [[[1, 2]], [[5, 6]]][int(rank)])

wrong = jax.make_array_from_single_device_arrays(
  value.shape, state['w'].sharding,
  [jax.device_put(value + int(rank) * (value == 5), device)
   for device in mesh.local_devices])
try:
  jd.assert_in_sync(state | {'w': wrong})
except jd.OutOfSyncError as error:
  print('found:', error)
try:
  jd.assert_in_sync(state | {'n': 3.0 if rank == '1' else 3})
except jd.OutOfSyncError as error:
  print('found:', error)

# One process finds it, all go back a step.
import warnings
from jaxdist.checkpoint import integrity
check, answers = integrity.check, ["['e'][2:3, 0:2]"]
if rank == '1':
  integrity.check = lambda *args: answers.pop() if answers else check(*args)
with warnings.catch_warnings(record=True) as caught:
  warnings.simplefilter('always')
  back = jd.restore(directory, state)
print('back at', jd.latest_step(directory))
print(*[x.message for x in caught
        if x.category is jd.CorruptCheckpointWarning])
assert back['e'].value.sharding == state['e'].value.sharding
"""


def test_two_processes(tmp_path):
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{probe.getsockname()[1]}'
  ranks = [start(ONE_OF_TWO, address, rank, tmp_path) for rank in range(2)]
  try:
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
  finally:
    for rank in ranks:
      rank.kill()
  assert [rank.returncode for rank in ranks] == [0, 0]
  for output in outputs:
    assert 'back at 1' in output
    assert re.search(r"/2 is damaged: \['e'\]\[2:3.* Restored step 1", output)
    found = [line for line in output.splitlines() if line.startswith('found:')]
    differs, other_tree = found
    assert differs.startswith("found: ['w'] is out of sync")
    assert differs.endswith('the two are on other processes.')
    assert other_tree.startswith('found: processes [1] hold a tree of other')
  # One process reads what two have written, for another number of workers.
  like = {'w': jnp.zeros((4, 2)), 'e': jd.PerWorker(jnp.zeros((2, 2))), 'n': 0}
  restored = jd.restore(tmp_path, like)
  assert restored['e'].value.tolist() == [[1, 2], [5, 6]]
  assert restored['n'] == 3
