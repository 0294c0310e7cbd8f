"""All that differs between the supported versions of JAX, 0.10 to 0.12."""

from typing import Any

import jax


def varying_axes(x: Any) -> frozenset[str]:
  """Names of the manual axes that an array's type says it varies over.

  Empty outside ``shard_map``, under ``check_vma=False``, and under ``vmap`` and
  ``pmap``, where JAX does not track it.
  """
  aval = jax.typeof(x)
  if hasattr(aval, 'mat'):
    return aval.mat.varying
  return aval.vma
