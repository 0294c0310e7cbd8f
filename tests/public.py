"""Every public communicator and transform, for contracts over all of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxdist as jd

AXIS = 'data'


def is_matrix(tree):
  return jax.tree.map(lambda x: 'matrix' if x.ndim > 1 else 'rest', tree)


SMALL_TOP_K = jd.top_k(0.1, block_size=128)

COMMUNICATORS = {
  'mean': jd.mean(AXIS),
  'mean_psum_random_k': jd.mean(
    AXIS, jd.random_k(0.25, block_size=128), method='psum'
  ),
  'mean_gather_top_k': jd.mean(AXIS, SMALL_TOP_K, method='gather'),
  'mean_two_shot_top_k': jd.mean(AXIS, SMALL_TOP_K, method='two_shot'),
  'mean_auto_sign': jd.mean(AXIS, jd.sign(block_size=128)),
  'mean_two_shot_sign': jd.mean(
    AXIS, jd.sign(block_size=128), method='two_shot'
  ),
  'mean_two_shot_quantize_buckets': jd.mean(
    AXIS, jd.quantize(bits=4, block_size=128), 'two_shot', bucket_bytes=2048
  ),
  'mean_gather_natural': jd.mean(
    AXIS, jd.natural(block_size=128), method='gather'
  ),
  'mean_two_shot_rotated': jd.mean(
    AXIS, jd.rotated(jd.quantize(bits=8, block_size=128)), method='two_shot'
  ),
  'mean_delayed': jd.mean(AXIS, delay=1),
  'mean_delayed_two_shot_sign': jd.mean(
    AXIS, jd.sign(block_size=128), method='two_shot', delay=1
  ),
  'mean_global_top_k': jd.mean(AXIS, jd.global_top_k(0.1)),
  'low_rank_mean': jd.low_rank_mean(AXIS, rank=2),
  'partition': jd.partition(
    {
      'matrix': jd.mean(AXIS, SMALL_TOP_K),
      'rest': jd.mean(AXIS),
    },
    is_matrix,
  ),
  'per_leaf': jd.per_leaf(
    {
      1: jd.mean(AXIS, jd.sign(block_size=128), 'two_shot'),
      8: jd.mean(AXIS, jd.quantize(bits=8, block_size=128), 'two_shot'),
    },
    lambda tree: jax.tree.map(lambda x: 1 if x.ndim > 1 else 8, tree),
  ),
  'staged': jd.staged(
    [
      jd.mean(AXIS, jd.top_k(0.5, block_size=128), 'two_shot'),
      jd.mean(AXIS, SMALL_TOP_K, 'two_shot'),
    ],
    [1],
  ),
  'gossip_ring': jd.gossip(AXIS, 'ring'),
  'gossip_exponential': jd.gossip(AXIS, 'one_peer_exponential'),
  'gossip_random_pairs': jd.gossip(AXIS, 'random_pairs'),
  'gossip_ring_sign': jd.gossip(
    AXIS, 'ring', jd.sign(block_size=128), mixing=0.5
  ),
  'gossip_exponential_quantize': jd.gossip(
    AXIS, 'one_peer_exponential', jd.quantize(bits=8, block_size=128)
  ),
}


def transforms():
  """A table of optimizers, one for each way in which the library is used."""
  adam = optax.adam(1e-2)
  table = {
    f'error_feedback_{name}': optax.chain(jd.error_feedback(c), adam)
    for name, c in COMMUNICATORS.items()
    if c.agrees
  }
  table |= {
    f'local_sgd_{name}': jd.local_sgd(adam, c, every=2)
    for name, c in COMMUNICATORS.items()
    if not c.agrees or name == 'mean_two_shot_top_k'
  }
  # Pairs are mixed by noloco too.
  table['noloco'] = jd.noloco(
    adam, 2, pairing=COMMUNICATORS['gossip_random_pairs'], consensus=0.5
  )
  del table['local_sgd_gossip_random_pairs']
  table['communicate'] = optax.chain(
    jd.communicate(COMMUNICATORS['mean']), adam
  )
  table['per_worker'] = optax.chain(
    jd.per_worker(optax.ema(0.9)),
    jd.error_feedback(COMMUNICATORS['mean_gather_top_k']),
    optax.sgd(0.1),
  )
  table['worker_noise'] = optax.chain(
    jd.worker_noise(AXIS, 0.1),
    jd.communicate(jd.mean(AXIS, jd.sketch(0.25, block_size=128))),
    optax.sgd(0.1),
  )
  table['ef21'] = optax.chain(
    jd.ef21(COMMUNICATORS['mean_two_shot_top_k']), optax.sgd(0.1)
  )
  table['econtrol'] = optax.chain(
    jd.econtrol(COMMUNICATORS['partition']), optax.sgd(0.1)
  )
  table['dgc'] = optax.chain(
    jd.dgc(
      jd.staged([jd.mean(AXIS), COMMUNICATORS['mean_gather_top_k']], [1]),
      max_norm=1.0,
    ),
    optax.sgd(0.1),
  )
  # MASHA1 is the same without feedback.
  table['masha2'] = jd.masha2(
    0.1, COMMUNICATORS['mean_two_shot_top_k'], keep=0.5
  )
  for make in (jd.one_bit_adam, jd.one_bit_lamb, jd.zero_one_adam):
    options = {'max_local': 2} if make is jd.zero_one_adam else {}
    table[make.__name__] = make(
      1e-2, COMMUNICATORS['mean_two_shot_sign'], 2, **options
    )
  table['diloco'] = jd.diloco(
    adam,
    optax.sgd(0.7, momentum=0.9, nesterov=True),
    COMMUNICATORS['mean_two_shot_quantize_buckets'],
    every=2,
    decay=0.9,
  )
  table['streaming_diloco'] = jd.diloco(
    adam,
    optax.sgd(0.7, momentum=0.9, nesterov=True),
    COMMUNICATORS['mean_two_shot_quantize_buckets'],
    every=4,
    fragments=2,
    delay=1,
    mix=0.5,
  )
  table['co2'] = jd.co2(
    adam, COMMUNICATORS['mean_two_shot_top_k'], every=2, clip=0.05
  )
  table['fedavg'] = jd.fedavg(
    adam,
    optax.yogi(0.1),
    COMMUNICATORS['mean_two_shot_top_k'],
    every=2,
    participation=0.5,
    weights=[1.0, 2.0, 3.0, 4.0],
  )
  # SCALLION is the same rounds without momentum.
  table['scafcom'] = jd.scafcom(
    0.1, COMMUNICATORS['mean_two_shot_top_k'], every=2, participation=0.5
  )
  return table


TRANSFORMS = transforms()


def params(dtype=jnp.float32):
  """Uneven sizes, a scalar and an empty leaf."""
  rng = np.random.default_rng(0)
  shapes = {'w': (24, 20), 'v': (7, 5, 11), 'b': (20,), 's': (), 'e': (0, 3)}
  return {
    name: jnp.asarray(rng.normal(size=shape), dtype)
    for name, shape in shapes.items()
  }


def gradients(workers, steps, dtype=np.float32):
  """Different on each worker and step: leaves of (steps, workers, ...)."""
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda x: rng.normal(size=(steps, workers, *x.shape)).astype(dtype),
    params(),
  )


@functools.lru_cache(maxsize=8)
def _compiled(tx, walk):
  """``tx`` over all workers, simulated: its init, and one step."""

  def step(grads, state, params):
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates) if walk else params
    return params if walk else updates, state, params

  everyone = functools.partial(jax.vmap, axis_name=AXIS)
  init = everyone(lambda params, _: tx.init(params), in_axes=(None, 0))
  return jax.jit(init), jax.jit(everyone(step))


def run(tx, gradients, params, walk=False):
  """All steps of all workers, simulated; compiled once for each ``tx``.

  Args:
    tx: the transform.
    gradients: leaves of (steps, workers, ...).
    params: where to start.
    walk: whether to follow the updates; else params stay.

  Returns:
    Updates or params after each step, (workers, steps, ...), and the state.
  """
  init, step = _compiled(tx, walk)
  steps, workers = jax.tree.leaves(gradients)[0].shape[:2]
  state = init(params, np.zeros(workers))
  params = jax.tree.map(lambda p: np.stack([p] * workers), params)
  path = []
  for index in range(steps):
    grads = jax.tree.map(lambda g, i=index: g[i], gradients)
    out, state, params = step(grads, state, params)
    path.append(out)
  return jax.tree.map(lambda *each: np.stack(each, axis=1), *path), state
