"""Optax's own wrappers, around and inside."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import public
import pytest
from jax.sharding import AxisType

import jaxdist as jd

WORKERS = 4
MEAN = jd.mean(public.AXIS, jd.top_k(0.1, block_size=128))
DENSE = jd.mean(public.AXIS)


def loss(params, x):
  hidden = x @ params['w'] + params['b']
  return jnp.mean(hidden**2)


def make_params():
  rng = np.random.default_rng(0)
  return {
    'w': jnp.asarray(rng.normal(size=(24, 20)), jnp.float32),
    'b': jnp.ones(20),
  }


def batches(steps):
  """The same batch each time: its loss must fall."""
  rng = np.random.default_rng(1)
  batch = rng.normal(size=(1, 2 * WORKERS, 24)).astype(np.float32)
  return np.repeat(batch, steps, axis=0)


def train(tx, make_mesh, steps=4):
  where = {'axis': public.AXIS, 'mesh': make_mesh(WORKERS)}
  state = jd.init(tx, make_params(), **where)
  step = jd.train_step(loss, tx, **where)
  losses = []
  for batch in batches(steps):
    state, metrics = step(state, batch)
    losses.append(float(jnp.mean(metrics['loss'])))
  assert step._cache_size() == 1
  return state, losses


def matrices(params):
  return jax.tree.map(lambda x: x.ndim > 1, params)


WRAPPED = {
  'inject_hyperparams_after': lambda: optax.chain(
    jd.error_feedback(MEAN), optax.inject_hyperparams(optax.adam)(0.01)
  ),
  'inject_hyperparams_inside_local_sgd': lambda: jd.local_sgd(
    optax.inject_hyperparams(optax.sgd)(0.01), MEAN, every=2
  ),
  'inject_hyperparams_around': lambda: optax.inject_hyperparams(
    lambda lr: optax.chain(jd.error_feedback(MEAN), optax.sgd(lr))
  )(0.01),
  'inject_hyperparams_of_feedback': lambda: optax.inject_hyperparams(
    lambda decay: optax.chain(
      jd.error_feedback(MEAN, decay=decay), optax.adam(0.01)
    )
  )(0.9),
  'inject_hyperparams_of_gossip': lambda: optax.inject_hyperparams(
    lambda mixing: jd.local_sgd(
      optax.adam(0.01), jd.gossip(public.AXIS, mixing=mixing), every=2
    )
  )(0.5),
  'schedule': lambda: jd.local_sgd(
    optax.sgd(optax.linear_schedule(0.1, 0.01, 4)), MEAN, every=2
  ),
  'masked': lambda: optax.chain(
    optax.masked(jd.error_feedback(MEAN), matrices),
    optax.masked(
      jd.communicate(DENSE),
      lambda tree: jax.tree.map(lambda x: not x, matrices(tree)),
    ),
    optax.adam(0.01),
  ),
  'optax_partition': lambda: optax.partition(
    {
      True: optax.chain(jd.error_feedback(MEAN), optax.adam(0.01)),
      False: optax.chain(jd.communicate(DENSE), optax.sgd(0.01)),
    },
    matrices,
  ),
  'multi_steps_inside': lambda: jd.local_sgd(
    optax.MultiSteps(optax.adam(0.01), 2).gradient_transformation(),
    MEAN,
    every=2,
  ),
  'multi_steps_behind': lambda: optax.chain(
    jd.error_feedback(MEAN),
    optax.MultiSteps(optax.adam(0.01), 2).gradient_transformation(),
  ),
  'multi_steps_around_local_sgd': lambda: optax.MultiSteps(
    jd.local_sgd(optax.adam(0.01), MEAN, every=2), 2
  ).gradient_transformation(),
  'apply_if_finite_behind': lambda: optax.chain(
    jd.error_feedback(MEAN), optax.apply_if_finite(optax.adam(0.01), 3)
  ),
  'clip_before_and_after': lambda: optax.chain(
    optax.clip_by_global_norm(1.0),
    jd.error_feedback(MEAN),
    optax.clip_by_global_norm(1.0),
    optax.adamw(0.01),
  ),
  'ema_after': lambda: optax.chain(
    jd.error_feedback(MEAN), optax.ema(0.9), optax.sgd(0.1)
  ),
}


@pytest.mark.parametrize('name', WRAPPED)
def test_optax_wrapper_keeps_working(name, make_mesh):
  state, losses = train(WRAPPED[name](), make_mesh)
  assert np.isfinite(losses).all()
  assert losses[-1] < losses[0]
  jd.assert_in_sync(state)


@pytest.mark.parametrize('where', ['Auto', 'Explicit', 'workers'])
def test_multi_steps_around_is_a_larger_batch(where, make_mesh):
  """Gradients differ between workers until they are exchanged: so do sums."""
  inner = optax.chain(jd.error_feedback(MEAN), optax.adam(0.01))
  around = optax.MultiSteps(inner, 2).gradient_transformation()
  place = {'axis': public.AXIS}
  if where == 'workers':
    place['workers'] = WORKERS
  else:
    place['mesh'] = make_mesh(WORKERS, axis_type=AxisType[where])

  def train(tx, batches):
    state = jd.init(tx, make_params(), **place)
    step = jd.train_step(loss, tx, **place)
    for batch in batches:
      state, _ = step(state, batch)
    assert step._cache_size() == 1
    return state

  rng = np.random.default_rng(1)
  halves = rng.normal(size=(2, 2, WORKERS, 3, 24)).astype(np.float32)
  got = train(around, halves.reshape(4, WORKERS * 3, 24))
  whole = halves.transpose(0, 2, 1, 3, 4).reshape(2, WORKERS * 6, 24)
  want = train(inner, whole)
  # Means of three and three, or of six: Adam's roots blow a last bit up.
  for pair in (
    (got.params, want.params),
    (got.opt_state.inner_opt_state[0].residual, want.opt_state[0].residual),
  ):
    for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
      np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)
  held = got.opt_state.acc_grads
  assert isinstance(held, jd.PerWorker)
  assert held.value['w'].shape == (WORKERS, 24, 20)


@pytest.mark.parametrize('where', ['mesh', 'workers'])
def test_apply_if_finite_around_is_refused(where, make_mesh):
  tx = optax.chain(
    optax.clip(1.0), optax.apply_if_finite(jd.error_feedback(MEAN), 3)
  )
  place = {'mesh': make_mesh(2)} if where == 'mesh' else {'workers': 2}
  with pytest.raises(ValueError, match='apply_if_finite must not stand around'):
    jd.init(tx, make_params(), axis=public.AXIS, **place)


def test_injected_learning_rate_can_be_changed(make_mesh):
  tx = optax.chain(
    jd.error_feedback(MEAN), optax.inject_hyperparams(optax.sgd)(0.1)
  )
  where = {'axis': public.AXIS, 'mesh': make_mesh(WORKERS)}
  state = jd.init(tx, make_params(), **where)
  state.opt_state[1].hyperparams['learning_rate'] *= 0.0
  before = jax.tree.map(np.asarray, state.params)
  state, _ = jd.train_step(loss, tx, **where)(state, batches(1)[0])
  for key, leaf in before.items():
    np.testing.assert_array_equal(state.params[key], leaf)


@pytest.mark.parametrize(
  'make',
  [
    lambda: jd.error_feedback(MEAN),
    lambda: jd.communicate(DENSE),
    lambda: jd.ef21(MEAN),
    lambda: jd.econtrol(MEAN),
    lambda: jd.dgc(MEAN),
    lambda: jd.local_sgd(optax.sgd(0.1), MEAN, every=2),
    lambda: jd.diloco(optax.sgd(0.1), optax.sgd(1.0), MEAN, every=2),
  ],
)
def test_extra_args_are_accepted(make):
  tx = make()
  params = make_params()

  def update(_):
    grads = jax.tree.map(jnp.ones_like, params)
    return tx.update(grads, tx.init(params), params, value=1.0, step=3)[0]

  jax.jit(jax.vmap(update, axis_name=public.AXIS))(jnp.arange(2))


def test_local_sgd_hands_extra_args_to_the_inner_optimizer():
  inner = optax.contrib.reduce_on_plateau(patience=1)
  tx = jd.local_sgd(optax.chain(optax.sgd(0.1), inner), DENSE, every=2)
  params = make_params()

  def update(value):
    grads = jax.tree.map(jnp.ones_like, params)
    _, state = tx.update(grads, tx.init(params), params, value=value)
    return state.inner.value[1].best_value

  best = jax.jit(jax.vmap(update, axis_name=public.AXIS))(jnp.array([2.0, 5.0]))
  np.testing.assert_array_equal(best, [2.0, 5.0])
