"""Reads a state and checks every shard of it."""

import contextlib
import gc
import math
import operator
import os
import warnings
from typing import Any, SupportsIndex

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from jaxdist.checkpoint import integrity
from jaxdist.checkpoint.layout import (
  ARRAYS,
  UNREADABLE,
  CorruptCheckpointError,
  absolute,
  check_there,
  context,
  listed,
  raise_if_refused,
  read_record,
  without_pages,
)
from jaxdist.keys import is_key, key_impl
from jaxdist.resize import (
  LeafSpec,
  check_leaves,
  named_leaves,
  placed,
  resized,
  sharding_of,
)

# How many bytes of saved values to hold in host memory while resizing, unless
# one leaf is larger.
_RESIZE_BATCH_BYTES = 2**28


class CorruptCheckpointWarning(UserWarning):
  """A damaged checkpoint was set aside, and an older one restored."""


def restore(
  directory: str | os.PathLike,
  like: Any,
  *,
  step: SupportsIndex | None = None,
  reset_residuals: bool = False,
) -> Any:
  """Reads a state, bit for bit, and places it as it is asked for.

  Where ``like`` is of another number of workers than the checkpoint, per-worker
  leaves become what their ``resize`` says; see :func:`jaxdist.resize`. These
  leaves, and only these, pass through host memory whole, a few at a time. In a
  run of several processes all of them must call it; which checkpoints there
  are, the first of them says.

  All that is read is compared with the digests in the checkpoint: a bit that
  flipped in a file, or a file that was cut off or removed, is found. Where no
  step is named, the newest checkpoint that is whole is restored; newer ones are
  set aside with a warning each, as ``STEP.damaged``, so that
  :func:`latest_step` gives the step that was restored.

  Args:
    directory: what was given to :func:`save`.
    like: the state to restore, of arrays or ``jax.ShapeDtypeStruct``: gives
      structure, shapes, dtypes and shardings. Without a sharding, a leaf comes
      uncommitted on the default device.
    step: which checkpoint; ``None`` is the newest that is whole.
    reset_residuals: whether to forget residuals that are not finite, with a
      warning, instead of refusing them. What they held back is lost.

  Returns:
    The state, with the structure of ``like``.

  Raises:
    FileNotFoundError: if there is no checkpoint, or none of that step.
    CorruptCheckpointError: if that step is damaged, or all are, or a damaged
      one cannot be set aside. Names the leaf, and its part where it was saved
      in several. A :class:`ValueError`.
    ValueError: if the checkpoint is of another state: a leaf is only in one of
      the two, or has another shape or dtype, or is of another number of workers
      and has ``resize=None``. Names the leaf. Also if it was written by an
      older jaxdist, without digests, or holds residuals that are not finite:
      every step from there on would be skipped.
    MissingProcessError: if another process does not call this in time.
    OSError: if the file system refuses to list or to read.

  Warns:
    CorruptCheckpointWarning: if an older checkpoint was restored.
    UserWarning: naming residuals that were forgotten.

  Examples:
    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> import jaxdist as jd
    >>> residual = jd.PerWorker(jnp.array([1.0, 3.0]))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   jd.save(directory, 1, residual)
    ...   jd.restore(directory, jd.PerWorker(jnp.zeros(1))).value
    Array([2.], dtype=float32)
  """
  paths = listed(directory)
  if step is not None:
    step = operator.index(step)
  steps = sorted(paths, reverse=True) if step is None else [step]
  check_there(directory, paths, steps[0] if steps else None)
  errors = []
  for step in steps:
    try:
      state, forgotten = _read(paths[step], like, reset_residuals)
      break
    except CorruptCheckpointError as error:
      errors.append(error)
  else:
    if len(errors) == 1:
      raise errors[0]
    words = ' '.join(map(str, errors))
    raise CorruptCheckpointError(
      f'all checkpoints in {absolute(directory)} are damaged: {words}'
    ) from errors[0]
  for damaged, error in zip(steps, errors, strict=False):
    aside = _set_aside(paths[damaged], error)
    warnings.warn(
      f'{error} Restored step {step} instead; the damaged one is now {aside}.',
      CorruptCheckpointWarning,
      stacklevel=2,
    )
  if forgotten:
    warnings.warn(
      f'{paths[step]}: {", ".join(forgotten)} are not finite and begin anew '
      f'from zero.',
      stacklevel=2,
    )
  return state


def _read(path, like, reset_residuals):
  """The state in one checkpoint, and the residuals in it that are forgotten."""
  record = integrity.together(lambda: read_record(path))
  specs = {leaf['path']: _spec(leaf) for leaf in record['leaves']}
  seals = {
    leaf['path']: integrity.Seal(tuple(leaf['shard']), leaf['digests'])
    for leaf in record['leaves']
    if 'shard' in leaf
  }
  leaves = named_leaves(like)
  check_leaves(specs, leaves, f'the checkpoint {path}')

  restored = {}
  as_they_are = []
  to_resize = []
  for leaf in leaves:
    spec = specs[leaf.name]
    if 0 in spec.shape:
      target = _target(leaf, spec)
      empty = np.zeros(target.shape, target.dtype)
      restored[leaf.name] = _finish(empty, leaf)
    elif spec.shape == np.shape(leaf.value):
      as_they_are.append(leaf)
    else:
      to_resize.append(leaf)
  for batch in [as_they_are, *_batches(to_resize, specs)]:
    targets = {x.name: _target(x, specs[x.name]) for x in batch}
    values = _load_checked(path, targets, seals)
    for leaf in batch:
      restored[leaf.name] = _finish(values.pop(leaf.name), leaf)
  bad = _not_finite([leaf for leaf in leaves if leaf.is_residual], restored)
  if bad and not reset_residuals:
    raise ValueError(
      f'{path} holds residuals that are not finite, {bad[0].name} among them: '
      f'every step would be skipped. Restore an older step, or forget them by '
      f'reset_residuals=True.'
    )
  for leaf in bad:
    zeros = np.zeros(np.shape(leaf.value), leaf.value.dtype)
    restored[leaf.name] = placed(zeros, leaf.value)
  state = jax.tree.unflatten(
    jax.tree.structure(like), [restored[leaf.name] for leaf in leaves]
  )
  return state, [leaf.name for leaf in bad]


def _not_finite(leaves, values):
  """Those leaves that are not finite on any process."""

  def is_bad(x):
    parts = [x]
    if isinstance(x, jax.Array):
      parts = [part.data for part in x.addressable_shards]
    return not all(np.isfinite(np.asarray(part)).all() for part in parts)

  flags = np.array([is_bad(values[leaf.name]) for leaf in leaves], bool)
  if jax.process_count() > 1 and leaves:
    flags = multihost_utils.process_allgather(flags).any(axis=0)  # the wire
  return [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]


def _spec(leaf):
  """What a leaf of the record was saved as."""
  fields = {name: leaf[name] for name in LeafSpec._fields}
  return LeafSpec(**fields | {'shape': tuple(leaf['shape'])})


def _load_checked(path, targets, seals):
  """Arrays that are as they were saved; raises on all processes or on none."""
  values = _load(path, targets)
  if _on_any_process(values is None):
    # Maybe only what tells their places is damaged, or what is asked for is
    # what cannot be, which is said where they are placed.
    values = integrity.together(lambda: _load_one_by_one(path, targets))
  words = lambda: integrity.check(values, seals)
  integrity.together(lambda: _raise_if(words(), path, 'is not what was saved'))
  return values


def _load_one_by_one(path, targets):
  """Arrays in host memory."""
  values = {}
  for name, target in targets.items():
    value = _load(path, {name: np.empty(target.shape, target.dtype)})
    _raise_if(
      value is None and (name or 'the state'), path, 'cannot be read any more'
    )
    values |= value
  return values


def _raise_if(what, path, why):
  if what:
    raise CorruptCheckpointError(f'{path} is damaged: {what} {why}.')


def _on_any_process(flag):
  if jax.process_count() == 1:
    return flag
  return multihost_utils.process_allgather(np.asarray(flag)).any()  # the wire


def _set_aside(path, error):
  """Renames a damaged checkpoint, so that it is none any more."""
  aside = path.with_name(f'{path.name}.damaged')
  number = 1
  while aside.exists():
    number += 1
    aside = path.with_name(f'{path.name}.damaged-{number}')

  def rename():
    if jax.process_index() == 0:
      try:
        path.rename(aside)
      except OSError as refused:
        raise CorruptCheckpointError(
          f'{error} It could not be set aside ({refused.strerror}): name the '
          f'step to restore.'
        ) from refused

  integrity.together(lambda: None)  # All have looked before one renames.
  integrity.together(rename)
  return aside


def _batches(leaves, specs):
  """Groups leaves so that few bytes are read at a time, in few reads."""
  batch, num_bytes = [], 0
  for leaf in leaves:
    if batch and num_bytes > _RESIZE_BATCH_BYTES:
      yield batch
      batch, num_bytes = [], 0
    batch.append(leaf)
    num_bytes += math.prod(specs[leaf.name].shape) * leaf.value.dtype.itemsize
  if batch:
    yield batch


def _target(leaf, spec):
  """What Orbax should read a leaf as: on its devices, or into host memory."""
  like = leaf.value
  if not isinstance(like, jax.Array | jax.ShapeDtypeStruct):
    return np.empty(spec.shape, np.asarray(like).dtype)
  sharding = sharding_of(like) if like.shape == spec.shape else None
  data = jax.ShapeDtypeStruct(spec.shape, like.dtype)
  if is_key(like):
    data = jax.eval_shape(jax.random.key_data, data)
  if sharding is None:
    return np.empty(data.shape, data.dtype)
  return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)


def _finish(value, leaf):
  """What Orbax read as what was asked for."""
  is_placed = isinstance(value, jax.Array)
  if is_key(leaf.value):
    value = jax.random.wrap_key_data(value, impl=key_impl(leaf.value))
  if is_placed:
    return value
  return placed(resized(value, leaf), leaf.value)


def _load(path, targets):
  """What Orbax reads; None if it cannot, with no word of it."""
  if not targets:
    return {}
  with context(), without_pages(), _forgetting_reads():
    try:
      return ocp.load_checkpointables(path, {ARRAYS: targets})[ARRAYS]
    except UNREADABLE as error:
      raise_if_refused(error, path)
  return None


@contextlib.contextmanager
def _forgetting_reads():
  """Deletes the reads that a failed load has begun, which warn of it.

  They are still young then: to look through all that there is takes seconds in
  a large process.
  """
  was_enabled = gc.isenabled()
  gc.disable()
  try:
    yield
  finally:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', RuntimeWarning)
      gc.collect(0)
    if was_enabled:
      gc.enable()
