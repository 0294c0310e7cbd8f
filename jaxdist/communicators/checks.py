"""Checks of factories' arguments; errors name argument, rule and value."""

import numbers
import operator
from typing import Any

import jax
import jax.numpy as jnp

from jaxdist.compressors.base import Compressor


def check_axis(axis: Any) -> None:
  """Raises unless ``axis`` can be the name of an axis."""
  if not isinstance(axis, str) or not axis:
    raise ValueError(f'axis must be the name of an axis, got {axis!r}.')


def check_compressor(compressor: Any) -> None:
  """Raises unless ``compressor`` is one, or None."""
  if compressor is not None and not isinstance(compressor, Compressor):
    raise ValueError(f'compressor must be a jd.Compressor, got {compressor!r}.')


def integer(name: str, value: Any, least: int, end: int | None = None) -> int:
  """An argument as an int.

  Args:
    name: of the argument.
    value: what was given: any kind of integer but a bool.
    least: the smallest value that is allowed.
    end: the first value behind it that is not; ``None``: there is none.

  Returns:
    The value.

  Raises:
    ValueError: if it is something else.
  """
  try:
    number = None if isinstance(value, bool) else operator.index(value)
  except TypeError:
    number = None
  if number is None or number < least or (end is not None and number >= end):
    rule = f'of at least {least}' if end is None else f'in [{least}, {end})'
    raise ValueError(f'{name} must be an integer {rule}, got {value!r}.')
  return number


def seed(value: Any) -> int:
  """A seed; ``jax.random.key`` drops the bits above 32."""
  return integer('seed', value, 0, 2**32)


def check_fraction(name: str, value: Any) -> None:
  """Raises unless a value is a number in (0, 1]; lets tracers through."""
  if isinstance(value, jax.core.Tracer):
    return
  is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if isinstance(value, jax.Array):  # Of optax.inject_hyperparams.
    is_number = value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.floating)
  if not is_number or not 0 < value <= 1:
    raise ValueError(f'{name} must be in (0, 1], got {value!r}.')


def check_contracts(what: str, code: Any, instead: str) -> None:
  """Raises if what is remembered of a code's error could grow without bound.

  Args:
    what: remembers it.
    code: a compressor, or a communicator that has some.
    instead: what to do.

  Raises:
    ValueError: if the code does not contract.
  """
  if code.contraction < 0:
    raise ValueError(
      f'{what} needs a code that contracts, |x - D(E(x))|^2 <= |x|^2; {code!r} '
      f'can be as bad as {1 - code.contraction:.3g} |x|^2, and what it drops '
      f'would grow without bound. {instead}'
    )
