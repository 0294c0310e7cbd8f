"""What the kernels for TPUs share."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from jaxdist import compat
from jaxdist.kernels.tiles import Tiles

LANES = 128  # Numbers in a row of a vector register.
SUBLANES = 8  # Rows of a vector register of 32-bit numbers.


def result(
  shape: Sequence[int], dtype: Any, *arrays: Any
) -> jax.ShapeDtypeStruct:
  """What a kernel returns that is computed from ``arrays``.

  In a manual region the type also says over which axes the result varies.
  """
  axes = frozenset().union(*map(compat.varying_axes, jax.tree.leaves(arrays)))
  varies = jax.sharding.ManualAxisType(varying=axes)
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varies)


def cost(reads: Any, writes: Any) -> pl.CostEstimate:
  """What the compiler's scheduler is told of a kernel: its bytes."""
  arrays = jax.tree.leaves((reads, writes))
  num_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
  return pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=num_bytes)


def cannot_partition() -> str | None:
  """What a kernel would need of the region that it is called in, or ``None``.

  The partitioner does not cut kernels up: of a mesh all axes must be manual.
  """
  mesh = jax.sharding.get_abstract_mesh()
  sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
  left = [
    name
    for name, size in sizes.items()
    if size > 1 and name not in mesh.manual_axes
  ]
  return f'a region that is manual over {left} too' if left else None


def transposed_columns(x: Array) -> Array:
  """Columns ``(128, 1)``, repeated along lanes, as rows ``(1, 128)``."""
  return x.T[:1]


def transposed_rows(x: Array) -> Array:
  """Rows ``(1, 128)`` as columns, repeated along lanes: ``(128, 128)``."""
  return jnp.broadcast_to(x, (LANES, LANES)).T


def spread(x: Array, width: int) -> Array:
  """Combines by ``or`` the groups of ``width`` lanes; all get the result."""
  shift = LANES // 2
  while shift >= width:
    x = x | pltpu.roll(x, shift, 1)
    shift //= 2
  return x


def lane_group(shape: tuple[int, int], width: int) -> Array:
  """Which group of ``width`` lanes each lane is in."""
  lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
  return lane >> int(math.log2(width))


def device_kind() -> str:
  """What JAX calls the chip: that of the mesh in a manual region, else ours.

  Empty if that is none of a TPU: the program may then be for any.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is None and jax.default_backend() == 'tpu':
    device = jax.devices()[0]
  kind = getattr(device, 'device_kind', '')
  return kind if kind.startswith('TPU') else ''


def gathers_sublanes() -> bool:
  """Whether the chip can gather along sublanes; all since v5 can."""
  return not device_kind().startswith(('TPU v2', 'TPU v3', 'TPU v4'))


def rows_of(numbers: int, size: int) -> int:
  """How many rows of a size so many numbers are: a power of two."""
  return 2 ** (max(1, numbers // size).bit_length() - 1)


def step_rows(tiles: Tiles, rows: int, size: int, least: int = LANES) -> int:
  """Rows of a grid step: of narrow results as many as there are lanes."""
  enough = 2 ** (rows - 1).bit_length()
  return max(least, min(enough, rows_of(tiles.step, size)))
