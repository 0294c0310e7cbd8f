"""Where the parts of a state lie, along the workers and inside each of them."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import (
  AbstractMesh,
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
)

from jaxdist.communicators import checks
from jaxdist.state import (
  Axis,
  PerShard,
  PerWorker,
  axis_names,
  is_per_worker,
  shard_spec,
)

AnyMesh = Mesh | AbstractMesh


def leaves_beside(tree: Any, other: Any) -> list[Any]:
  """What a tree shaped like another holds in the places of its leaves.

  Args:
    tree: the tree whose leaves count. Where it has None, as in place of the
      leaves that someone else exchanges, the other may hold anything.
    other: a tree of its structure.

  Returns:
    A subtree of ``other`` for each leaf of ``tree``, in order.

  Raises:
    ValueError: if the structures differ.
  """
  leaves, structure = jax.tree.flatten(tree, is_leaf=lambda x: x is None)
  beside = structure.flatten_up_to(other)
  return [y for x, y in zip(leaves, beside, strict=True) if x is not None]


def leaf_specs(specs: Any | Callable[[Any], Any], tree: Any) -> list[Any]:
  """One PartitionSpec for each leaf of a tree.

  Args:
    specs: a tree of them, one for all leaves, or a function from the tree to a
      tree of them.
    tree: arrays or shapes; None in place of leaves that are not asked for.

  Returns:
    The specs, in the order of the leaves.

  Raises:
    ValueError: if there is not one for each leaf.
  """
  if callable(specs):
    specs = specs(tree)
  is_spec = lambda x: isinstance(x, PartitionSpec)
  if is_spec(specs):
    return [specs] * len(jax.tree.leaves(tree))
  try:
    found = leaves_beside(tree, specs)
  except ValueError:
    found = [None]
  if not all(map(is_spec, found)):
    raise ValueError(
      f'specs must be a PartitionSpec, or a tree of them with the structure '
      f'{jax.tree.structure(tree)}, got {specs!r}.'
    )
  return found


def axes_of(spec: PartitionSpec) -> list[str]:
  """The axes that a spec names."""
  return [name for entry in spec for name in _entry_axes(entry)]


def shard_shape(
  name: str, shape: tuple[int, ...], spec: PartitionSpec, sizes: dict[str, int]
) -> tuple[int, ...]:
  """Shape of one device's shard of a leaf.

  Args:
    name: of the leaf, for errors.
    shape: of the whole leaf.
    spec: how it is cut.
    sizes: of the axes inside a worker.

  Returns:
    The shard's shape.

  Raises:
    ValueError: if the spec does not fit the leaf or the axes.
  """
  if len(spec) > len(shape):
    raise ValueError(
      f'specs must not have more dimensions than their leaf: {name} has shape '
      f'{shape}, got {spec}.'
    )
  cut = list(shape)
  for i, entry in enumerate(spec):
    for axis in _entry_axes(entry):
      if axis not in sizes:
        raise ValueError(
          f'specs must name axes inside a worker, {tuple(sizes)}: got {spec} '
          f'for {name}.'
        )
      if cut[i] % sizes[axis]:
        raise ValueError(
          f'specs must cut their leaf evenly: {name} has shape {shape}, got '
          f'{spec} on axes of sizes {sizes}.'
        )
      cut[i] //= sizes[axis]
  return tuple(cut)


def param_shardings(params: Any, mesh: AnyMesh, axis: Axis, specs: Any) -> Any:
  """Shardings of the parameters, the same for all workers.

  Args:
    params: arrays or shapes.
    mesh: all devices.
    axis: the workers' axis.
    specs: over the other axes, see :func:`leaf_specs`; ``None``: not cut.

  Returns:
    A tree of shardings.

  Raises:
    ValueError: if the specs do not fit the parameters or the mesh, or name an
      axis that the partitioner does not manage.
  """
  paths, treedef = jax.tree_util.tree_flatten_with_path(params)
  if specs is None:
    specs = PartitionSpec()
  sizes = {k: v for k, v in mesh.shape.items() if k not in axis_names(axis)}
  types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
  shardings = []
  for (path, leaf), spec in zip(paths, leaf_specs(specs, params), strict=True):
    name = f'params{jax.tree_util.keystr(path)}'
    shard_shape(name, tuple(leaf.shape), spec, sizes)
    for used in axes_of(spec):
      if types[used] != AxisType.Auto:
        raise ValueError(
          f'specs must name axes of type Auto, as in jax.make_mesh(..., '
          f'axis_types=(AxisType.Auto,) * {len(types)}): axis {used!r} is '
          f'{types[used]}.'
        )
    shardings.append(NamedSharding(mesh, spec))
  return treedef.unflatten(shardings)


def state_shardings(state: Any, mesh: AnyMesh, axis: Axis, specs: Any) -> Any:
  """Shardings of a :class:`jaxdist.TrainState`.

  A leaf that is shaped as a parameter and whose path ends as the parameter's,
  as momenta and residuals do, is cut as it is.

  Args:
    state: shapes as seen from outside the workers.
    mesh: all devices.
    axis: the workers' axis.
    specs: of the parameters, see :func:`param_shardings`.

  Returns:
    A tree of shardings.
  """
  params = state.params
  if isinstance(params, PerWorker):
    strip = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
    params = jax.tree.map(strip, params.value)
  like = {
    path: (tuple(leaf.shape), sharding.spec)
    for (path, leaf), sharding in zip(
      jax.tree_util.tree_leaves_with_path(params),
      jax.tree.leaves(param_shardings(params, mesh, axis, specs)),
      strict=True,
    )
  }

  def inside(path, shape, shards):
    if shards is not None:
      return shard_spec(len(shape), shards)
    for start in range(len(path) + 1):
      its_shape, spec = like.get(path[start:], (None, None))
      if its_shape == shape:
        return spec
    return PartitionSpec()

  def visit(path, node, per_worker=False, shards=None):
    if isinstance(node, PerWorker | PerShard):
      per_worker = per_worker or is_per_worker(node)
      shards = node.axes if isinstance(node, PerShard) else shards
      below = lambda p, x: visit((*path, *p), x, per_worker, shards)
      is_below = lambda x: x is not node and is_node(x)
      return jax.tree_util.tree_map_with_path(below, node, is_leaf=is_below)
    shape = tuple(node.shape)
    if per_worker:
      spec = PartitionSpec(axis, *inside(path, shape[1:], shards))
    else:
      spec = inside(path, shape, shards)
    return NamedSharding(mesh, _as_compiled(spec, mesh))

  is_node = lambda x: isinstance(x, PerWorker | PerShard)
  return jax.tree_util.tree_map_with_path(visit, state, is_leaf=is_node)


def batch_sharding(
  mesh: AnyMesh, axis: Axis, batch_spec: PartitionSpec | None
) -> NamedSharding:
  """Sharding of a batch whose leading axis is divided among the workers.

  Args:
    mesh: all devices.
    axis: the workers' axis.
    batch_spec: how one worker's part is cut over its devices.

  Returns:
    The sharding.
  """
  first, *rest = batch_spec or (None,)
  return NamedSharding(
    mesh, PartitionSpec((*axis_names(axis), *_entry_axes(first)), *rest)
  )


def placed_shapes(shapes: Any, shardings: Any) -> Any:
  """Shapes that know where they lie."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )


def _as_compiled(spec: PartitionSpec, mesh: AnyMesh) -> PartitionSpec:
  """A spec as a compiled program gives it back: without axes of one device.

  With another spelling of the same placement a second step would compile anew.
  """
  entries = []
  for entry in spec:
    axes = tuple(a for a in _entry_axes(entry) if mesh.shape[a] > 1)
    entries.append(axes if len(axes) > 1 else (axes or (None,))[0])
  while entries and entries[-1] is None:
    entries.pop()
  return PartitionSpec(*entries)


def _entry_axes(entry: Any) -> tuple[str, ...]:
  """Axes of one entry of a spec: ``None``, a name or a tuple of names."""
  if entry is None:
    return ()
  return entry if isinstance(entry, tuple) else (entry,)


def check_workers(
  mesh: AnyMesh | None, workers: int | None, axis: Axis, specs: Any
) -> None:
  """Refuses workers that are nowhere, or in two places.

  Raises:
    ValueError: saying what was given.
  """
  if (mesh is None) == (workers is None):
    raise ValueError(
      f'give either mesh (real devices) or workers (simulated on one device), '
      f'got mesh={mesh!r} and workers={workers!r}.'
    )
  if mesh is not None and not set(axis_names(axis)) <= set(mesh.axis_names):
    raise ValueError(
      f'axis must be one of the axes of the mesh, {mesh.axis_names}, got '
      f'{axis!r}.'
    )
  if mesh is None and not isinstance(axis, str):
    raise ValueError(
      f'axis must be one where workers are simulated; several need a mesh: got '
      f'{axis!r}.'
    )
  if workers is not None:
    checks.integer('workers', workers, 1)
  if mesh is None and specs is not None:
    raise ValueError(
      f'specs cut parameters over the devices of a mesh, and simulated workers '
      f'have one device: got specs={specs!r} without mesh.'
    )


def check_batch(batch: Any, count: int) -> None:
  """Refuses batches that cannot be divided among so many workers."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
    if leaf.ndim < 1 or leaf.shape[0] % count:
      raise ValueError(
        f'the leading axis of a batch must be divisible by the number of '
        f'workers, {count}: batch{jax.tree_util.keystr(path)} has shape '
        f'{leaf.shape}.'
      )
