"""Chooses the form of an operation that runs: one dispatcher for all ops."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxdist.kernels.platforms import DEFAULT, by_platform


@dataclasses.dataclass(frozen=True)
class Form:
  """One implementation of an operation.

  Attributes:
    function: takes arrays, then static options by keyword.
    platforms: where it runs, such as ``('tpu',)`` or ``('cuda',)``; ``None``
      means everywhere.
    unsupported: takes what ``function`` takes and says what it would need
      instead, or ``None`` if it takes these; without it, it takes everything.
    automatic: whether it may be chosen where none is named. A form that never
      ran on its hardware may not.
  """

  function: Callable[..., Any]
  platforms: tuple[str, ...] | None = None
  unsupported: Callable[..., str | None] | None = None
  automatic: bool = True


@dataclasses.dataclass(frozen=True)
class Op:
  """An operation with named implementations.

  Attributes:
    name: of the operation, for errors.
    forms: implementations by name. ``'xla'``, the definition, is always there
      and runs everywhere. Of two for the same platform, the later one is
      chosen where it can be.
  """

  name: str
  forms: Mapping[str, Form]

  def __call__(self, *arrays, implementation: str | None = None, **options):
    """Runs the named implementation, or the one for the platform.

    The platform is the one that the program is lowered for, so a program that
    is compiled for an absent TPU gets the TPU's form, if that takes these
    arrays and options.

    Args:
      *arrays: arguments that are arrays, or pytrees of them.
      implementation: a name means that implementation or an error.
      **options: static arguments.

    Returns:
      What the implementation returns.

    Raises:
      ValueError: if no implementation has this name.
      NotImplementedError: if the named one does not take these arguments, or
        does not run on the platform (raised when the program is lowered), or
        if a gradient is asked for.
    """
    if implementation not in (None, *self.forms):
      raise ValueError(
        f'implementation of {self.name} must be one of '
        f'{", ".join(map(repr, self.forms))} or None, got {implementation!r}.'
      )
    forms = [form for form in self.forms.values() if form.automatic]
    if implementation is not None:
      forms = [self.forms[implementation]]
      needs = _unsupported(forms[0], arrays, options)
      if needs is not None:
        raise NotImplementedError(
          f'implementation {implementation!r} of {self.name} needs {needs}.'
        )

    static = tuple(sorted(options.items()))
    branches = {
      platform: _bound(form.function, static)
      for form in forms
      if _unsupported(form, arrays, options) is None
      for platform in form.platforms or [DEFAULT]
    }

    @jax.custom_jvp
    def run(*arrays):
      if list(branches) == [DEFAULT]:
        return branches[DEFAULT](*arrays)
      return by_platform(branches, *arrays)

    @run.defjvp
    def refuse(primals, tangents):
      del primals, tangents
      raise NotImplementedError(
        f'{self.name} has no gradient. Differentiate before it, or wrap it in '
        f'jax.lax.stop_gradient.'
      )

    return run(*arrays)


@functools.lru_cache(maxsize=1024)
def _bound(function, options):
  """Under jit, so that equal shapes are traced and batched once."""
  return jax.jit(functools.partial(function, **dict(options)))


def _unsupported(form, arrays, options):
  if form.unsupported is None:
    return None
  return form.unsupported(*arrays, **options)
