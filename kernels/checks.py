"""Checks of arguments; errors name the argument, the rule and the value."""

from typing import Any

import jax.numpy as jnp

_RANKS = {
  2: '2 dimensions (rows and their numbers)',
  3: '3 dimensions (workers, rows and their numbers)',
}


def check_rows(name: str, x: Any, dtype: Any, ndim: int = 2) -> None:
  """Raises unless ``x`` is a matrix, or a stack of them, of ``dtype``."""
  if jnp.ndim(x) != ndim:
    raise ValueError(
      f'{name} must have {_RANKS[ndim]}, got shape {jnp.shape(x)}.'
    )
  if x.dtype != dtype:
    raise ValueError(f'{name} must be {jnp.dtype(dtype)}, got {x.dtype}.')


def check_shape(name: str, x: Any, shape: tuple[int, ...]) -> None:
  """Raises unless ``x`` has this shape."""
  if x.shape != tuple(shape):
    raise ValueError(f'{name} must have shape {shape}, got {x.shape}.')


def check_between(name: str, value: Any, low: int, high: int) -> None:
  """Raises unless ``value`` is an integer in ``low..high``."""
  if not isinstance(value, int) or not low <= value <= high:
    raise ValueError(
      f'{name} must be an integer from {low} to {high}, got {value!r}.'
    )
