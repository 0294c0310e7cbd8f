"""Checks of factories' arguments; errors name argument, rule and value."""

import numbers
from typing import Any


def check_block_size(block_size: Any) -> int:
  """``block_size`` as an int; raises unless it is a multiple of 128."""
  if isinstance(block_size, bool) or not isinstance(
    block_size, numbers.Integral
  ):
    raise TypeError(f'block_size must be an int, got {block_size!r}.')
  if block_size < 1 or block_size % 128:
    raise ValueError(
      f'block_size must be a positive multiple of 128, got {block_size}.'
    )
  return int(block_size)


def check_density(density: Any) -> float:
  """``density`` as a float; raises unless it is a number in (0, 1]."""
  if isinstance(density, bool) or not isinstance(density, numbers.Real):
    raise TypeError(f'density must be a number, got {density!r}.')
  if not 0 < density <= 1:
    raise ValueError(f'density must be above 0 and at most 1, got {density}.')
  return float(density)


def check_one_of(name: str, value: Any, choices: tuple) -> None:
  """Raises unless ``value`` is one of ``choices``."""
  if value not in choices:
    listed = ' or '.join(map(repr, choices))
    raise ValueError(f'{name} must be {listed}, got {value!r}.')


def check_flag(name: str, value: Any) -> None:
  """Raises unless ``value`` is a bool."""
  if not isinstance(value, bool):
    raise TypeError(f'{name} must be True or False, got {value!r}.')


def call(function: str, *args: Any, **options: Any) -> str:
  """How a code was made: the call, without block sizes that are the default."""
  if options.get('block_size') == 1024:
    del options['block_size']
  listed = [f'{arg}' for arg in args]
  listed += [f'{name}={value!r}' for name, value in options.items()]
  return f'{function}({", ".join(listed)})'
