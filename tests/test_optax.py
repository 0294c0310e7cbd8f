"""Optax's own wrappers, around and inside."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import public
import pytest

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
