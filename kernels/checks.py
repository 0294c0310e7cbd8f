"""Checks of arguments; errors name the argument, the rule and the value."""

from typing import Any

import jax.numpy as jnp


def check_rows(name: str, x: Any, dtype: Any) -> None:
  """Raises unless ``x`` is a matrix of ``dtype``."""
  if jnp.ndim(x) != 2:
    raise ValueError(
      f'{name} must have 2 dimensions (rows and their numbers), '
      f'got shape {jnp.shape(x)}.'
    )
  if x.dtype != dtype:
    raise ValueError(f'{name} must be {jnp.dtype(dtype)}, got {x.dtype}.')


def check_between(name: str, value: Any, low: int, high: int) -> None:
  """Raises unless ``value`` is an integer in ``low..high``."""
  if not isinstance(value, int) or not low <= value <= high:
    raise ValueError(
      f'{name} must be an integer from {low} to {high}, got {value!r}.'
    )
