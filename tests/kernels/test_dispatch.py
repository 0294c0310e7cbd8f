"""The dispatcher, with an op made for the purpose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdist.kernels.checks import check_between, check_rows
from jaxdist.kernels.dispatch import Form, Op

scale = Op(
  'scale',
  {
    'xla': Form(lambda x, by: x * by),
    'elsewhere': Form(lambda x, by: x * by + 1, ('tpu',)),
    'here': Form(
      lambda x, by: x * by + 2,
      ('cpu',),
      lambda x, by: 'one dimension' if x.ndim > 1 else None,
    ),
  },
)


def test_the_platform_chooses():
  np.testing.assert_array_equal(scale(jnp.ones(3), by=2), 4 * np.ones(3))
  np.testing.assert_array_equal(
    jax.jit(jax.vmap(lambda x: scale(x, by=2)))(jnp.ones(3)), 4 * np.ones(3)
  )


def test_the_platform_lowered_for_chooses():
  lowered = jax.export.export(
    jax.jit(lambda x: scale(x, by=2.0)), platforms=['tpu']
  )(jnp.ones(3))
  assert '1.000000e+00' in lowered.mlir_module()
  with pytest.raises(NotImplementedError, match='tpu'):
    jax.export.export(
      jax.jit(lambda x: scale(x, by=2.0, implementation='here')),
      platforms=['tpu'],
    )(jnp.ones(3))


def test_only_the_platforms_form_is_traced():
  traced = []

  def form(name, add):
    def function(x, by):
      traced.append(name)
      return x['of'] * by + add, {'also': x['of'].sum()}

    return function

  op = Op(
    'op',
    {
      'xla': Form(form('xla', 0)),
      'cpu': Form(form('cpu', 1), ('cpu',)),
      'tpu': Form(form('tpu', 2), ('tpu',)),
    },
  )
  xs = jnp.arange(6.0).reshape(2, 3)
  ones = jax.jit(jax.vmap(lambda x: op({'of': x}, by=2), 1))(xs)
  np.testing.assert_array_equal(ones[0], 2 * xs.T + 1)
  np.testing.assert_array_equal(ones[1]['also'], xs.sum(0))
  assert set(traced) == {'xla', 'cpu'}
  both = jax.jit(lambda x: op({'of': x}, by=2))
  exported = jax.export.export(both, platforms=['cpu', 'tpu'])(xs)
  np.testing.assert_array_equal(exported.call(xs)[0], 2 * xs + 1)
  assert set(traced) == {'xla', 'cpu', 'tpu'}


def test_other_platforms_get_the_definition():
  exported = jax.export.export(
    jax.jit(lambda x: scale(x, by=3.0)), platforms=['neuron']
  )(jnp.ones(3))
  assert '3.000000e+00' in exported.mlir_module()
  assert 'add' not in exported.mlir_module()


def test_without_jit():
  with jax.disable_jit():
    np.testing.assert_array_equal(scale(jnp.ones(3), by=2), 4 * np.ones(3))


@pytest.mark.parametrize(('name', 'result'), [('xla', 2), ('here', 4)])
def test_a_name_means_that_one(name, result):
  y = jax.jit(lambda x: scale(x, by=2, implementation=name))(jnp.ones(()))
  assert y == result


def test_a_name_means_that_one_or_an_error():
  with pytest.raises(NotImplementedError, match='cpu'):
    scale(jnp.ones(3), by=2, implementation='elsewhere')


def test_a_form_that_cannot_take_the_arguments():
  x = jnp.ones((3, 1))
  np.testing.assert_array_equal(scale(x, by=2), 2 * x)
  rule = "implementation 'here' of scale needs one dimension."
  with pytest.raises(NotImplementedError, match=rule):
    scale(x, by=2, implementation='here')


def test_there_are_no_gradients():
  with pytest.raises(NotImplementedError, match='scale has no gradient'):
    jax.grad(lambda x: scale(x, by=2).sum())(jnp.ones(3))


def test_unknown_names_are_listed():
  rule = r"of scale must be one of 'xla', 'elsewhere', 'here' or None, got 'x'"
  with pytest.raises(ValueError, match=rule):
    scale(jnp.ones(3), by=2, implementation='x')


def test_checks_name_argument_rule_and_value():
  with pytest.raises(ValueError, match=r'x must have 2 dim.*got shape \(3,\)'):
    check_rows('x', jnp.ones(3), jnp.float32)
  with pytest.raises(ValueError, match='x must be float32, got int32'):
    check_rows('x', jnp.ones((3, 1), jnp.int32), jnp.float32)
  with pytest.raises(ValueError, match=r'k must be an integer from 1 to 4.*5'):
    check_between('k', 5, 1, 4)
