"""Typed PRNG keys: what tells them from other arrays."""

from typing import Any

import jax
import jax.numpy as jnp


def is_key(x: Any) -> bool:
  """Whether an array, or what stands for one, is of typed PRNG keys."""
  dtype = getattr(x, 'dtype', None)
  return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def key_impl(like: Any) -> str:
  """The implementation of keys, such as ``'threefry2x32'``."""
  # Only arrays and tracers tell their implementation, abstract values don't.
  impls = []
  jax.eval_shape(lambda key: impls.append(jax.random.key_impl(key)), like)
  return impls[0]
