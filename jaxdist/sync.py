"""Replicas that should be equal, and a check that they are."""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxdist.digest import DIGEST_BYTES, digest
from jaxdist.keys import is_key


class OutOfSyncError(AssertionError):
  """Replicas that should be equal are not."""


def assert_in_sync(tree: Any) -> None:
  """Raises an error if devices hold different copies of the same numbers.

  Parameters are replicated, and every device updates its own copy. A device
  that computes something else once, or a bit that flips, makes training go
  wrong without any error. This compares all copies of each part of each array
  bit by bit: NaNs are equal if their bits are, zeros of different sign are not.
  What the workers keep for themselves (:class:`jaxdist.PerWorker`) has one copy
  along the workers' axis and differs freely; copies along other axes of the
  mesh are compared. Arrays without a second copy, NumPy arrays and Python
  numbers pass.

  Each copy is read into host memory and hashed there: call it every few
  hundred steps, not in each. **On the wire:** between processes, 16 bytes for
  each copy, gathered. All processes must call it, and all raise.

  Args:
    tree: any pytree, such as the state of a training run.

  Raises:
    OutOfSyncError: if copies differ, naming the first such leaf, the devices in
      the minority and the largest difference, or if processes hold trees of
      different leaves.
    ValueError: if called inside ``jit``.

  Examples:
    >>> import jaxdist as jd
    >>> jd.assert_in_sync({'w': jnp.ones(3)})
  """
  copies = _copies(tree)
  digests = np.zeros((len(copies), DIGEST_BYTES), np.uint8)
  for row, copy in enumerate(copies):
    if copy.shard is not None:
      digests[row] = np.frombuffer(digest(_bits(copy.shard)), np.uint8)
  if jax.process_count() > 1:
    digests = _gather(tree, copies, digests)

  by_part = collections.defaultdict(list)
  for copy, row in zip(copies, digests, strict=True):
    by_part[copy.name, copy.index].append((copy, row.tobytes()))
  errors = {}
  for (name, _), part in by_part.items():
    usual = collections.Counter(row for _, row in part).most_common(1)
    usual = usual[0][0]
    same = [copy for copy, row in part if row == usual]
    odd = [copy for copy, row in part if row != usual]
    if odd:
      errors.setdefault(name, _describe(name, same, odd))
  if errors:
    first, *others = errors.values()
    more = f' Other leaves out of sync: {len(others)}.' if others else ''
    raise OutOfSyncError(first + more)


Copy = collections.namedtuple('Copy', 'name index device shard')


def _copies(tree):
  """Every device's copy of each part that more than one device holds."""
  copies = []
  for path, leaf in jax.tree.leaves_with_path(tree):
    name = jax.tree_util.keystr(path)
    if isinstance(leaf, jax.core.Tracer):
      raise ValueError(
        f'assert_in_sync compares what devices hold, so it runs outside jit; '
        f'{name or "the array"} is traced.'
      )
    if not isinstance(leaf, jax.Array):
      continue
    index_of = leaf.sharding.devices_indices_map(leaf.shape)
    index_of = {
      device: tuple(map(slice.indices, index, leaf.shape))
      for device, index in index_of.items()
    }
    count = collections.Counter(index_of.values())
    shards = {shard.device: shard.data for shard in leaf.addressable_shards}
    for device in sorted(index_of, key=lambda device: device.id):
      if count[index_of[device]] > 1:
        shard = shards.get(device)
        copies.append(Copy(name, index_of[device], device, shard))
  return copies


def _gather(tree, copies, digests):
  """Each copy's digest, from the process that holds it."""
  leaves = [
    (jax.tree_util.keystr(path), jnp.shape(leaf), str(jnp.result_type(leaf)))
    for path, leaf in jax.tree.leaves_with_path(tree)
  ]
  layout = digest(repr((leaves, len(copies))).encode())
  layout = np.frombuffer(layout, np.uint8)
  layouts = multihost_utils.process_allgather(layout)  # the wire
  other = np.flatnonzero((layouts != layouts[0]).any(axis=1))
  if other.size:
    raise OutOfSyncError(
      f'processes {other.tolist()} hold a tree of other leaves than process 0.'
    )
  gathered = multihost_utils.process_allgather(digests)  # the wire
  owners = [copy.device.process_index for copy in copies]
  return gathered[owners, np.arange(len(copies))]


def _describe(name, same, odd):
  devices = ', '.join(str(copy.device) for copy in odd)
  message = (
    f'{name or "the array"} is out of sync: on {devices} it differs from '
    f'{same[0].device}'
  )
  local = [copy for copy in same if copy.shard is not None]
  differences = [
    _difference(_bits(local[0].shard), _bits(copy.shard))
    for copy in odd
    if copy.shard is not None and local
  ]
  if not differences:
    return f'{message}; the two are on other processes.'
  count, largest = max(differences, key=lambda pair: pair[0])
  size = local[0].shard.size
  return f'{message} in {count} of {size} elements, by at most {largest:.3g}.'


def _bits(shard):
  """A device's copy as a flat NumPy array."""
  if is_key(shard):
    shard = jax.random.key_data(shard)
  return np.ravel(shard)


def _difference(one, other):
  """How many elements differ in any bit, and by how much at most."""
  differ = one.view(np.uint8) != other.view(np.uint8)
  differ = differ.reshape(one.size, one.itemsize).any(axis=1)
  wide = complex if jnp.issubdtype(one.dtype, jnp.complexfloating) else float
  with np.errstate(invalid='ignore'):
    gaps = abs(one[differ].astype(wide) - other[differ].astype(wide))
  # NaN only if no pair has a difference: a NaN against a number, say.
  return differ.sum(), np.fmax.reduce(gaps)
