"""A training step over all workers, on a mesh or simulated on one device."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jaxtyping import Array, Int32

from jaxdist import lifting, placement, shared
from jaxdist import state as worker_state
from jaxdist.communicators import collectives
from jaxdist.communicators.base import exchanged_leaves
from jaxdist.hosts import desync
from jaxdist.state import Axis, PerShard, PerWorker, axis_names
from jaxdist.transforms.base import all_finite, where


class TrainState(NamedTuple):
  """All that a training step changes.

  Attributes:
    params: the parameters; in a :class:`jaxdist.PerWorker` if the transform
      lets them drift.
    opt_state: the transform's state.
    step: steps so far. The same on all workers.
    skipped: steps dropped because a gradient, an exchange or the parameters
      after it were not finite; in a :class:`jaxdist.PerWorker` if parameters
      drift, since a worker then drops local steps on its own.
  """

  params: Any
  opt_state: optax.OptState
  step: Int32[Array, '']
  skipped: Any


def init(
  tx: optax.GradientTransformation,
  params: optax.Params,
  *,
  axis: Axis,
  mesh: Mesh | AbstractMesh | None = None,
  workers: int | None = None,
  specs: Any = None,
) -> TrainState:
  """Makes the state of a training run, placed on the workers.

  Args:
    tx: a transform that owns a communicator along ``axis``.
    params: the parameters, the same for all workers. Shapes and dtypes
      (``jax.ShapeDtypeStruct``) give the state's shapes, dtypes and shardings.
    axis: name of the axis that the workers lie along, or of several, as for
      :func:`jaxdist.hierarchical`.
    mesh: the devices; one worker for each position along ``axis``, of all the
      devices along the mesh's other axes. For :func:`jaxdist.traffic` an
      abstract mesh will do, with shapes as ``params``.
    workers: instead of ``mesh``, so many simulated workers on one device.
    specs: a :class:`jax.sharding.PartitionSpec` for each parameter, over the
      other axes of the mesh: how FSDP or tensor parallelism cuts it inside a
      worker. ``None``: each device of a worker holds all of them.

  Returns:
    The state, of global arrays: per-worker leaves have a leading worker axis,
    sharded over ``axis``. What is shaped like a parameter and stands at its
    place in a tree, as residuals and momenta do, is cut as the parameter is.

  Raises:
    ValueError: if not exactly one of ``mesh`` and ``workers`` is given, the
      mesh has no such axis, ``specs`` do not fit it, or an Optax wrapper around
      a communicator cannot work.
    TypeError: if a parameter is not real floating point, as counters and keys
      are not: they have no gradient, and no mean. Names it.
    DesyncError: if the mesh lies over several processes, and they differ in it
      or in the structure of parameters or state; on all of them.
    MissingProcessError: if one of them does not call this in time.

  Examples:
    >>> import jaxdist as jd
    >>> tx = optax.chain(jd.error_feedback(jd.mean('data', jd.sign())),
    ...                  optax.sgd(0.1))
    >>> state = jd.init(tx, jnp.zeros(3), axis='data', workers=4)
    >>> state.opt_state[0].residual.value.shape
    (4, 3)
  """
  placement.check_workers(mesh, workers, axis, specs)
  exchanged_leaves(jax.eval_shape(lambda params: params, params), 'params')
  tx = lifting.lifted(tx, axis)

  def worker_init(params):
    opt_state = tx.init(params)
    zero = jnp.zeros((), jnp.int32)
    if worker_state.drifts(opt_state):
      own = collectives.vary((params, zero), axis)
      return TrainState(PerWorker(own[0]), opt_state, zero, PerWorker(own[1]))
    return TrainState(params, opt_state, zero, zero)

  if mesh is None:
    under_vmap = lambda out_axes: jax.vmap(
      worker_init, None, out_axes, axis_name=axis, axis_size=workers
    )
    shapes = jax.eval_shape(under_vmap(0), params)
    run = under_vmap(_vmap_axes(shapes))
  else:
    param_places = placement.param_shardings(params, mesh, axis, specs)
    everywhere = PartitionSpec()
    shapes = collectives.shapes_inside(
      worker_init,
      everywhere,
      params,
      mesh=mesh,
      axis_names=set(axis_names(axis)),
    )
    run = _on_mesh(worker_init, everywhere, shapes, mesh, axis)
  is_abstract = lambda x: isinstance(x, jax.ShapeDtypeStruct)
  if any(map(is_abstract, jax.tree.leaves(params))):
    like = jax.eval_shape(run, params)
    if mesh is None:
      return like
    places = placement.state_shardings(like, mesh, axis, specs)
    return placement.placed_shapes(like, places)
  places = None  # As run leaves them.
  if mesh is not None:
    desync.check_init(mesh, params, param_places, shapes)
    params = jax.device_put(params, param_places)
    if specs is not None:
      like = jax.eval_shape(run, params)
      places = placement.state_shardings(like, mesh, axis, specs)
  return jax.jit(run, out_shardings=places)(params)


def train_step(
  loss_fn: Callable[[optax.Params, Any], jax.Array],
  tx: optax.GradientTransformation,
  *,
  axis: Axis,
  mesh: Mesh | AbstractMesh | None = None,
  workers: int | None = None,
  specs: Any = None,
  batch_spec: PartitionSpec | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
  r"""Makes a compiled step: each worker's gradient, then ``tx``, then the sum.

  Each worker differentiates the loss of its own part of the batch and gives
  the gradient to ``tx``, which communicates. **On the wire:** what ``tx``
  sends, and one int32 all-reduce by which all workers drop a step together if
  the gradient of one is not finite. They also do if ``tx`` drops an exchange,
  or a parameter would stop being finite, which each of them sees in what all
  have. Parameters, residuals and momenta then stay as they were. Where
  parameters drift, a worker drops such a step by itself, and nothing but what
  ``tx`` sends is sent. What ``tx`` exchanges late, such as
  :func:`jaxdist.diloco` with a delay, lies open across the forward and backward
  pass.

  Args:
    loss_fn: from parameters and one worker's batch to a scalar loss.
    tx: a transform that owns a communicator along ``axis``.
    axis: of the workers, as for :func:`init`.
    mesh: the devices, as for :func:`init`.
    workers: instead of ``mesh``, so many simulated workers on one device.
    specs: how parameters are cut inside a worker, as for :func:`init`. The
      gradients are cut likewise; all collectives inside a worker are the
      partitioner's.
    batch_spec: how a worker's batch is cut over its devices, such as
      ``P('fsdp')``. ``None``: each of them has all of it.

  Returns:
    A jitted function ``(state, batch) -> (state, metrics)``. It donates the
    state. ``batch`` is a pytree of arrays whose leading axis is divided among
    the workers. ``metrics`` holds, one number for each worker so that it costs
    no exchange, ``loss`` and ``skipped`` (steps dropped so far): take the mean
    where you print it.

  Raises:
    ValueError: as :func:`init`; when called, if a batch cannot be divided, or
      updates or state differ between workers that should not.
    DesyncError: when first called over several processes, if these are about to
      run different programs; see :func:`jaxdist.assert_same_program`.
    MissingProcessError: if one of them does not call it in time.

  Examples:
    >>> import jaxdist as jd
    >>> tx = optax.chain(jd.communicate(jd.mean('data')), optax.sgd(0.5))
    >>> loss = lambda w, x: jnp.mean((w - x) ** 2)
    >>> state = jd.init(tx, jnp.array(0.0), axis='data', workers=2)
    >>> step = jd.train_step(loss, tx, axis='data', workers=2)
    >>> state, metrics = step(state, jnp.array([1.0, 3.0]))
    >>> state.params, metrics['loss']
    (Array(2., dtype=float32), Array([1., 9.], dtype=float32))
  """
  placement.check_workers(mesh, workers, axis, specs)
  if batch_spec is not None and (
    mesh is None or not isinstance(batch_spec, PartitionSpec)
  ):
    raise ValueError(
      f'batch_spec must be a jax.sharding.PartitionSpec over the devices of a '
      f'mesh, got batch_spec={batch_spec!r} and mesh={mesh!r}.'
    )
  tx = lifting.lifted(tx, axis)
  count = workers if mesh is None else _num_workers(mesh, axis)

  def worker_update(grads, opt_state, params, **extra_args):
    updates, opt_state = tx.update(grads, opt_state, params, **extra_args)
    if not worker_state.drifts(opt_state):
      shared.check_shared(updates, axis, 'updates')
    shared.check_shared(opt_state, axis, 'opt_state')
    return updates, opt_state

  def one_step(state, batch, **extra_args):
    drifting = isinstance(state.params, PerWorker)
    params = state.params.value if drifting else state.params
    loss, grads = jax.value_and_grad(loss_fn)(
      collectives.vary(params, axis), batch
    )
    if specs is not None:
      grads = _constrain(grads, placement.leaf_specs(specs, grads))
    updates, opt_state = worker_update(
      grads, state.opt_state, params, **extra_args
    )
    new_params = optax.apply_updates(params, updates)
    added = lambda field: (
      _count(opt_state, field) - _count(state.opt_state, field)
    )
    dropped, lost = added('skipped'), added('lost')
    if drifting:
      skipped = state.skipped.value + dropped + lost
      new = TrainState(
        PerWorker(new_params), opt_state, state.step + 1, PerWorker(skipped)
      )
    else:
      bad = jnp.where(all_finite(grads), 0, 1)
      bad = collectives.psum(bad, axis) > 0  # the wire
      bad |= (dropped > 0) | ~_stay_finite(params, new_params)
      skipped = state.skipped + jnp.where(bad, 1, lost)
      new = TrainState(new_params, opt_state, state.step, skipped)
      new = where(bad, state, new)._replace(
        step=state.step + 1, skipped=skipped
      )
    metrics = {'loss': loss, 'skipped': skipped}
    return new, jax.tree.map(PerWorker, collectives.vary(metrics, axis))

  def worker_step(state, batch):
    clock = worker_state.clock_ahead(state.opt_state)
    if clock is None:
      return one_step(state, batch)

    def branch(turn):
      def run(state, batch):
        with jax.named_scope(clock.scope(turn)):
          return one_step(state, batch, turn=turn)

      return run

    # A transfer can't lie open across the end of a branch: the whole step is
    # in it. Steps without a turn share the last.
    idle = clock.every > clock.turns
    branches = [branch(turn) for turn in range(clock.turns + idle)]
    return jax.lax.switch(clock.turn(), branches, state, batch)

  def step(state, batch):
    placement.check_batch(batch, count)
    metrics_like = dict.fromkeys(('loss', 'skipped'), PerWorker(0))
    if mesh is None:
      shared.check_simulated(
        worker_update, state.params, state.opt_state, axis, count
      )
      axes = _vmap_axes(state)
      run = jax.vmap(
        worker_step, (axes, 0), (axes, _vmap_axes(metrics_like)), axis_name=axis
      )
      batch = jax.tree.map(
        lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch
      )
    else:
      if is_explicit:
        batch = jax.sharding.reshard(batch, batch_sharding)
      in_specs = (worker_state.specs(state, axis), PartitionSpec(axis))
      run = _on_mesh(worker_step, in_specs, (state, metrics_like), mesh, axis)
    state, metrics = run(state, batch)
    if specs is not None:
      places = placement.state_shardings(state, mesh, axis, specs)
      state = jax.lax.with_sharding_constraint(state, places)
    return state, {name: node.value for name, node in metrics.items()}

  if mesh is None:
    return jax.jit(step, donate_argnums=0)
  batch_sharding = placement.batch_sharding(mesh, axis, batch_spec)
  is_explicit = AxisType.Explicit in mesh.axis_types
  jitted = jax.jit(
    step,
    donate_argnums=0,
    in_shardings=None if is_explicit else (None, batch_sharding),
  )
  several = len(desync.processes_of(mesh)) > 1
  return desync.CheckedStep(jitted) if several else jitted


def mean_params(state: TrainState) -> optax.Params:
  """The parameters to evaluate: the mean over workers where they drift.

  Args:
    state: of a training run.

  Returns:
    Parameters without a worker axis, in their own dtype.
  """
  if not isinstance(state.params, PerWorker):
    return state.params
  mean = lambda x: jnp.mean(x, axis=0, dtype=jnp.float32).astype(x.dtype)
  return jax.jit(lambda tree: jax.tree.map(mean, tree))(state.params.value)


def merge(state: TrainState) -> TrainState:
  """Gives all workers the mean of their parameters: one last meeting.

  Workers that have met rarely, or only in pairs, may each be far from what they
  have found together. What else they keep stays their own, so merge where
  training ends, and keep ``state`` until the merged parameters have been
  evaluated. **On the wire:** one all-reduce of the parameters, in float32.

  Args:
    state: of a training run.

  Returns:
    The state with other parameters, placed as they were; the same state where
    parameters do not drift.

  Examples:
    >>> import jaxdist as jd
    >>> tx = jd.local_sgd(optax.sgd(0.5), jd.mean('data'), every=1000)
    >>> state = jd.init(tx, jnp.array(0.0), axis='data', workers=2)
    >>> step = jd.train_step(
    ...   lambda w, x: jnp.mean((w - x) ** 2), tx, axis='data', workers=2
    ... )
    >>> state, _ = step(state, jnp.array([1.0, 3.0]))
    >>> state.params.value, jd.merge(state).params.value
    (Array([1., 3.], dtype=float32), Array([2., 2.], dtype=float32))
  """
  if not isinstance(state.params, PerWorker):
    return state
  params = state.params.value

  def merged(params):
    mean = lambda x: jnp.mean(x, axis=0, keepdims=True, dtype=jnp.float32)
    return jax.tree.map(
      lambda x: jnp.broadcast_to(mean(x).astype(x.dtype), x.shape), params
    )

  shardings = jax.tree.map(lambda x: x.sharding, params)
  params = jax.jit(merged, out_shardings=shardings)(params)
  return state._replace(params=PerWorker(params))


def _on_mesh(fn, in_specs, out_like, mesh, axis):
  """Worker-view code over a mesh; ``PerWorker`` says what is placed where."""

  def worker_fn(*args):
    return worker_state.stacked(fn(*map(worker_state.local, args)))

  return jax.shard_map(
    worker_fn,
    mesh=mesh,
    in_specs=in_specs,
    out_specs=worker_state.specs(out_like, axis),
    axis_names=set(axis_names(axis)),
    check_vma=_num_workers(mesh, axis) > 1,  # One worker: see collectives.psum.
  )


def _num_workers(mesh, axis):
  return math.prod(mesh.shape[name] for name in axis_names(axis))


def _vmap_axes(tree):
  return worker_state.map_per_worker(lambda _: 0, lambda _: None, tree)


def _constrain(tree, specs):
  leaves, treedef = jax.tree.flatten(tree)
  leaves = map(jax.lax.with_sharding_constraint, leaves, specs)
  return treedef.unflatten(leaves)


def _count(opt_state, field):
  """Sum of the counters of this name, as one worker sees them.

  Those inside a :class:`PerShard` lie on several devices: adding them up would
  take an exchange between these.
  """
  is_leaf = lambda x: isinstance(x, PerWorker | PerShard)
  total = jnp.zeros((), jnp.int32)
  for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state, is_leaf):
    if path and path[-1] == jax.tree_util.GetAttrKey(field):
      total += leaf.value if worker_state.is_per_worker(leaf) else leaf
  return total


def _stay_finite(old, new):
  """Whether no number stops being finite."""
  kept = jax.tree.map(
    lambda a, b: jnp.all(jnp.isfinite(b) | ~jnp.isfinite(a)), old, new
  )
  return jnp.all(jnp.stack(jax.tree.leaves(kept)))
