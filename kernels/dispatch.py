"""Chooses the form of an operation that runs: one dispatcher for all ops."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Form:
  """One implementation of an operation.

  Attributes:
    function: takes arrays, then static options by keyword.
    platforms: where it runs, such as ``('tpu',)`` or ``('cuda',)``; ``None``
      means everywhere.
  """

  function: Callable[..., Any]
  platforms: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Op:
  """An operation with named implementations.

  Attributes:
    name: of the operation, for errors.
    forms: implementations by name. ``'xla'``, the definition, is always there
      and runs everywhere.
  """

  name: str
  forms: Mapping[str, Form]

  def __call__(self, *arrays, implementation: str | None = None, **options):
    """Runs the named implementation, or the one for the platform.

    The platform is the one that the program is lowered for, so a program that
    is compiled for an absent TPU gets the TPU's form.

    Args:
      *arrays: arguments that are arrays, or pytrees of them.
      implementation: a name means that implementation or an error.
      **options: static arguments.

    Returns:
      What the implementation returns.

    Raises:
      ValueError: if no implementation has this name.
      NotImplementedError: if the named one does not run on the platform; raised
        by JAX when the program is lowered.
    """
    if implementation not in (None, *self.forms):
      raise ValueError(
        f'implementation of {self.name} must be one of '
        f'{", ".join(map(repr, self.forms))} or None, got {implementation!r}.'
      )
    forms = self.forms.values()
    if implementation is not None:
      forms = [self.forms[implementation]]

    def bound(form):
      return lambda *arrays: form.function(*arrays, **options)

    branches = {
      platform: bound(form)
      for form in forms
      for platform in form.platforms or ['default']
    }
    if list(branches) == ['default']:
      return branches['default'](*arrays)
    return jax.lax.platform_dependent(*arrays, **branches)
