"""Checkpoints that are whole or not there, for any number of workers.

Orbax writes and reads the arrays and commits a step by renaming its directory.
It gets them as a flat dict, named by their paths in the state, so that nothing
depends on how a tree's nodes are stored. Beside them lies a record of all
leaves. What does not fit is found by comparing that record with what is asked
for, before anything is read, and the error can name the leaf.
"""

import json
import math
import operator
import os
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxdist.resize import (
  LeafSpec,
  check_leaves,
  named_leaves,
  placed,
  resized,
  sharding_of,
)

_FORMAT = 1
# What a step's directory holds: arrays, and JSON.
_ARRAYS = 'state'
_RECORD = 'jaxdist'
# How many bytes of saved values to hold in host memory while resizing, unless
# one leaf is larger.
_RESIZE_BATCH_BYTES = 2**28
# Orbax refuses to save a state of no arrays.
_NO_ARRAYS = {'(none)': np.zeros((), np.int8)}


def save(
  directory: str | os.PathLike,
  step: SupportsIndex,
  state: Any,
  *,
  metadata: dict[str, Any] | None = None,
  keep: int = 2,
) -> None:
  """Saves a state, and returns once it is committed.

  A process that is killed at any moment leaves the step whole or leaves it out:
  it is written under a temporary name and renamed at the end. Temporary
  directories of saves that did not end are removed by the next one. In a run of
  several processes all of them must call it, with the same arguments and a
  directory that all can reach.

  Args:
    directory: where the checkpoints of one run lie, each in a directory named
      by its step. Made if it is not there.
    step: training steps so far; larger than that of any checkpoint there.
    state: any pytree of arrays: JAX or NumPy arrays, typed PRNG keys, Python
      numbers. Per-worker leaves have a leading worker axis, as they do outside
      the workers.
    metadata: what else to remember, as JSON; see :func:`checkpoint_metadata`.
    keep: how many checkpoints to keep, this one included. Older ones are
      deleted after this one is committed.

  Raises:
    ValueError: if ``step`` is not larger than the newest there, ``keep`` is
      less than 1, ``metadata`` is not JSON, or a leaf is no array, was donated,
      is traced, or is per worker and of another number of workers than the
      others.

  Examples:
    >>> import tempfile
    >>> import jaxdist as jd
    >>> state = {'w': jnp.arange(3.0), 'residual': jd.PerWorker(jnp.ones(4))}
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   jd.save(directory, 100, state, metadata={'seed': 7})
    ...   print(jd.latest_step(directory))
    ...   print(jd.checkpoint_metadata(directory))
    ...   jd.restore(directory, jax.eval_shape(lambda: state))['w']
    100
    {'seed': 7}
    Array([0., 1., 2.], dtype=float32)
  """
  directory = _absolute(directory)
  step = operator.index(step)
  if step < 0:
    raise ValueError(f'step must be at least 0, got {step}.')
  if keep < 1:
    raise ValueError(f'keep must be at least 1, got {keep}.')
  metadata = {} if metadata is None else metadata
  _check_json(metadata)
  arrays, record = _arrays_and_record(state)
  newest = latest_step(directory)
  if newest is not None and step <= newest:
    raise ValueError(
      f'step must be larger than that of the newest checkpoint in {directory}, '
      f'{newest}, got {step}. To go on from an older one, remove those after '
      f'it or save elsewhere.'
    )
  record = {'format': _FORMAT, 'leaves': record, 'metadata': metadata}
  with ocp.training.Checkpointer(
    directory,
    context=_context(),
    preservation_policy=ocp.training.preservation_policies.LatestN(keep),
    cleanup_tmp_directories=True,
  ) as checkpointer:
    checkpointer.save_checkpointables(
      step, {_ARRAYS: arrays or _NO_ARRAYS, _RECORD: record}, force=True
    )


def restore(
  directory: str | os.PathLike,
  like: Any,
  *,
  step: SupportsIndex | None = None,
) -> Any:
  """Reads a state, bit for bit, and places it as it is asked for.

  Where ``like`` is of another number of workers than the checkpoint, per-worker
  leaves become what their ``resize`` says; see :func:`jaxdist.resize`. These
  leaves, and only these, pass through host memory whole, a few at a time. In a
  run of several processes all of them must call it.

  Args:
    directory: what was given to :func:`save`.
    like: the state to restore, of arrays or ``jax.ShapeDtypeStruct``: gives
      structure, shapes, dtypes and shardings. Without a sharding, a leaf comes
      uncommitted on the default device.
    step: which checkpoint; ``None`` is the newest committed one.

  Returns:
    The state, with the structure of ``like``.

  Raises:
    FileNotFoundError: if there is no checkpoint, or none of that step.
    ValueError: if the checkpoint is of another state: a leaf is only in one of
      the two, or has another shape or dtype, or is of another number of workers
      and has ``resize=None``. Names the leaf. Also if the directory's
      checkpoints were not written by :func:`save`.

  Examples:
    >>> import tempfile
    >>> import jaxdist as jd
    >>> state = {'residual': jd.PerWorker(jnp.array([1.0, 3.0]))}
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   jd.save(directory, 1, state)
    ...   jd.restore(directory, {'residual': jd.PerWorker(jnp.zeros(1))})
    {'residual': PerWorker(value=Array([2.], dtype=float32), resize='mean')}
  """
  path = _find(directory, step)
  record = _read_record(path)
  specs = {
    leaf['path']: LeafSpec(
      tuple(leaf['shape']),
      leaf['dtype'],
      leaf['per_worker'],
      leaf.get('parts', 1),
    )
    for leaf in record['leaves']
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
    values = _load(path, {x.name: _target(x, specs[x.name]) for x in batch})
    for leaf in batch:
      restored[leaf.name] = _finish(values.pop(leaf.name), leaf)
  return jax.tree.unflatten(
    jax.tree.structure(like), [restored[leaf.name] for leaf in leaves]
  )


def latest_step(directory: str | os.PathLike) -> int | None:
  """The step of the newest committed checkpoint.

  Args:
    directory: what was given to :func:`save`.

  Returns:
    The largest step, or ``None`` if there is no checkpoint or no directory.

  Examples:
    >>> import jaxdist as jd
    >>> print(jd.latest_step('/no/such/directory'))
    None
  """
  return max(_paths(_absolute(directory)), default=None)


def checkpoint_metadata(
  directory: str | os.PathLike, step: SupportsIndex | None = None
) -> dict[str, Any]:
  """What :func:`save` was told to remember.

  Args:
    directory: what was given to :func:`save`.
    step: which checkpoint; ``None`` is the newest committed one.

  Returns:
    The ``metadata`` of that checkpoint, empty if none was given.

  Raises:
    FileNotFoundError: if there is no checkpoint, or none of that step.
    ValueError: if the checkpoint was not written by :func:`save`.

  Examples:
    >>> import tempfile
    >>> import jaxdist as jd
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   jd.save(directory, 1, jnp.ones(2), metadata={'batches_read': 32})
    ...   jd.checkpoint_metadata(directory, step=1)
    {'batches_read': 32}
  """
  return _read_record(_find(directory, step))['metadata']


def _arrays_and_record(state):
  """The arrays that Orbax saves, by name, and a record of all leaves."""
  arrays = {}
  record = []
  workers = {}
  for leaf in named_leaves(state):
    name = leaf.name or 'the state'
    _check_saveable(name, leaf.value)
    spec = leaf.spec()
    record.append({'path': leaf.name, **spec._asdict()})
    if leaf.per_worker:
      workers.setdefault(spec.shape[0], name)
    if 0 not in spec.shape:
      arrays[leaf.name] = _to_save(leaf.value)
  if len(workers) > 1:
    (count, name), (other_count, other_name), *_ = workers.items()
    raise ValueError(
      f'all per-worker leaves must be of the same number of workers: {name} is '
      f'of {count} and {other_name} of {other_count}.'
    )
  if len({leaf['path'] for leaf in record}) < len(record):
    raise ValueError('two leaves of the state have the same path.')
  return arrays, record


def _check_saveable(name, value):
  # Orbax would fail in a background thread and leave others waiting for it.
  if isinstance(value, jax.core.Tracer):
    raise ValueError(f'{name} is traced: call save outside jit.')
  if isinstance(value, jax.Array):
    if value.is_deleted():
      raise ValueError(
        f'{name} was deleted: save the state that a step returned, not the one '
        f'that was donated to it.'
      )
    return
  dtype = np.asarray(value).dtype
  if not (jnp.issubdtype(dtype, jnp.number) or dtype.kind == 'b'):
    raise ValueError(
      f'{name} must be an array or a number, got {type(value).__name__}.'
    )


def _to_save(value):
  if not isinstance(value, jax.Array):
    return np.asarray(value)
  if _is_key(value):
    value = jax.random.key_data(value)
  # A process's own array is no part of a global state: the first process saves
  # its copy.
  is_local = jax.process_count() > 1 and value.is_fully_addressable
  return np.asarray(value) if is_local else value


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
  if _is_key(like):
    data = jax.eval_shape(jax.random.key_data, data)
  if sharding is None:
    return np.empty(data.shape, data.dtype)
  return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)


def _finish(value, leaf):
  """What Orbax read as what was asked for."""
  is_placed = isinstance(value, jax.Array)
  if _is_key(leaf.value):
    value = jax.random.wrap_key_data(value, impl=_key_impl(leaf.value))
  if is_placed:
    return value
  return placed(resized(value, leaf), leaf.value)


def _is_key(value):
  dtype = getattr(value, 'dtype', None)
  return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _key_impl(like):
  # Only arrays and tracers tell their implementation, abstract values don't.
  impls = []
  jax.eval_shape(lambda key: impls.append(jax.random.key_impl(key)), like)
  return impls[0]


def _load(path, targets):
  if not targets:
    return {}
  with _context():
    return ocp.load_checkpointables(path, {_ARRAYS: targets})[_ARRAYS]


def _context():
  """How Orbax is to save and load."""
  context = ocp.Context()
  context.pytree.loading.partial_load = True
  # By itself Orbax takes a dict of numbers and strings for a tree of arrays.
  registry = ocp.handlers.local_registry()
  registry.add(ocp.handlers.JsonHandler, checkpointable_name=_RECORD)
  context.checkpointables.registry = registry
  return context


def _check_json(metadata):
  try:
    is_json = json.loads(json.dumps(metadata)) == metadata
  except (TypeError, ValueError):
    is_json = False
  if not is_json:
    raise ValueError(
      f'metadata must be a dict that JSON gives back unchanged, got {metadata}.'
    )


def _absolute(directory):
  directory = os.fspath(directory)
  return directory if '://' in directory else os.path.abspath(directory)


def _paths(directory):
  """The committed checkpoints of a directory, by step."""
  steps = ocp.path.step.standard_name_format().find_all(directory)
  return {step.step: os.fspath(step.path) for step in steps}


def _find(directory, step):
  directory = _absolute(directory)
  paths = _paths(directory)
  if not paths:
    raise FileNotFoundError(f'there is no checkpoint in {directory}.')
  step = max(paths) if step is None else operator.index(step)
  if step not in paths:
    raise FileNotFoundError(
      f'there is no checkpoint of step {step} in {directory}, only of '
      f'{", ".join(map(str, sorted(paths)))}.'
    )
  return paths[step]


def _read_record(path):
  try:
    with _context():
      record = ocp.load_checkpointables(path, {_RECORD: None})[_RECORD]
  except (ocp.errors.InvalidLayoutError, KeyError, FileNotFoundError) as error:
    raise ValueError(
      f'{path} was not written by jaxdist.save, or is not whole.'
    ) from error
  if record['format'] != _FORMAT:
    raise ValueError(
      f'{path} has format {record["format"]}; this version of jaxdist reads '
      f'format {_FORMAT}.'
    )
  return record
