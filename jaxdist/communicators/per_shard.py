"""Each device exchanges its own shard of what is cut inside a worker."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist import placement
from jaxdist.communicators import base, collectives
from jaxdist.communicators.uncompressed import uncompressed
from jaxdist.state import PerShard, shard_spec


def per_shard(
  communicator: base.Communicator, specs: Any | Callable[[Any], Any]
) -> base.Communicator:
  r"""Lets each device of a worker exchange its own shard of every leaf.

  Where a worker is many devices (a slice, with FSDP or tensor parallelism
  inside), each of them codes what it holds and sends it to the device at the
  same place in the other workers. **On the wire:** along the workers' axis, for
  each device, what the communicator sends for its shards. Nothing is gathered
  inside a worker. What is sharded over the same axes is exchanged together;
  a leaf that is not sharded over an axis is sent by every device along it.

  Needs the other axes of the mesh inside the workers, under
  :func:`jaxdist.train_step` or ``jax.shard_map(..., axis_names={axis})``.

  Args:
    communicator: one along the workers' axis, such as ``jd.mean('dcn', code)``.
      Blocks, buckets and low-rank factors are those of a shard. It sees a tree
      for each kind of sharding, with None in place of the other leaves.
    specs: a tree of :class:`jax.sharding.PartitionSpec`, shaped like the
      updates, over the axes inside a worker; one spec for all leaves; or a
      function from the updates to such a tree.

  Returns:
    A :class:`Communicator`.

  Raises:
    ValueError: if the communicator lies along several axes, or a spec names the
      workers' axis, an axis that the mesh does not have, or more dimensions
      than its leaf has, or does not divide it.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import jaxdist as jd
    >>> from jax.sharding import AxisType
    >>> from jax.sharding import PartitionSpec as P
    >>> mesh = jax.make_mesh((2, 4), ('dcn', 'fsdp'), (AxisType.Auto,) * 2)
    >>> specs = {'w': P('fsdp')}
    >>> communicator = jd.per_shard(jd.mean('dcn', jd.sign()), specs)
    >>> tx = optax.chain(jd.error_feedback(communicator), optax.sgd(0.1))
    >>> params = {'w': jnp.ones((1024, 64))}
    >>> state = jd.init(tx, params, mesh=mesh, axis='dcn', specs=specs)
    >>> tuple(state.opt_state[0].residual.value['w'].sharding.spec)
    ('dcn', 'fsdp')
  """
  base.check_communicator(communicator)
  axis = communicator.axis
  if not isinstance(axis, str):
    raise ValueError(
      f'communicator must lie along one axis, whose workers have devices with '
      f'shards; {communicator!r} lies along {axis}.'
    )

  def init(tree, feedback=False):
    def init_group(group):
      init_shard = lambda leaves: _stacked(
        communicator.init(group.tree(leaves), feedback=feedback), group.axes
      )
      like = collectives.shapes_inside(init_shard, group.specs, group.leaves)
      run = jax.shard_map(
        init_shard,
        in_specs=(group.specs,),
        out_specs=_state_specs(like, group.axes),
      )
      return PerShard(run(group.leaves), group.axes)

    groups = _groups(tree, specs, axis)
    return {name: init_group(group) for name, group in groups.items()}

  def exchange(tree, state):
    leaves, treedef = jax.tree.flatten(tree)
    results, sents, new_state = list(leaves), list(leaves), {}
    for name, group in _groups(tree, specs, axis).items():

      def exchange_shard(leaves, state, group=group):
        result, sent, state = communicator.exchange(
          group.tree(leaves), _local(state, group.axes)
        )
        state = _stacked(state, group.axes)
        return jax.tree.leaves(result), jax.tree.leaves(sent), state

      state_specs = _state_specs(state[name].value, group.axes)
      result, sent, value = jax.shard_map(
        exchange_shard,
        in_specs=(group.specs, state_specs),
        out_specs=(group.specs, group.specs, state_specs),
      )(group.leaves, state[name].value)
      new_state[name] = PerShard(value, group.axes)
      for i, r, s in zip(group.numbers, result, sent, strict=True):
        results[i], sents[i] = r, s
    return treedef.unflatten(results), treedef.unflatten(sents), new_state

  def bytes_sent(tree, workers):
    return sum(
      communicator.bytes_sent(group.tree(group.shards), workers)
      for group in _groups(tree, specs, axis).values()
    )

  return dataclasses.replace(
    communicator,
    name=f'per_shard({communicator!r})',
    init=init,
    exchange=exchange,
    bytes_sent=bytes_sent,
    uncompressed=lambda: per_shard(uncompressed(communicator), specs),
  )


class _Group(NamedTuple):
  """Leaves that are sharded over the same axes.

  Attributes:
    axes: over which they are sharded, in the order of the mesh.
    numbers: their places among all leaves.
    leaves: they themselves.
    shards: shapes and dtypes of what one device holds of them.
    specs: how they are sharded.
    treedef: structure of the whole tree.
  """

  axes: tuple[str, ...]
  numbers: list[int]
  leaves: list[Any]
  shards: list[jax.ShapeDtypeStruct]
  specs: list[PartitionSpec]
  treedef: Any

  def tree(self, leaves: Sequence[Any]) -> Any:
    """The whole tree, with None in place of the leaves of other groups."""
    whole = [None] * self.treedef.num_leaves
    for i, leaf in zip(self.numbers, leaves, strict=True):
      whole[i] = leaf
    return self.treedef.unflatten(whole)


def _groups(tree, specs, axis) -> dict[str, _Group]:
  paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
  sizes = _sizes_inside(paths, axis)
  groups: dict[str, _Group] = {}
  for i, ((path, leaf), spec) in enumerate(
    zip(paths, placement.leaf_specs(specs, tree), strict=True)
  ):
    name = f'updates{jax.tree_util.keystr(path)}'
    shape = placement.shard_shape(name, tuple(leaf.shape), spec, sizes)
    axes = tuple(a for a in sizes if a in placement.axes_of(spec))
    key = ','.join(axes) or 'replicated'
    group = groups.setdefault(key, _Group(axes, [], [], [], [], treedef))
    group.numbers.append(i)
    group.leaves.append(leaf)
    group.shards.append(jax.ShapeDtypeStruct(shape, leaf.dtype))
    group.specs.append(spec)
  return groups


def _sizes_inside(paths, axis) -> dict[str, int]:
  """Sizes of the mesh's axes inside a worker."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:  # Outside of the workers: arrays know where they are placed.
    places = [getattr(leaf, 'sharding', None) for _, leaf in paths]
    meshes = [s.mesh for s in places if isinstance(s, NamedSharding)]
    mesh = meshes[0] if meshes else mesh
  sizes = {name: size for name, size in mesh.shape.items() if name != axis}
  if not sizes:
    raise ValueError(
      f"per_shard needs a mesh with other axes than the workers' {axis!r}, "
      f'and there is none here: run it in jd.train_step(..., mesh=mesh) or '
      f'jax.shard_map, and give bytes_sent arrays that are placed on the mesh.'
    )
  return sizes


def _stacked(state, axes):
  """Gives each leaf a dimension for the shards: the second, if it has any."""
  if not axes:
    return state
  return jax.tree.map(lambda x: x[:, None] if x.ndim else x[None], state)


def _local(state, axes):
  if not axes:
    return state
  return jax.tree.map(lambda x: x[:, 0] if x.ndim > 1 else x[0], state)


def _state_specs(state, axes):
  return jax.tree.map(lambda x: shard_spec(x.ndim, axes), state)
