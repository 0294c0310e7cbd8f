"""Writes a state, at once or while training goes on."""

import contextlib
import json
import operator
import os
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxdist.checkpoint import integrity
from jaxdist.checkpoint.layout import (
  ARRAYS,
  RECORD,
  absolute,
  context,
  listed,
  make_record,
  system_numbers,
  without_pages,
)
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
    ValueError: if ``step`` is not larger than the newest there, or another run
      saves it at the same time, ``keep`` is less than 1, ``metadata`` is not
      JSON, or a leaf is no array, was donated, is traced, or is per worker and
      of another number of workers than the others.
    OSError: if the file system refuses: no space left, read-only.
    MissingProcessError: if another process does not call this in time.

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

  One saver at a time may write to a directory. In a run of several processes
  each has one, and all call it alike.

  Args:
    directory: see :func:`save`.
    keep: see :func:`save`.

  Raises:
    ValueError: if ``keep`` is less than 1.

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
    self._directory = directory
    self._keep = keep
    self._pending = None

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
    """
    pending, self._pending = self._pending, None
    if pending is not None:
      pending.wait()

  def __enter__(self) -> 'Saver':
    return self

  def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
    self.wait()


class _Pending(NamedTuple):
  """A save that has begun."""

  checkpointer: ocp.training.Checkpointer
  response: Any
  errors: contextlib.ExitStack

  def wait(self) -> None:
    """Returns once it is committed, or raises."""
    with self.errors, self.checkpointer:
      self.response.result()


def _begin(directory, step, state, metadata, keep, copy):
  directory = absolute(directory)
  step = operator.index(step)
  if step < 0:
    raise ValueError(f'step must be at least 0, got {step}.')
  _check_keep(keep)
  metadata = {} if metadata is None else metadata
  _check_json(metadata)
  arrays, leaves = _arrays_and_leaves(state)
  newest = max(listed(directory), default=None)
  if newest is not None and step <= newest:
    raise ValueError(
      f'step must be larger than that of the newest checkpoint in {directory}, '
      f'{newest}, got {step}. To go on from an older one, remove those after '
      f'it or save elsewhere.'
    )
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
  with contextlib.ExitStack() as errors:
    errors.enter_context(_named_errors(directory, step))
    errors.enter_context(without_pages())
    checkpointer = ocp.training.Checkpointer(
      directory,
      context=context(),
      preservation_policy=ocp.training.preservation_policies.LatestN(keep),
      cleanup_tmp_directories=True,
    )
    response = checkpointer.save_checkpointables_async(
      step, contents, force=True
    )
    return _Pending(checkpointer, response, errors.pop_all())


@contextlib.contextmanager
def _named_errors(directory, step):
  """Says what could not be saved, where the file system refused something."""
  try:
    yield
  except ocp.training.errors.StepAlreadyExistsError as error:
    # It was not when this save began. A process that all had given up may have
    # woken up at the very end of a save.
    raise ValueError(
      f'step {step} is in {directory} by now: another run saves there too.'
    ) from error
  except (OSError, ValueError) as error:
    number = next(iter(system_numbers(error)), getattr(error, 'errno', None))
    if number is None:
      raise
    raise OSError(
      number,
      f'step {step} was not saved in {directory}: {os.strerror(number)}. '
      f'Checkpoints that were there still are.',
    ) from error


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
