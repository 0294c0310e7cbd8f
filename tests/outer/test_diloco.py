"""DiLoCo and Streaming DiLoCo: a loop in NumPy, their limits, their bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import public
import pytest

import jaxdist as jd
from jaxdist.outer.fragments import assign

WORKERS = 4
# Sums in another order, of numbers of size one.
CLOSE = {'rtol': 1e-5, 'atol': 1e-6}
NESTEROV = optax.sgd(0.7, momentum=0.9, nesterov=True)
MEAN = jd.mean(public.AXIS)
LEAVES = {'a': 0, 'b': 1, 'c': 0}


def params():
  rng = np.random.default_rng(0)
  sizes = {'a': (3, 5), 'b': (40,), 'c': ()}
  return {
    name: jnp.asarray(rng.normal(size=size), jnp.float32)
    for name, size in sizes.items()
  }


def gradients(steps, seed=1, workers=WORKERS):
  rng = np.random.default_rng(seed)
  draw = lambda x: rng.normal(size=(steps, workers, *x.shape))
  return jax.tree.map(lambda x: draw(x).astype(np.float32), params())


def walk(tx, steps, seed=1, workers=WORKERS):
  """Parameters after each step: leaves of (workers, steps, ...)."""
  return public.run(tx, gradients(steps, seed, workers), params(), walk=True)[0]


def assert_close(got, want, **tolerances):
  for name in want:
    np.testing.assert_allclose(got[name], want[name], **tolerances)


def fragment_rows(tree, fragment, lead):
  """The numbers of one fragment, behind ``lead`` axes, side by side."""
  rows = [
    np.reshape(tree[name], (*np.shape(tree[name])[:lead], -1))
    for name, number in LEAVES.items()
    if fragment in (number, None)
  ]
  return np.concatenate(rows, axis=-1)


def streaming_loop(steps, every, turn, delay, mix, code, grads, start):
  """One fragment's path: SGD inside, Nesterov outside, in NumPy."""
  anchor, trace = start, np.zeros_like(start)
  theta = np.stack([start] * WORKERS)
  residual = np.zeros_like(theta)
  path = []
  for step in range(1, steps + 1):
    theta = theta - np.float32(0.1) * grads[step - 1]
    if (step + delay - turn) % every == 0:
      snapshot = anchor - theta
    if step >= turn and (step - turn) % every == 0:
      wanted = snapshot + residual
      sent = code(wanted)
      residual = wanted - sent
      trace = 0.9 * trace + sent.mean(0)
      anchor = anchor - 0.7 * (sent.mean(0) + 0.9 * trace)
      theta = mix * theta + (1 - mix) * anchor
    path.append(theta)
  return np.stack(path, 1)


def largest(x):
  """The largest number of each worker: all of them lie in one block."""
  return np.where(abs(x) == abs(x).max(1, keepdims=True), x, 0)


@pytest.mark.parametrize(
  ('fragments', 'delay', 'mix', 'top_1'),
  [
    (1, 0, 0.0, False),
    (2, 0, 0.25, True),
    (2, 1, 0.0, False),
    (2, 2, 0.5, True),
  ],
)
def test_streaming_is_the_loop(fragments, delay, mix, top_1):
  tx = jd.diloco(
    optax.sgd(0.1),
    NESTEROV,
    jd.mean(public.AXIS, jd.top_k(1 / 128, block_size=128)) if top_1 else MEAN,
    every=6,
    fragments=fragments,
    delay=delay,
    mix=mix,
    pattern=LEAVES,
  )
  path = walk(tx, 20)
  for fragment in range(fragments):
    chosen = fragment if fragments > 1 else None
    want = streaming_loop(
      20,
      every=6,
      turn=(fragment + 1) * 6 // fragments,
      delay=delay,
      mix=mix,
      code=largest if top_1 else lambda x: x,
      grads=fragment_rows(gradients(20), chosen, 2),
      start=fragment_rows(params(), chosen, 0),
    )
    np.testing.assert_allclose(fragment_rows(path, chosen, 2), want, **CLOSE)


def test_every_step_with_sgd_outside_is_data_parallel():
  tx = jd.diloco(optax.sgd(0.1), optax.sgd(1.0), MEAN, every=1)
  dense = optax.chain(jd.communicate(MEAN), optax.sgd(0.1))
  assert_close(walk(tx, 5), walk(dense, 5), **CLOSE)


def test_one_worker_is_lookahead():
  steps = 7
  tx = jd.diloco(optax.adam(0.1), optax.sgd(0.3), MEAN, every=3)
  path = walk(tx, steps, workers=1)
  lookahead = optax.lookahead(optax.adam(0.1), 3, 0.3)
  both = optax.LookaheadParams(params(), params())
  state = lookahead.init(both)
  for step in range(steps):
    grad = jax.tree.map(lambda g: g[step, 0], gradients(steps, workers=1))  # noqa: B023
    updates, state = lookahead.update(grad, state, both)
    both = optax.apply_updates(both, updates)
    now = jax.tree.map(lambda x: x[0, step], path)  # noqa: B023
    assert_close(now, both.fast, **CLOSE)


def test_mix_of_1_is_each_worker_alone():
  inner = optax.adam(0.1)
  tx = jd.diloco(inner, NESTEROV, MEAN, every=4, fragments=2, delay=1, mix=1.0)
  alone = jax.tree.map(
    lambda *x: jnp.concatenate(x),
    *(
      public.run(
        inner,
        jax.tree.map(lambda g: g[:, i : i + 1], gradients(9)),  # noqa: B023
        params(),
        walk=True,
      )[0]
      for i in range(WORKERS)
    ),
  )
  assert_close(walk(tx, 9), alone, **CLOSE)


def test_without_delay_a_mix_of_0_goes_to_the_anchor():
  """The paper's ends: no share is kept, so all are equal after a turn."""
  tx = jd.diloco(optax.sgd(0.1), NESTEROV, MEAN, every=2)
  path = walk(tx, 4)
  for x in path.values():
    turns = x[:, [1, 3]]
    # Each adds its own way to where all go, and rounds.
    np.testing.assert_allclose(
      turns, turns[:1].repeat(WORKERS, 0), rtol=1e-6, atol=1e-7
    )
    assert np.abs(x[0, 0] - x[1, 0]).max() > 0.01


def test_equal_workers_are_one_worker():
  tx = jd.diloco(
    optax.adam(0.1), NESTEROV, MEAN, every=4, fragments=2, delay=1, mix=0.5
  )
  one = gradients(9, workers=1)
  four = jax.tree.map(lambda g: g.repeat(WORKERS, axis=1), one)
  want = public.run(tx, one, params(), walk=True)[0]
  got = public.run(tx, four, params(), walk=True)[0]
  for name, x in got.items():
    np.testing.assert_array_equal(x, x[:1].repeat(WORKERS, 0))
    np.testing.assert_allclose(x[:1], want[name], **CLOSE)


def quadratic(p, x):
  """Each worker's own minimum, through every leaf."""
  return sum(jnp.sum((leaf - x.mean()) ** 2) for leaf in jax.tree.leaves(p))


def test_the_steps_of_train_step_are_those_of_a_loop(make_mesh):
  """Programs for each turn against branches on the turn."""
  tx = jd.diloco(
    optax.sgd(0.1),
    NESTEROV,
    jd.mean(public.AXIS, jd.float4(block_size=128)),
    every=6,
    fragments=2,
    delay=2,
    mix=0.5,
  )
  rng = np.random.default_rng(3)
  batches = rng.normal(size=(13, WORKERS, 2)).astype(np.float32)
  where = {'axis': public.AXIS, 'mesh': make_mesh(WORKERS)}
  state = jd.init(tx, params(), **where)
  step = jd.train_step(quadratic, tx, **where)
  path = []
  for batch in batches:
    state, _ = step(state, batch.reshape(-1))
    path.append(jax.tree.map(np.asarray, state.params.value))

  def worker(batches):
    def one(carry, batch):
      p, state = carry
      grads = jax.grad(quadratic)(p, batch)
      updates, state = tx.update(grads, state, p)
      p = optax.apply_updates(p, updates)
      return (p, state), p

    return jax.lax.scan(one, (params(), tx.init(params())), batches)[1]

  want = jax.jit(jax.vmap(worker, 1, 1, axis_name=public.AXIS))(batches)
  got = jax.tree.map(lambda *x: np.stack(x), *path)
  assert_close(got, want, **CLOSE)


@pytest.mark.parametrize('delay', [0, 1])
def test_fragments_send_the_same_in_turns(delay, make_mesh):
  """A period's bytes are as claimed; one step's are those of its fragment."""
  communicator = jd.mean(public.AXIS, jd.float4(block_size=128))
  tx = jd.diloco(
    optax.sgd(0.1),
    NESTEROV,
    communicator,
    every=20,
    fragments=4,
    delay=delay,
    feedback=False,
  )
  layers = {f'w{i}': jnp.ones((32, 64)) for i in range(4)}
  where = {'axis': public.AXIS, 'mesh': make_mesh(8)}
  step = jd.train_step(quadratic, tx, **where)
  traffic = jd.traffic(step, jd.init(tx, layers, **where), jnp.ones(8))
  whole = communicator.bytes_sent(layers, 8)
  assert traffic.bytes_a_step == pytest.approx(whole / 20, rel=1e-9)
  assert {row.times for row in traffic.rows} == {1 / 20}
  sent = [row.bytes_sent for row in traffic.rows]
  assert len(sent) == 4 and set(sent) == {whole / 4}


def test_layers_are_dealt_or_cut_into_blocks():
  sizes = {'embedding': 50, 'head': 40, 'norm': 1}
  model = {
    'layers': [{'w': jnp.zeros(10), 'b': jnp.zeros(2)} for _ in range(12)],
    **{name: jnp.zeros(size) for name, size in sizes.items()},
  }

  def fragments(pattern, count=4):
    numbers = assign(model, count, pattern).numbers
    tree = jax.tree.unflatten(jax.tree.structure(model), numbers)
    for layer in tree['layers']:
      assert layer['w'] == layer['b']
    return [layer['w'] for layer in tree['layers']], tree

  layers, strided = fragments('strided')
  assert layers == [0, 1, 2, 3] * 3
  assert fragments('sequential')[0] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
  # The rest fills up what is smallest, the largest first.
  assert [strided[name] for name in sizes] == [0, 1, 2]
  # More fragments than layers: single leaves, as evenly as they go.
  numbers = assign(model, 13, 'strided').numbers
  load = np.bincount(numbers, [x.size for x in jax.tree.leaves(model)])
  assert len(load) == 13 and max(load) == 50
  blocks = assign(model, 13, 'sequential').numbers
  assert list(blocks) == sorted(blocks) and set(blocks) == set(range(13))
  given = assign(model, 2, {'embedding': 0, 'head': 1, 'layers': 1, 'norm': 0})
  assert sorted(given.numbers) == [0] * 2 + [1] * 25


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'fragments': 0}, r'fragments must be an integer of at least 1, got 0'),
    ({'fragments': 3}, r'got fragments=3 and every=4'),
    ({'delay': 4}, r'delay must be .* less than every / fragments, 4, got 4'),
    ({'delay': 2, 'fragments': 2}, r'fragments, 2, got 2'),
    ({'delay': -1}, r'delay must be an integer of at least 0, got -1'),
    ({'mix': 1.5}, r'mix must be in \[0, 1\], got 1\.5'),
    ({'pattern': 'random'}, r"pattern must be one of .* got 'random'"),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    jd.diloco(optax.sgd(0.1), NESTEROV, MEAN, every=4, **options)


@pytest.mark.parametrize(
  ('fragments', 'pattern', 'message'),
  [
    (4, 'strided', r'fragments must have at least one leaf .* \[3\] of 4'),
    (2, {'a': 0, 'b': 0, 'c': 0}, r'got none for \[1\] of 2'),
    (2, {'a': 0, 'b': 2, 'c': 0}, r'numbers from 0 to 1, got 2'),
  ],
)
def test_fragments_without_leaves_are_refused(fragments, pattern, message):
  with pytest.raises(ValueError, match=message):
    assign(params(), fragments, pattern)


COMPOSED = {
  'sparse_loco': lambda: jd.diloco(
    optax.adam(0.05),
    optax.sgd(1.0),
    jd.mean(
      public.AXIS,
      jd.chained(jd.top_k(0.1, block_size=128), jd.quantize(bits=2)),
    ),
    every=2,
    decay=0.95,
  ),
  'muon_inside_and_outside': lambda: jd.diloco(
    optax.contrib.muon(0.3),
    optax.contrib.muon(0.6),
    MEAN,
    every=4,
    fragments=2,
    delay=1,
    mix=0.5,
  ),
}


@pytest.mark.parametrize('name', COMPOSED)
def test_composed_methods_find_the_mean_of_the_workers_minima(name, make_mesh):
  """Least squares whose solution no worker has by itself."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(WORKERS * 16, 16)).astype(np.float32)
  solution = {n: rng.normal(size=(16, 12)).astype(np.float32) for n in 'uv'}
  y = {n: x @ w for n, w in solution.items()}
  loss = lambda p, batch: sum(
    jnp.mean((batch[0] @ p[n] - batch[1][n]) ** 2) for n in 'uv'
  )
  tx = COMPOSED[name]()
  where = {'axis': public.AXIS, 'mesh': make_mesh(WORKERS)}
  state = jd.init(tx, {n: jnp.zeros((16, 12)) for n in 'uv'}, **where)
  step = jd.train_step(loss, tx, **where)
  batch = (x, y)
  start = loss(jd.mean_params(state), batch)
  for _ in range(60):
    state, _ = step(state, batch)
  assert loss(jd.mean_params(state), batch) < 0.1 * start


def test_labels_of_the_whole_tree_fit_each_fragment():
  """Also where a fragment has no leaf of a label."""
  labels = {'a': 'matrix', 'b': 'rest', 'c': 'rest'}
  communicator = jd.partition({'matrix': MEAN, 'rest': MEAN}, labels)
  make = lambda communicator: jd.diloco(
    optax.sgd(0.1),
    NESTEROV,
    communicator,
    every=4,
    fragments=2,
    pattern={'a': 0, 'b': 1, 'c': 1},
  )
  assert_close(walk(make(communicator), 5), walk(make(MEAN), 5), **CLOSE)
