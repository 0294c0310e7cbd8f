"""The ring in plain JAX: each transfer has a product to hide behind.

Workers pass chunks to both neighbours, so a chunk travels half of the ring at
most, and both directions of a link carry the same. The loop is unrolled: what
is sent in one step does not wait for the product of that step, which lets XLA
open a transfer before a product and close it after.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdist.kernels.collective_matmul.reference import product


def reach(workers: int) -> tuple[int, int]:
  """How far chunks travel to the right, and to the left."""
  return workers // 2, (workers - 1) // 2


def shift(x: Array, axis: str, by: int) -> Array:
  """What the worker ``by`` places to the left has; to the right if below 0."""
  workers = jax.lax.axis_size(axis)
  pairs = [(i, (i + by) % workers) for i in range(workers)]
  return jax.lax.ppermute(x, axis, pairs)


def gathered(x: Array, axis: str) -> Iterator[tuple[Array, Array]]:
  """All workers' ``x``, each with its worker's index, as they arrive.

  The next ones are already on their way when one is given out.
  """
  workers = jax.lax.axis_size(axis)
  me = jax.lax.axis_index(axis)
  right, left = reach(workers)
  from_left = from_right = x
  now = [(me, x)]
  for step in range(1, right + 2):
    coming = []
    if step <= right:
      from_left = shift(from_left, axis, 1)
      coming.append(((me - step) % workers, from_left))
    if step <= left:
      from_right = shift(from_right, axis, -1)
      coming.append(((me + step) % workers, from_right))
    yield from now
    now = coming


def chunk(x: Array, index: Array, workers: int) -> Array:
  """Rows of one worker."""
  rows = x.shape[0] // workers
  return jax.lax.dynamic_slice_in_dim(x, index * rows, rows)


def with_chunk(x: Array, index: Array, rows: Array) -> Array:
  """``x`` with other rows of one worker."""
  start = index * rows.shape[0]
  return jax.lax.dynamic_update_slice_in_dim(x, rows, start, 0)


def scattered(part: Callable[[Array], Array], axis: str) -> Array:
  """The sum over workers of ``part(index)``, for this worker's own index.

  Args:
    part: what this worker adds to the sum of worker ``index``.
    axis: of the workers.
  """
  workers = jax.lax.axis_size(axis)
  me = jax.lax.axis_index(axis)

  def arriving(far, by):
    """The sum of all up to ``far`` places away, of one side."""
    total = part((me + by * far) % workers)
    for distance in range(far - 1, 0, -1):
      own = part((me + by * distance) % workers)  # Does not wait for the rest.
      total = own + shift(total, axis, by)
    return shift(total, axis, by)

  total = part(me)
  for far, by in zip(reach(workers), (1, -1), strict=True):
    if far:
      total += arriving(far, by)
  return total


def all_gather_matmul(
  x: Float[Array, 'rows inner'], w: Float[Array, 'inner cols'], *, axis: str
) -> Float[Array, 'all_rows cols']:
  """All workers' rows times this worker's columns."""
  shape = jax.lax.axis_size(axis) * x.shape[0], w.shape[1]
  result = jnp.zeros(shape, x.dtype)
  for index, one in gathered(x, axis):
    result = with_chunk(result, index, product(one, w).astype(x.dtype))
  return result


def matmul_reduce_scatter(
  x: Float[Array, 'all_rows inner'], w: Float[Array, 'inner cols'], *, axis: str
) -> Float[Array, 'rows cols']:
  """This worker's rows of the sum of all workers' products."""
  workers = jax.lax.axis_size(axis)
  total = scattered(lambda i: product(chunk(x, i, workers), w), axis)
  return total.astype(x.dtype)
