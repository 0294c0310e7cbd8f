"""Writes a state, at once or while training goes on."""

import contextlib
import json
import operator
import os
import secrets
import threading
from concurrent import futures
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxdist.checkpoint import integrity, layout
from jaxdist.checkpoint.layout import (
  ARRAYS,
  RECORD,
  absolute,
  context,
  is_local,
  make_record,
  without_pages,
)
from jaxdist.checkpoint.pending import (
  Pending,
  begun,
  fail,
  finish,
  named_errors,
)
from jaxdist.checkpoint.staging import Run, Staging, current, take_over
from jaxdist.hosts import agreement
from jaxdist.keys import is_key
from jaxdist.resize import named_leaves

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

  Each shard of each leaf gets a digest, by which :func:`restore` finds what was
  damaged since; that takes about 0.6 s a GB and core. :class:`Saver` returns
  earlier.

  A process that is killed at any moment leaves the step whole or leaves it out:
  it is written in a directory ``saving-...`` and renamed at the end. In a run
  of several processes all of them must call it, with the same arguments and a
  directory that all can reach.

  One run at a time saves in a directory, the one that was the last to take it
  over, which is done by its first save or by its :class:`Saver`; all that a
  process saves there is of one run. From then on the saves of other runs fail,
  also those of a process that was given up, stopped, and wakes up later, and
  what they have not committed is removed.

  Args:
    directory: where the checkpoints of one run lie, each in a directory named
      by its step. Made if it is not there. On a network file system renaming
      must be atomic, as it is with NFS. In a store of objects (``gs://``)
      nothing can be renamed: Orbax commits in its own way there, and another
      run's saves are not ended.
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
    OSError: if the file system refuses: no space left, read-only. If it refuses
      one process, all raise.
    RuntimeError: if another run took over the directory, or the step was saved
      and older ones than ``keep`` cannot be removed.
    MissingProcessError: if another process does not call this in time. After
      this, or another error in a run of several processes, a thread of Orbax
      may keep the process from ending for up to 300 s.

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
  _begin(directory, step, state, metadata, keep, copy=False).wait()


class Saver:
  """Saves states while training goes on with the next steps.

  Each :meth:`save` first waits for the one before. Then it makes a copy of the
  state in host memory, with a digest of each shard, and returns: the state may
  be donated to the next step at once. The rest happens in a thread. What goes
  wrong there (no space, say) is raised by the next :meth:`save`, by
  :meth:`wait`, or at the end of the ``with`` block, once.

  A saver takes over its directory when it is made; see :func:`save`. Made
  before :func:`latest_step` and :func:`restore` are called, it makes sure that
  no run that was given up commits a step after that. In a run of several
  processes each has one, made after :func:`jaxdist.initialize`, and all call it
  alike.

  Args:
    directory: see :func:`save`.
    keep: see :func:`save`.

  Raises:
    ValueError: if ``keep`` is less than 1.
    OSError: if the file system refuses to take it over.
    RuntimeError: if another run takes it over at the same time.
    MissingProcessError: if another process does not make one in time.

  Examples:
    >>> import tempfile
    >>> import jaxdist as jd
    >>> with tempfile.TemporaryDirectory() as directory:
    ...   with jd.Saver(directory) as saver:
    ...     for step in (1, 2, 3):
    ...       saver.save(step, {'w': jnp.full(2, step)})
    ...   jd.restore(directory, {'w': jnp.zeros(2, int)})['w']
    Array([3, 3], dtype=int32)
  """

  def __init__(self, directory: str | os.PathLike, *, keep: int = 2):
    _check_keep(keep)
    self._directory = absolute(directory)
    self._keep = keep
    self._pending = None
    agreement.from_first('a Saver', lambda: take_over(self._directory))

  def save(
    self,
    step: SupportsIndex,
    state: Any,
    *,
    metadata: dict[str, Any] | None = None,
  ) -> None:
    """Begins to save a state; see :func:`save` for arguments and errors."""
    self.wait()
    self._pending = _begin(
      self._directory, step, state, metadata, self._keep, copy=True
    )

  def wait(self) -> None:
    """Returns once all is committed.

    Raises:
      OSError: if the last state could not be written.
      RuntimeError: if another run took over the directory.
    """
    if pending := self._taken():
      pending.wait()

  def _taken(self):
    pending, self._pending = self._pending, None
    return pending

  def __enter__(self) -> 'Saver':
    return self

  def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
    if error is None:
      self.wait()
    # Others may not be here.
    elif (pending := self._taken()) and (unsaved := pending.end()):
      raise unsaved


def _begin(directory, step, state, metadata, keep, copy):
  directory = absolute(directory)
  step = operator.index(step)
  if step < 0:
    raise ValueError(f'step must be at least 0, got {step}.')
  _check_keep(keep)
  metadata = {} if metadata is None else metadata
  _check_json(metadata)
  arrays, leaves = _arrays_and_leaves(state)
  with named_errors(directory, step):
    newest, run, token = agreement.from_first(
      'a save', lambda: _place(directory)
    )
  if step <= newest:
    raise ValueError(
      f'step must be larger than that of the newest checkpoint in {directory}, '
      f'{newest}, got {step}. To go on from an older one, remove those after '
      f'it or save elsewhere.'
    )
  staging = Staging(directory, Run(*run), token, step)
  future = futures.Future()
  try:
    work = _prepare(staging, arrays, leaves, metadata, keep, copy)
  except Exception as error:  # Of several processes, all raise at the end.
    if jax.process_count() == 1:
      raise
    work = ()
    fail(future, token, error)
  # Where another process fails, this one may be given up.
  thread = threading.Thread(
    target=finish, args=(future, staging, keep, *work), daemon=True
  )
  pending = Pending(future, thread, token)
  if work:
    begun.add(pending)
    thread.start()
  return pending


def _prepare(staging, arrays, leaves, metadata, keep, copy):
  """Orbax's answer, once it has begun, and what is to be left at its end."""
  with (
    named_errors(staging.directory, staging.step),
    contextlib.ExitStack() as stack,
  ):
    if jax.process_index() == 0:
      stack.enter_context(staging.removed_after_errors())
    stack.enter_context(without_pages())
    if copy:
      arrays = {name: copied(x) for name, x in arrays.items()}
    seals = integrity.seal(arrays)
    for leaf in leaves:
      if leaf['path'] in seals:
        leaf.update(seals[leaf['path']]._asdict())
    contents = {
      ARRAYS: arrays or _NO_ARRAYS,
      RECORD: make_record(leaves, metadata),
    }
    response = _write(staging, contents, keep, stack)
    return response, stack.pop_all()


def _place(directory):
  """The newest step of a directory, and where a later one can be written."""
  run = current(directory)
  newest = max(layout.checkpoints(directory), default=-1)
  return newest, run, secrets.token_hex(8)


def _write(staging, contents, keep, stack):
  """Lets Orbax begin to write."""
  if is_local(staging.directory):
    with context():
      return ocp.save_checkpointables_async(staging.step_path, contents)
  checkpointer = stack.enter_context(
    ocp.training.Checkpointer(
      staging.directory,
      context=context(),
      preservation_policy=ocp.training.preservation_policies.LatestN(keep),
      cleanup_tmp_directories=True,
    )
  )
  return checkpointer.save_checkpointables_async(
    staging.step, contents, force=True
  )


def _arrays_and_leaves(state):
  """The arrays that Orbax saves, by name, and JSON for each leaf."""
  arrays = {}
  leaves = []
  workers = {}
  for leaf in named_leaves(state):
    name = leaf.name or 'the state'
    _check_saveable(name, leaf.value)
    spec = leaf.spec()
    leaves.append({'path': leaf.name, **spec._asdict()})
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
  if len({leaf['path'] for leaf in leaves}) < len(leaves):
    raise ValueError('two leaves of the state have the same path.')
  return arrays, leaves


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


def copied(value: Any) -> Any:
  """A copy of an array in host memory, or as much of it as is there."""
  if not isinstance(value, jax.Array) or value.is_fully_addressable:
    return np.array(value)
  if any(device.platform != 'cpu' for device in value.devices()):
    return value  # Orbax itself copies to the host before it returns.
  parts = [
    jax.device_put(np.array(part.data), part.device)
    for part in value.addressable_shards
  ]
  return jax.make_array_from_single_device_arrays(
    value.shape, value.sharding, parts
  )


def _to_save(value):
  if not isinstance(value, jax.Array):
    return np.asarray(value)
  if is_key(value):
    value = jax.random.key_data(value)
  # A process's own array is no part of a global state: the first process saves
  # its copy.
  is_local = jax.process_count() > 1 and value.is_fully_addressable
  return np.asarray(value) if is_local else value


def _check_keep(keep):
  if keep < 1:
    raise ValueError(f'keep must be at least 1, got {keep}.')


def _check_json(metadata):
  try:
    is_json = json.loads(json.dumps(metadata)) == metadata
  except (TypeError, ValueError):
    is_json = False
  if not is_json:
    raise ValueError(
      f'metadata must be a dict that JSON gives back unchanged, got {metadata}.'
    )
