"""What bad input comes to, by row and number of workers.

A row either has the stated result, the same on all workers, or is refused where
the object is made or at init. Simulated workers, one small program each.
"""

import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxdist as jd

AXIS = 'data'
BLOCK = 128
TESTS = Path(__file__).parent

# Rows about processes and files, and the tests that hold them.
ELSEWHERE = {
  'mismatched trees, desync': (
    'hosts/test_desync.py',
    'test_all_processes_name_what_differs',
  ),
  'corrupted checkpoint': (
    'test_corruption.py',
    'test_random_damage_is_found_or_harmless',
  ),
  'slow worker': (
    'hosts/test_faults.py',
    'test_stopped_process_ends_the_other',
  ),
}


def simulated(workers, fn, *args):
  """``fn`` on each worker; of ``args`` each has its row."""
  ranks = jnp.arange(workers)
  run = jax.vmap(lambda _, *args: fn(*args), axis_name=AXIS)
  return jax.tree.map(np.asarray, jax.jit(run)(ranks, *args))


def agreed(tree):
  """What all workers have alike."""
  for leaf in jax.tree.leaves(tree):
    for row in leaf[1:]:
      np.testing.assert_array_equal(row, leaf[0])
  return jax.tree.map(lambda leaf: leaf[0], tree)


@functools.cache
def with_feedback(code, method):
  """Takes steps on all workers; ``gradients`` are (workers, steps, ...)."""
  tx = jd.error_feedback(jd.mean(AXIS, code, method))

  def worker(gradients):
    first = jax.tree.map(lambda g: g[0], gradients)
    step = lambda state, g: tx.update(g, state)[::-1]
    state, updates = jax.lax.scan(step, tx.init(first), gradients)
    return updates, state

  return jax.jit(jax.vmap(worker, axis_name=AXIS))


def fed_back(gradients, code, method='gather'):
  """All steps with feedback: updates, the same for all, and the state."""
  run = with_feedback(code, method)
  updates, state = jax.tree.map(np.asarray, run(gradients))
  return agreed(updates), state


def normal(workers, *shape, dtype=np.float32):
  rng = np.random.default_rng(workers)
  return rng.normal(size=(workers, *shape)).astype(dtype)


EXACT = jd.identity(block_size=BLOCK)
SIGN = jd.sign(block_size=BLOCK)
INT8 = jd.quantize(bits=8, block_size=BLOCK)
HALF = jd.top_k(0.5, block_size=BLOCK)


def row_not_finite_gradient(workers):
  """Steps: bad, bad, bad, good, good."""
  gradients = np.repeat(normal(workers, 1, 40), 5, axis=1)
  for step, bad in enumerate((np.nan, np.inf, -np.inf)):
    gradients[workers - 1, step, 7 * step] = bad
  updates, state = fed_back(gradients, SIGN)
  assert not updates[:3].any()
  assert updates[3:].all() and np.isfinite(updates).all()
  np.testing.assert_array_equal(state.skipped, np.full(workers, 3))
  # What was applied and what is owed are the good gradients.
  owed = state.residual.value.mean(0)
  np.testing.assert_allclose(
    updates.sum(0) + owed, 2 * gradients[:, 4].mean(0), atol=1e-5
  )


def row_residual_not_finite(workers):
  residual = normal(workers, 3)
  residual[0, 1] = np.nan
  tx = jd.error_feedback(jd.mean(AXIS, HALF))
  state = jd.init(tx, jnp.zeros(3), axis=AXIS, workers=workers)
  bad = state._replace(
    opt_state=state.opt_state._replace(residual=jd.PerWorker(residual))
  )
  with tempfile.TemporaryDirectory() as directory:
    jd.save(directory, 1, bad)
    with pytest.raises(ValueError, match=r'finite, \.opt_state\.residual'):
      jd.restore(directory, state)
    with pytest.warns(UserWarning, match=r'residual\.value are not finite'):
      back = jd.restore(directory, state, reset_residuals=True)
  assert jax.tree.structure(back) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, back, state)


def row_overflow(workers):
  """The sum of a row overflows, and so does that of the workers."""
  gradients = np.full((workers, 2, BLOCK), 3e38, np.float32)
  gradients[:, 0] /= workers
  updates, state = fed_back(gradients, SIGN)
  np.testing.assert_allclose(
    updates[0], np.full(BLOCK, 3e38 / workers), rtol=1e-6
  )
  many = workers > 1
  np.testing.assert_array_equal(state.skipped, np.full(workers, int(many)))
  assert (updates[1] == (0 if many else gradients[0, 1])).all()
  assert np.isfinite(state.residual.value).all()


def row_integers_wrap(workers):
  """Codes of 127, and halves of 30000, are added up in float32."""
  gradients = {
    'a': np.full((workers, 1, BLOCK), 100, np.float32),
    'b': np.full((workers, 1, 9), 30000, np.float16),
  }
  updates, _ = fed_back(gradients, INT8, 'two_shot')
  np.testing.assert_allclose(updates['a'][0], 100, rtol=1e-3)
  np.testing.assert_allclose(updates['b'][0], 30000, rtol=1e-3)
  with pytest.raises(ValueError, match="method='psum' sums payloads"):
    jd.mean(AXIS, INT8, 'psum')


def row_out_of_a_format(workers):
  """300 and 1000 are no numbers of int8 and of 8-bit floats."""
  gradients = np.tile(np.float32([300, 1000, -1000, 0, 448]), (workers, 1, 1))
  for code in (INT8, jd.float8(block_size=BLOCK)):
    updates, _ = fed_back(gradients, code)
    np.testing.assert_allclose(updates[0], gradients[0, 0], atol=1000 / 16)


def row_zeros_and_subnormals(workers):
  gradients = np.zeros((workers, 2, 40), np.float32)
  gradients[:, 1] = 1e-40
  for code in (SIGN, INT8):
    updates, state = fed_back(gradients, code)
    assert not updates[0].any()
    assert not state.skipped.any()
    # Subnormal numbers may count as zeros.
    assert (np.abs(updates[1]) <= 2e-40).all()
    assert (np.abs(state.residual.value) <= 2e-40).all()


def row_low_precision_residual(workers):
  """2000 times 1e-3 behind a number that is always larger."""
  gradients = np.zeros((workers, 2000, 2), jnp.bfloat16)
  gradients[:, :, 0], gradients[:, :, 1] = 1e4, 1e-3
  code = jd.top_k(1 / BLOCK, block_size=BLOCK)
  updates, state = fed_back(gradients, code)
  assert state.residual.value.dtype == np.float32
  if workers == 1:  # It drops nothing.
    np.testing.assert_array_equal(updates, gradients[0])
    return
  assert not updates[:, 1].any()
  want = 2000 * float(jnp.bfloat16(1e-3))
  np.testing.assert_allclose(state.residual.value[:, 1], want, rtol=1e-5)


def row_how_many_are_kept(workers):
  for density in (0.0, -0.1, 1.5):
    with pytest.raises(ValueError, match=rf'density must be .* {density}'):
      jd.top_k(density)
  # Of a block of 128 there is one at least; of three numbers no more than all.
  gradients = normal(workers, 1, 3)
  updates, _ = fed_back(gradients, HALF)
  np.testing.assert_allclose(updates[0], gradients[:, 0].mean(0), rtol=1e-5)
  one = jd.top_k(1e-6, block_size=BLOCK)
  updates, _ = fed_back(np.repeat(gradients[:1], workers, 0), one)
  assert np.count_nonzero(updates) == (1 if workers > 1 else 3)


def row_scalar_leaf(workers):
  gradients = {'s': normal(workers, 1), 'w': normal(workers, 1, 9)}
  updates, _ = fed_back(gradients, HALF, 'two_shot')
  want = gradients['s'].mean()
  np.testing.assert_allclose(updates['s'], [want], rtol=1e-5)


def row_zero_size_leaf(workers):
  tx = jd.error_feedback(jd.mean(AXIS, HALF))
  params = {'e': jnp.zeros((0, 3)), 'w': jnp.zeros(3)}
  state = jd.init(tx, params, axis=AXIS, workers=workers)
  assert state.opt_state.residual.value['e'].shape == (workers, 0, 3)
  gradients = {
    'e': np.zeros((workers, 1, 0, 3)), 'w': normal(workers, 1, 3)
  }  # fmt: skip
  updates, _ = fed_back(gradients, HALF)
  assert updates['e'].shape == (1, 0, 3)
  with tempfile.TemporaryDirectory() as directory:
    jd.save(directory, 1, state)
    back = jd.restore(directory, state)
  jax.tree.map(np.testing.assert_array_equal, back, state)


def row_narrow_floats(workers):
  for dtype in (jnp.bfloat16, np.float16):
    gradients = normal(workers, 1, 40, dtype=dtype)
    updates, state = fed_back(gradients, EXACT)
    assert updates.dtype == dtype
    want = gradients[:, 0].astype(np.float32).mean(0).astype(dtype)
    np.testing.assert_array_equal(updates[0], want)
    assert state.residual.value.dtype == np.float32


def row_no_floats(workers):
  """Integers, bools and keys have no mean; None and masked leaves pass by."""
  tx = jd.error_feedback(jd.mean(AXIS))
  where = {'axis': AXIS, 'workers': workers}
  for leaf in (jnp.arange(3), jnp.array(True), jax.random.key(0)):
    for make in (tx, optax.masked(tx, {'n': False, 'w': True})):
      with pytest.raises(TypeError, match=r"params\['n'\] is"):
        jd.init(make, {'n': leaf, 'w': jnp.zeros(3)}, **where)
  gradients = {'w': normal(workers, 3), 'none': None}

  def worker(gradients):
    update, _ = tx.update(gradients, tx.init(gradients))
    # What jax.grad(allow_int=True) gives where there is no gradient.
    nothing = np.zeros(3, jax.dtypes.float0)
    with pytest.raises(TypeError, match=r"updates\['n'\] is .*float0"):
      tx.init({'n': nothing, 'w': gradients['w']})
    masked = optax.masked(tx, {'n': False, 'w': True})
    params = {'n': jnp.arange(3), 'w': gradients['w']}
    passed, _ = masked.update(params, masked.init(params))
    return update, passed

  update, passed = agreed(simulated(workers, worker, gradients))
  assert update['none'] is None
  np.testing.assert_allclose(update['w'], gradients['w'].mean(0), rtol=1e-5)
  np.testing.assert_array_equal(passed['n'], np.arange(3))
  np.testing.assert_array_equal(passed['w'], update['w'])


def row_other_tree(workers):
  tx = jd.error_feedback(jd.mean(AXIS, HALF))
  params = {'w': jnp.zeros(3), 'b': jnp.zeros(2)}

  def worker():
    state = tx.init(params)
    for name, leaf in (('w', jnp.zeros(4)), ('b', jnp.zeros(2, 'float16'))):
      with pytest.raises(ValueError, match=rf"updates\['{name}'\] was"):
        tx.update(params | {name: leaf}, state)
    with pytest.raises(ValueError, match=r"updates\['b'\] .* missing now"):
      tx.update({'w': params['w']}, state)
    return state

  simulated(workers, worker)


def row_one_worker(workers):
  """As one that is alone: its own update, and itself for a neighbour."""
  alone = np.repeat(normal(1, 40), workers, axis=0)
  coded = jd.mean(AXIS, SIGN if workers == 1 else EXACT)
  gossips = [
    jd.gossip(AXIS, topology)
    for topology in ('ring', 'one_peer_exponential', 'random_pairs')
  ]

  def worker(x):
    each = [coded, jd.low_rank_mean(AXIS, 2), *gossips]
    return [c.exchange([x], c.init([x]))[0][0] for c in each]

  for got in agreed(simulated(workers, worker, alone)):
    if workers == 1:
      np.testing.assert_array_equal(got, alone[0])
    np.testing.assert_allclose(got, alone[0], rtol=1e-6)


def row_odd_sizes(workers):
  """Ten numbers in a block, over any number of workers; any topology."""
  x = normal(workers, 2, 5)
  two_shot = jd.mean(AXIS, EXACT, 'two_shot')
  gossips = [
    jd.gossip(AXIS, topology)
    for topology in ('ring', 'one_peer_exponential', 'random_pairs')
  ]

  def worker(x):
    each = [two_shot, *gossips]
    return [c.exchange([x], c.init([x]))[0][0] for c in each]

  mean, *mixed = simulated(workers, worker, x)
  np.testing.assert_allclose(agreed(mean), x.mean(0), rtol=1e-5, atol=1e-6)
  for each in mixed:
    np.testing.assert_allclose(each.mean(0), x.mean(0), rtol=1e-5, atol=1e-6)
    assert workers == 1 or np.abs(each - x).max() > 0.1


def row_order_of_workers(workers):
  """The same order gives the same bits; another one nearly the same."""
  gradients = normal(workers, 1, 300)
  first, _ = fed_back(gradients, INT8)
  again, _ = fed_back(gradients, INT8)
  turned, _ = fed_back(gradients[::-1], INT8)
  np.testing.assert_array_equal(first, again)
  np.testing.assert_allclose(first, turned, rtol=1e-5, atol=1e-6)


ROWS = {
  name.removeprefix('row_'): row
  for name, row in list(globals().items())
  if name.startswith('row_')
}


@pytest.mark.parametrize('workers', [1, 2, 3, 5])
@pytest.mark.parametrize('row', ROWS)
def test_bad_input(row, workers):
  ROWS[row](workers)


@pytest.mark.parametrize('row', ELSEWHERE)
def test_other_rows_are_held_elsewhere(row):
  file, name = ELSEWHERE[row]
  assert f'def {name}(' in (TESTS / file).read_text()
