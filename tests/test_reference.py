"""The transforms against a loop over workers in plain NumPy.

Nothing here is shared with the library: the codes, the blocks, the exchange and
the feedback are written again, one worker and one block at a time.
"""

import jax
import numpy as np
import optax
import public
import pytest

import jaxdist as jd

WORKERS, STEPS, BLOCK = 5, 4, 128
# Sums in another order, over at most a few hundred numbers of size one.
CLOSE = {'rtol': 1e-5, 'atol': 1e-6}


def flat(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def unflat(vector, like):
  leaves, treedef = jax.tree.flatten(like)
  out, start = [], 0
  for leaf in leaves:
    out.append(vector[start : start + leaf.size].reshape(leaf.shape))
    start += leaf.size
  return treedef.unflatten(out)


def blockwise(code):
  return lambda x: np.concatenate([code(row) for row in x.reshape(-1, BLOCK)])


def padded(x, multiple):
  return np.concatenate([x, np.zeros(-len(x) % multiple, x.dtype)])


@blockwise
def top_13(row):
  out = np.zeros_like(row)
  for i in sorted(range(len(row)), key=lambda i: (-abs(row[i]), i))[:13]:
    out[i] = row[i]
  return out


@blockwise
def signs(row):
  return np.where(row >= 0, 1, -1) * np.mean(np.abs(row))


@blockwise
def eight_bits(row):
  top = np.max(np.abs(row))
  return np.round(row * (127 / top)) * (top / 127) if top else row * 0


CODES = {
  'top_k': (jd.top_k(0.1, block_size=BLOCK), top_13),
  'sign': (jd.sign(block_size=BLOCK), signs),
  'quantize': (jd.quantize(bits=8, block_size=BLOCK), eight_bits),
}


class Loop:
  """Error feedback through a mean, for all workers, in NumPy."""

  def __init__(self, code, method, length, decay=1.0):
    self.code, self.method, self.decay = code, method, decay
    self.residual = np.zeros((WORKERS, length), np.float32)
    self.dropped = [0.0] * WORKERS

  def exchange(self, grads):
    length = grads.shape[1]
    target = grads + self.decay * self.residual
    # What fills up the last blocks is coded with them, and then forgotten.
    sent = np.stack([self.code(padded(x, BLOCK * WORKERS)) for x in target])
    self.residual = target - sent[:, :length]
    mean = sent.mean(0)
    if self.method == 'two_shot':
      chunks = np.split(mean, WORKERS)
      for worker, chunk in enumerate(chunks):
        wanted = chunk + self.dropped[worker]
        chunks[worker] = self.code(wanted)
        self.dropped[worker] = wanted - chunks[worker]
      mean = np.concatenate(chunks)
    return mean[:length]


def run_library(tx, gradients):
  """Parameters of (workers, steps, ...)."""
  return public.run(tx, gradients, public.params(), walk=True)[0]


@pytest.mark.parametrize('method', ['gather', 'two_shot'])
@pytest.mark.parametrize('name', CODES)
def test_error_feedback_is_the_loop(name, method):
  compressor, code = CODES[name]
  gradients = public.gradients(WORKERS, STEPS)
  communicator = jd.mean(public.AXIS, compressor, method)
  tx = optax.chain(jd.error_feedback(communicator, decay=0.9), optax.sgd(0.1))
  path = run_library(tx, gradients)

  params = flat(public.params())
  loop = Loop(code, method, len(params), decay=0.9)
  for step in range(STEPS):
    grads = np.stack(
      [
        flat(jax.tree.map(lambda g: g[step, worker], gradients))  # noqa: B023
        for worker in range(WORKERS)
      ]
    )
    params = params - 0.1 * loop.exchange(grads)
    for worker in range(WORKERS):
      got = flat(jax.tree.map(lambda x: x[worker, step], path))  # noqa: B023
      np.testing.assert_allclose(got, params, **CLOSE)


@pytest.mark.parametrize('name', CODES)
def test_local_sgd_is_the_loop(name):
  compressor, code = CODES[name]
  gradients = public.gradients(WORKERS, STEPS)
  tx = jd.local_sgd(
    optax.sgd(0.1, momentum=0.5),
    jd.mean(public.AXIS, compressor, 'two_shot'),
    every=2,
    decay=0.9,
  )
  path = run_library(tx, gradients)

  anchor = flat(public.params())
  workers = np.stack([anchor] * WORKERS)
  momentum = np.zeros_like(workers)
  loop = Loop(code, 'two_shot', len(anchor), decay=0.9)
  for step in range(STEPS):
    for worker in range(WORKERS):
      grad = flat(jax.tree.map(lambda g: g[step, worker], gradients))  # noqa: B023
      momentum[worker] = 0.5 * momentum[worker] + grad
      workers[worker] -= 0.1 * momentum[worker]
    if step % 2:
      anchor = anchor + loop.exchange(workers - anchor)
      workers[:] = anchor
    for worker in range(WORKERS):
      got = flat(jax.tree.map(lambda x: x[worker, step], path))  # noqa: B023
      np.testing.assert_allclose(got, workers[worker], **CLOSE)


def test_diloco_is_the_loop():
  gradients = public.gradients(WORKERS, STEPS)
  tx = jd.diloco(
    optax.sgd(0.1),
    optax.sgd(0.7, momentum=0.9, nesterov=True),
    jd.mean(public.AXIS),
    every=2,
  )
  path = run_library(tx, gradients)

  anchor = flat(public.params())
  workers = np.stack([anchor] * WORKERS)
  trace = np.zeros_like(anchor)
  for step in range(STEPS):
    for worker in range(WORKERS):
      grad = flat(jax.tree.map(lambda g: g[step, worker], gradients))  # noqa: B023
      workers[worker] -= 0.1 * grad
    if step % 2:
      outer_grad = anchor - workers.mean(0)
      trace = 0.9 * trace + outer_grad
      anchor = anchor - 0.7 * (outer_grad + 0.9 * trace)
      workers[:] = anchor
    for worker in range(WORKERS):
      got = flat(jax.tree.map(lambda x: x[worker, step], path))  # noqa: B023
      np.testing.assert_allclose(got, workers[worker], **CLOSE)


def test_power_sgd_is_the_loop():
  rng = np.random.default_rng(3)
  steps = rng.normal(size=(STEPS, WORKERS, 12, 9)).astype(np.float32)
  tx = jd.error_feedback(jd.low_rank_mean(public.AXIS, rank=2))

  def run(grads):
    state, out = tx.init(grads[0]), []
    bases = []
    for step in range(STEPS):
      update, state = tx.update(grads[step], state)
      out.append(update)
      bases.append(state.communicator.bases[0])
    return out, bases

  updates, bases = jax.jit(jax.vmap(run, 1, axis_name=public.AXIS))(steps)

  residual = np.zeros((WORKERS, 12, 9))
  for step in range(1, STEPS):  # The first starts from drawn columns.
    if step == 1:
      first = np.asarray(updates[0][0], np.float64)
      u = np.linalg.svd(first)[0][:, :2]
      residual = steps[0] - np.einsum('ab,cb,wcd->wad', u, u, steps[0])
    target = steps[step] + residual
    p = target.mean(0) @ np.asarray(bases[step - 1][0], np.float64)
    u = np.linalg.svd(p, full_matrices=False)[0]
    sent = np.einsum('ab,cb,wcd->wad', u, u, target)
    residual = target - sent
    # Two float32 orthogonalisations against one in float64.
    np.testing.assert_allclose(
      updates[step][0], sent.mean(0), rtol=1e-4, atol=1e-5
    )


def test_gossip_ring_is_the_mixing_matrix():
  mixing = np.zeros((WORKERS, WORKERS))
  for i in range(WORKERS):
    for j in (i - 1, i, i + 1):
      mixing[i, j % WORKERS] = 1 / 3
  x = np.random.default_rng(4).normal(size=(WORKERS, 200)).astype(np.float32)
  ring = jd.gossip(public.AXIS, 'ring')
  mix = lambda x: ring.exchange(x, ring.init(x))[0]
  got = jax.vmap(mix, axis_name=public.AXIS)(x)
  np.testing.assert_allclose(got, mixing @ x, **CLOSE)


def test_exponential_gossip_averages_exactly_in_log_rounds():
  workers = 8
  x = np.random.default_rng(5).normal(size=(workers, 50)).astype(np.float32)
  graph = jd.gossip(public.AXIS, 'one_peer_exponential')

  def rounds(x):
    state = graph.init(x)
    for _ in range(3):
      x, _, state = graph.exchange(x, state)
    return x

  got = jax.jit(jax.vmap(rounds, axis_name=public.AXIS))(x)
  np.testing.assert_allclose(got, np.tile(x.mean(0), (workers, 1)), **CLOSE)


@pytest.mark.parametrize('topology', ['ring', 'one_peer_exponential'])
def test_compressed_gossip_keeps_the_mean_and_reaches_consensus(topology):
  x = np.random.default_rng(6).normal(size=(WORKERS, 256)).astype(np.float32)
  graph = jd.gossip(
    public.AXIS, topology, jd.top_k(0.2, block_size=128), mixing=0.3
  )

  def rounds(x):
    def one(carry, _):
      x, state = carry
      x, _, state = graph.exchange(x, state)
      return (x, state), None

    return jax.lax.scan(one, (x, graph.init(x)), length=300)[0][0]

  got = np.asarray(jax.jit(jax.vmap(rounds, axis_name=public.AXIS))(x))
  # 300 rounds of float32 additions move the mean by rounding alone.
  np.testing.assert_allclose(got.mean(0), x.mean(0), atol=2e-6)
  assert got.std(0).max() < 1e-3 * x.std(0).max()
