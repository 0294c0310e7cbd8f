"""Chooses by platform, and traces only what a program is lowered for."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jaxdist import compat

DEFAULT = 'default'
PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')


def by_platform(forms: Mapping[str, Callable[..., Any]], *arrays: Any) -> Any:
  """Calls the form for the platform that the program is lowered for.

  As :func:`jax.lax.platform_dependent`, but of other platforms' forms only the
  default is traced, for its types: kernels are long, and most programs are for
  one platform.

  Args:
    forms: functions under :func:`jax.jit` by platform, and for any other under
      ``'default'``. All return arrays of the same shapes and types; what they
      are, the default tells, or the first. Equal forms are traced once for
      equal shapes.
    *arrays: what they take: arrays, or pytrees of them.

  Returns:
    What the form returns.

  Raises:
    NotImplementedError: when the program is lowered for a platform without a
      form.
  """
  leaves, treedef = jax.tree.flatten(arrays)
  flat = tuple((name, _flat(form, treedef)) for name, form in forms.items())
  results = jax.tree.structure(_any(forms).trace(*arrays).out_info)
  return results.unflatten(_bind(flat)(*leaves))


def _any(forms):
  """The one that tells what all return."""
  return forms.get(DEFAULT, next(iter(forms.values())))


@functools.lru_cache(maxsize=1024)
def _flat(form, treedef):
  return jax.jit(
    lambda *leaves: jax.tree.leaves(form(*treedef.unflatten(leaves)))
  )


@functools.lru_cache(maxsize=1024)
def _batched(form, axes):
  return jax.jit(jax.vmap(form, axes))


@functools.lru_cache(maxsize=1024)
def _bind(forms):
  def bind(*arrays):
    out = _any(dict(forms)).trace(*arrays).jaxpr.out_avals
    return call_p.bind(*arrays, forms=forms, out=tuple(out))

  return jax.jit(bind)


def _batch(arrays, axes, *, forms, out):
  forms = tuple((name, _batched(form, tuple(axes))) for name, form in forms)
  return _bind(forms)(*arrays), len(out) * (0,)


def _lower(context, *arrays, platform, forms, out):
  del out
  form = dict(forms).get(platform, dict(forms).get(DEFAULT))
  if form is None:
    names = ', '.join(name for name, _ in forms)
    lowered_for = platform or 'another platform'
    raise NotImplementedError(
      f'This form is for {names} alone; the program is lowered for '
      f'{lowered_for}.'
    )
  return mlir.lower_fun(form, multiple_results=True)(context, *arrays)


call_p = Primitive('kernel')
call_p.multiple_results = True
call_p.def_abstract_eval(lambda *arrays, forms, out: out)
call_p.def_impl(functools.partial(compat.apply_primitive, call_p))
batching.primitive_batchers[call_p] = _batch
for _platform in (*PLATFORMS, None):  # None: all others.
  mlir.register_lowering(
    call_p, functools.partial(_lower, platform=_platform), platform=_platform
  )
