"""From a jitted function to the table of what it sends."""

import math
import re
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxdist.accounting import hlo, walk
from jaxdist.accounting.table import Collective, Traffic

# What tracing puts into a name by itself.
_PLUMBING = re.compile(
  r'shard_map|while|body|cond|branch_\d+_fun|closed_call|eval_jaxpr'
  r'|jaxdist\.every\.\d+|jit\(<lambda>\)|(?:vmap|jvp)\(\)'
)
_HLO_DTYPE = re.compile(r'(bf|f|s|u|c)(\d+)(.*)')
_DTYPE_NAMES = {
  'bf': 'bfloat',
  'f': 'float',
  's': 'int',
  'u': 'uint',
  'c': 'complex',
}


def traffic(step: Any, *args: Any, **kwargs: Any) -> Traffic:
  r"""Reads from the compiled program what a device sends in one step.

  Compiles ``step`` for ``args`` and lists the collectives of the program: all
  of them, those that the partitioner inserted too, with the types that the
  backend really sends. Nothing runs and nothing is donated. For collectives
  :math:`i` with :math:`b_i` bytes sent each time (:class:`Collective` has the
  formulas) that run :math:`t_i` times,

  .. math::

    \text{bytes a step} = \sum_i b_i t_i

  where :math:`t_i` is the product of the lengths of the loops around
  collective :math:`i`, times :math:`1/K` for each branch around it that says
  with ``jax.named_scope('jaxdist.every.K')``, opened inside the branch, that
  it is taken in one of ``K`` steps; those of a warm-up, which say
  ``jaxdist.warmup.I``, are listed and count zero times. Branches that do not
  say so count as always taken, and are marked.

  Collectives among one device are copies and not listed. What kernels send by
  themselves (remote copies in a custom call) is not seen.

  Args:
    step: a jitted function, or a program that was compiled from one.
    *args: its arguments: arrays, or :class:`jax.ShapeDtypeStruct` with
      shardings. None for a compiled program.
    **kwargs: its keyword arguments, likewise.

  Returns:
    A :class:`Traffic`: a table to print, with totals.

  Raises:
    ValueError: if ``step`` is not jitted, or a compiled program is given
      arguments.
    NotImplementedError: if the program sends in a way whose bytes cannot be
      read from it, such as ``ragged_all_to_all``.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import jaxdist as jd
    >>> from jax.sharding import PartitionSpec as P
    >>> mesh = jax.make_mesh(
    ...   (4,), ('data',), devices=jax.devices()[:4],
    ...   axis_types=(jax.sharding.AxisType.Auto,),
    ... )
    >>> @jax.jit
    ... @jax.shard_map(mesh=mesh, in_specs=P('data'), out_specs=P())
    ... def step(gradient):
    ...   return jax.lax.psum(gradient, 'data')
    >>> sent = jd.traffic(step, jnp.zeros(4 * 1000))
    >>> print(sent)
    collective  dtype    shape  axis  group  bytes  times  count  bytes ...
    all-reduce  float32  1000   data      4  6,000      1      1  6,000 ...
    A device sends 6,000 bytes a step.
    >>> sent.by_axis()
    {'data': 6000.0}
  """
  if isinstance(step, jax.stages.Compiled):
    if args or kwargs:
      raise ValueError(
        'args must be empty for a compiled program, which has its own, got'
        f' {len(args) + len(kwargs)}.'
      )
    compiled = step
  elif isinstance(step, jax.stages.Wrapped):
    compiled = step.lower(*args, **kwargs).compile()
  else:
    raise ValueError(
      'step must be a jitted function (jax.jit(step)) or a compiled program,'
      f' got {step!r}.'
    )
  text = compiled.as_text()
  if text is None:
    raise NotImplementedError('This backend does not show compiled programs.')
  shardings = (compiled.input_shardings, compiled.output_shardings)
  meshes = _meshes((args, kwargs), *shardings)
  return Traffic(tuple(_rows(hlo.parse(text), meshes)))


def _rows(
  program: hlo.Program, meshes: list[dict[str, int]]
) -> Iterator[Collective]:
  for run in walk.collectives(program):
    attributes = run.instruction.attributes
    if run.kind == 'collective-permute':
      pairs = [
        pair
        for pair in hlo.source_target_pairs(attributes)
        if pair[0] != pair[1]
      ]
      groups = _connected(pairs)
      axis = _axis_of_pairs(pairs, meshes, program.num_devices)
      sent = Fraction(len(pairs), program.num_devices)
    else:
      groups = hlo.replica_groups(attributes, program.num_devices)
      axis = _axis_of_groups(groups, meshes, program.num_devices)
      # Groups may differ in size: the mean over all devices.
      sent = Fraction(
        sum(len(group) * _ring(run.kind, len(group)) for group in groups),
        sum(map(len, groups)),
      )
    group_size = max(map(len, groups), default=1)
    if group_size == 1:
      continue
    for array in _operands(run):
      yield Collective(
        kind=run.kind,
        dtype=_dtype(array.dtype),
        shape=array.shape,
        operand_bytes=array.num_bytes,
        bytes_sent=float(sent * array.num_bytes),
        axis=axis,
        group_size=group_size,
        times=float(run.times),
        source=_source(run.instruction),
        in_unknown_branch=run.in_unknown_branch,
        in_unknown_loop=run.in_unknown_loop,
      )


def _ring(kind: str, size: int) -> Fraction:
  """Bytes sent for each byte of a device's operand, by a ring algorithm."""
  if kind == 'all-gather':
    return Fraction(size - 1)
  return Fraction(size - 1, size) * (2 if kind == 'all-reduce' else 1)


def _operands(run: walk.Run) -> list[hlo.Array]:
  """What a collective carries; chunks of an ``all-to-all`` as one array."""
  arrays = [array for operand in run.operands for array in operand.arrays]
  if run.kind == 'all-to-all' and len(arrays) > 1 and len(set(arrays)) == 1:
    chunk = arrays[0]
    return [hlo.Array(chunk.dtype, (len(arrays), *chunk.shape))]
  return arrays


def _meshes(*trees: Any) -> list[dict[str, int]]:
  """Axis names and sizes of the meshes in arguments or shardings."""
  meshes: list[dict[str, int]] = []
  for leaf in jax.tree.leaves(trees):
    sharding = getattr(leaf, 'sharding', leaf)
    if isinstance(sharding, NamedSharding):
      mesh = dict(sharding.mesh.shape)
      if mesh not in meshes:
        meshes.append(mesh)
  return meshes


def _axis_of_groups(
  groups: hlo.Groups, meshes: list[dict[str, int]], num_devices: int
) -> str:
  """The axes of the first mesh whose lines, or planes, the groups are."""
  for mesh in meshes:
    if math.prod(mesh.values()) != num_devices:
      continue
    numbers = np.arange(num_devices).reshape(tuple(mesh.values()))
    axes = _differing(groups[0], mesh)
    last = range(-len(axes), 0)
    lines = np.moveaxis(numbers, axes, tuple(last)).reshape(
      -1, math.prod(numbers.shape[axis] for axis in axes)
    )
    if set(map(frozenset, groups)) == set(map(frozenset, lines.tolist())):
      return _names(axes, mesh)
  return '?'


def _axis_of_pairs(
  pairs: list[tuple[int, ...]], meshes: list[dict[str, int]], num_devices: int
) -> str:
  """The axes of the first mesh along which senders and receivers differ."""
  for mesh in meshes:
    if math.prod(mesh.values()) == num_devices:
      axes = {axis for pair in pairs for axis in _differing(pair, mesh)}
      return _names(sorted(axes), mesh)
  return '?'


def _differing(
  devices: tuple[int, ...], mesh: dict[str, int]
) -> tuple[int, ...]:
  """The dimensions of a mesh in which devices have different places."""
  places = np.unravel_index(np.array(devices), tuple(mesh.values()))
  return tuple(
    axis for axis, place in enumerate(places) if len(np.unique(place)) > 1
  )


def _names(axes: Iterable[int], mesh: dict[str, int]) -> str:
  names = list(mesh)
  return ','.join(names[axis] for axis in axes)


def _connected(pairs: list[tuple[int, ...]]) -> hlo.Groups:
  """Devices that reach each other through pairs."""
  groups: list[set[int]] = []
  for pair in pairs:
    joined = set(pair).union(*(g for g in groups if not g.isdisjoint(pair)))
    groups = [g for g in groups if g.isdisjoint(pair)] + [joined]
  return tuple(tuple(sorted(group)) for group in groups)


def _dtype(name: str) -> str:
  """JAX's name of an element type: ``float32`` for ``f32``."""
  found = _HLO_DTYPE.fullmatch(name)
  if not found:
    return 'bool' if name == 'pred' else name
  letters, bits, variant = found.groups()
  return f'{_DTYPE_NAMES[letters]}{bits}{variant and "_"}{variant}'


def _source(instruction: hlo.Instruction) -> str:
  """The end of an instruction's name in the traced function."""
  parts = instruction.op_name.split('/')
  if parts[0].startswith('jit('):
    del parts[0]  # The step itself.
  parts = [part for part in parts if not _PLUMBING.fullmatch(part)]
  # JAX spells a psum whose result is the same everywhere psum_invariant.
  return '/'.join(parts[-3:]).removesuffix('_invariant') or instruction.name
