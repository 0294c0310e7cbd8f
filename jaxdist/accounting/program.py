"""From a jitted function to the table of what it sends."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from jaxdist.accounting import hlo
from jaxdist.accounting.chips import chip_of
from jaxdist.accounting.collective import Memory
from jaxdist.accounting.links import Places
from jaxdist.accounting.rows import rows
from jaxdist.accounting.schedule import Clocks
from jaxdist.accounting.table import Traffic
from jaxdist.accounting.topology import place
from jaxdist.accounting.widened import notes
from jaxdist.accounting.work import Estimate


def traffic(
  step: Any,
  *args: Any,
  topology: str | None = None,
  slices: int = 1,
  **kwargs: Any,
) -> Traffic:
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

  For a pod that is not there, give ``step`` and its arguments a mesh of
  :func:`jaxdist.topology_mesh`; or make them over an abstract mesh, or over one
  of as many other devices if ``step`` itself is bound to none, and say
  ``topology``: the same step can then be read for many pods.

  Args:
    step: a jitted function, or a program that was compiled from one.
    *args: its arguments: arrays, or :class:`jax.ShapeDtypeStruct` with
      shardings. None for a compiled program.
    topology: TPU slice, or host of GPUs, to compile for, such as ``'v5e:4x4'``
      or ``'h100:8'``, as for :func:`jaxdist.topology_mesh`; if left out, the
      devices that the arguments lie on.
    slices: number of such slices or hosts.
    **kwargs: its keyword arguments, likewise.

  Returns:
    A :class:`Traffic`: a table to print, with totals.

  Raises:
    ValueError: if ``step`` is not jitted, a compiled program is given
      arguments, the topology is unknown, or a mesh does not fit it.
    ImportError: if ``topology`` is given and its compiler is not installed.
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
    collective  dtype    shape  axis  link           group  bytes  ...
    all-reduce  float32  1000   data  inside a host      4  6,000  ...
    A device sends 6,000 bytes a step (inside a host: 6,000).
    Memory of a device: 0.0 MB (arguments 0.0 MB, ...
    >>> sent.by_axis()
    {'data': 6000.0}
  """
  if isinstance(step, jax.stages.Compiled):
    if args or kwargs or topology:
      raise ValueError(
        'args and topology must be left out for a compiled program, which has'
        f' its own, got {len(args) + len(kwargs)} and {topology}.'
      )
    traced, compiled = None, step
  elif isinstance(step, jax.stages.Wrapped):
    traced, compiled = _compile(step, args, kwargs, topology, slices)
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
  program = hlo.parse(text)
  chip = chip_of(next(iter(jax.tree.leaves(shardings)[0].device_set)))
  estimate = Estimate(program, chip)
  clocks = Clocks(program, estimate)
  sent = tuple(rows(program, Places.of(meshes, program.num_devices), clocks))
  sending = {program.entry: 'program'} | {
    row.schedule: row.within for row in sent
  }
  return Traffic(
    sent,
    memory=_memory(compiled),
    work=estimate.computation(program.entry),
    notes=notes(traced.jaxpr, sent) if traced else (),
    schedules=tuple(
      clocks.of(name).schedule(kind) for name, kind in sending.items()
    ),
  )


def _compile(step, args, kwargs, topology, slices):
  if topology is None:
    if slices != 1:
      raise ValueError(
        f'slices must come with the topology of one of them, got {slices}.'
      )
    traced = step.trace(*args, **kwargs)
    return traced, traced.lower().compile()
  args, kwargs = place((args, kwargs), topology, slices)
  try:
    traced = step.trace(*args, **kwargs)
    compiled = traced.lower().compile()
  except ValueError as error:
    if 'incompatible devices' not in str(error):
      raise
    raise ValueError(
      f'step must not be bound to other devices than those of {topology}: make'
      ' it over mesh=jd.topology_mesh(...), or over a jax.sharding.AbstractMesh'
      ' such as mesh.abstract_mesh.'
    ) from error
  shardings = (compiled.input_shardings, compiled.output_shardings)
  platforms = {
    device.platform
    for sharding in jax.tree.leaves(shardings)
    for device in sharding.device_set
  }
  if 'cpu' in platforms:
    raise ValueError(
      'step or args must say over which axes they lie: give args a'
      ' NamedSharding, over jd.topology_mesh(...) or a'
      ' jax.sharding.AbstractMesh of the same axes.'
    )
  return traced, compiled


def _meshes(*trees: Any) -> list[Mesh]:
  """The meshes in arguments or shardings."""
  meshes: list[Mesh] = []
  for leaf in jax.tree.leaves(trees):
    sharding = getattr(leaf, 'sharding', leaf)
    if isinstance(sharding, NamedSharding) and sharding.mesh not in meshes:
      meshes.append(sharding.mesh)
  return [mesh for mesh in meshes if isinstance(mesh, Mesh)]


def _memory(compiled: jax.stages.Compiled) -> Memory | None:
  """What a device's memory holds, if the backend says so."""
  stats = compiled.memory_analysis()
  if stats is None:
    return None
  return Memory(
    arguments=stats.argument_size_in_bytes,
    outputs=stats.output_size_in_bytes,
    temporaries=stats.temp_size_in_bytes,
    aliased=stats.alias_size_in_bytes,
    code=stats.generated_code_size_in_bytes,
  )
