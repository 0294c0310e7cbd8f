"""Meshes of pods and clusters that nobody has, to compile programs for."""

import contextlib
import glob
import importlib.util
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from jaxdist import compat
from jaxdist.accounting import gpus

_TWO_SIDES = '2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16'
_THREE_SIDES = '2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8, 4x8x8, 8x8x8, ...'
_COMPILED_FOR = {
  'v4': _THREE_SIDES,
  'v5e': _TWO_SIDES,
  'v5p': _THREE_SIDES,
  'v6e': _TWO_SIDES,
  'tpu7x': _THREE_SIDES,
}
# The two cores of a v4 chip run as one device; its compiler alone must be told.
_OPTIONS = {'v4': {'chip_config_name': 'megacore'}}
# What the compiler wants to know of the host before it starts. No TPU hangs on
# this one: the names only have to be good ones. Without the first it asks a
# metadata server that isn't there, for minutes; the last lets processes share
# a lock that guards chips.
_HOST = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}


def topology_mesh(
  topology: str,
  axes: Mapping[str, int],
  *,
  slices: int = 1,
  axis_types: Any = None,
) -> Mesh:
  """A mesh over TPU slices, or hosts of GPUs, that need not exist.

  Programs can be compiled for it on any x86-64 Linux machine, none can run.
  Chips are numbered as on the real pods: the first axes go over slices, and
  inside a slice the last axes over neighbours. **On the wire:** nothing; with
  :func:`jaxdist.traffic` it tells what a step will send. For GPUs JAX's own
  devices are found first, as by ``jax.devices()``.

  Args:
    topology: of TPUs, generation and chips along each side of one slice, such
      as ``'v5e:4x4'`` or ``'v5p:4x4x8'``; of GPUs, which, and how many a host
      has, such as ``'h100:8'``.
    axes: names and sizes of the mesh's axes, those between slices first. Their
      product is the number of devices: chips times ``slices``, and on tpu7x
      twice that, two to a chip.
    slices: number of slices, linked by the data-centre network; of GPUs, of
      hosts, linked by theirs.
    axis_types: as in :class:`jax.sharding.Mesh`; ``Auto`` if left out.

  Returns:
    A :class:`jax.sharding.Mesh`, for :func:`jaxdist.init` (with
    :class:`jax.ShapeDtypeStruct`), :func:`jaxdist.train_step`, and shardings.

  Raises:
    ValueError: for a topology that the compiler doesn't know, or axes that do
      not take all of its devices.
    ImportError: if its compiler is not installed: libtpu, or for GPUs the
      plugin of ``jax[cuda]``, which may also lie in a folder apart that the
      environment variable ``JAXDIST_CUDA_COMPILER`` names; the message says
      how.

  Examples:
    >>> import jaxdist as jd
    >>> mesh = jd.topology_mesh('v5e:2x2', {'dcn': 2, 'data': 4}, slices=2)
    >>> mesh.shape['dcn'], mesh.devices[1, 0].slice_index
    (2, 1)
  """
  devices = topology_devices(topology, slices)
  names, sizes = tuple(axes), tuple(axes.values())
  if math.prod(sizes) != len(devices):
    raise ValueError(
      f'axes must take all {len(devices)} devices of {slices} x {topology},'
      f' got {dict(axes)}, which take {math.prod(sizes)}.'
    )
  inner = _within_slice(sizes, slices)
  if inner is None:
    raise ValueError(
      f'axes must go over the {slices} slices first and then over the chips of'
      f' one, got {dict(axes)}: its first sizes do not multiply to {slices}.'
    )
  by_slice = np.array(devices).reshape(slices, -1)
  placed = np.stack(
    [
      mesh_utils.create_device_mesh(
        inner, list(row), allow_split_physical_axes=True
      )
      for row in by_slice
    ]
  )
  types = axis_types or (AxisType.Auto,) * len(names)
  return Mesh(placed.reshape(sizes), names, axis_types=types)


def topology_devices(topology: str, slices: int = 1) -> list[Any]:
  """The devices of some slices, or hosts of GPUs, one by one.

  Args:
    topology: as for :func:`topology_mesh`.
    slices: likewise.

  Returns:
    Devices that only compile.
  """
  if slices < 1:
    raise ValueError(f'slices must be at least 1, got {slices}.')
  if gpus.is_gpu(topology):
    return gpus.gpu_devices(topology, slices)
  if importlib.util.find_spec('libtpu') is None:
    raise ImportError(
      f'topology={topology!r} needs the TPU compiler: pip install'
      " 'jaxdist[tpu]' (Linux on x86-64; no TPU is needed)."
    )
  options = dict(_OPTIONS.get(topology.partition(':')[0], {}))
  if slices > 1:
    options['num_slices'] = slices
  try:
    with _quiet_host():
      description = topologies.get_topology_desc(
        topology_name=topology, platform='tpu', **options
      )
  except jax.errors.JaxRuntimeError as error:
    known = '; '.join(f'{name}: {of}' for name, of in _COMPILED_FOR.items())
    raise ValueError(
      'topology must be a TPU generation and the chips along each side of a'
      " slice, such as 'v5e:4x4', or a GPU and how many a host has, such as"
      f" 'h100:8', got {topology!r}. These compile: {known};"
      f' {", ".join(gpus.GPUS)}: any number.'
    ) from error
  return sorted(description.devices, key=lambda d: (slice_of(d), d.id))


def place(tree: Any, topology: str, slices: int) -> Any:
  """Arguments as they would lie on the slices of a topology.

  Args:
    tree: arrays, or :class:`jax.ShapeDtypeStruct`; those with a
      :class:`jax.sharding.NamedSharding` over a mesh of this topology, or over
      any other one of as many devices, abstract or real.
    topology: as for :func:`topology_mesh`.
    slices: likewise.

  Returns:
    Shapes in place of arrays, with shardings over a mesh of the topology that
    has the same axes.

  Raises:
    ValueError: if a mesh does not fit the topology.
  """
  devices = topology_devices(topology, slices)
  expected = (devices[0].device_kind, len(devices), slices)
  meshes: dict[Any, Mesh] = {}

  def mesh_like(mesh):
    real = () if isinstance(mesh, AbstractMesh) else tuple(mesh.devices.flat)
    if not real or real[0].platform != devices[0].platform:
      return topology_mesh(
        topology, mesh.shape, slices=slices, axis_types=mesh.axis_types
      )
    found = (real[0].device_kind, len(real), len(set(map(slice_of, real))))
    if found != expected:
      say = '{1} devices of {0} in {2} slices'.format
      raise ValueError(
        f'the mesh of the arguments must fit topology={topology!r} and'
        f' slices={slices}, {say(*expected)}, got {say(*found)}.'
      )
    return mesh

  def moved(leaf):
    if not hasattr(leaf, 'shape') or not hasattr(leaf, 'dtype'):
      return leaf
    sharding = getattr(leaf, 'sharding', None)
    if isinstance(sharding, NamedSharding):
      if sharding.mesh not in meshes:
        meshes[sharding.mesh] = mesh_like(sharding.mesh)
      sharding = NamedSharding(meshes[sharding.mesh], sharding.spec)
    else:
      sharding = None
    weak = getattr(leaf, 'weak_type', False)
    return jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding, weak_type=weak
    )

  return jax.tree.map(moved, tree)


def slice_of(device: Any) -> int:
  """Which slice a TPU is in, which host, or NVLink domain, a GPU.

  Processes on one host share the ``slice_index`` of their GPUs; GPUs that only
  compile have none worth the name, and a process for each host.
  """
  number = getattr(device, 'slice_index', None)
  if device.platform == 'gpu' and (
    number is None or compat.only_compiles(device)
  ):
    return device.process_index
  return number or 0


def _within_slice(
  sizes: tuple[int, ...], slices: int
) -> tuple[int, ...] | None:
  """The part of a mesh's shape inside a slice, behind the part between them.

  Examples:
    >>> _within_slice((2, 16), 2), _within_slice((8, 4), 2)
    ((16,), (4, 4))
    >>> _within_slice((3, 4), 2) is None
    True
  """
  for place, size in enumerate(sizes):
    if slices == 1:
      return sizes[place:]
    if size <= slices:
      if slices % size:
        return None
      slices //= size
    else:
      return None if size % slices else (size // slices, *sizes[place + 1 :])
  return () if slices == 1 else None


@contextlib.contextmanager
def _quiet_host() -> Iterator[None]:
  """Tells the TPU compiler about its host, unless that has a real TPU.

  The process's environment is as before when it ends: neither a backend that
  starts later nor a child process should believe in this TPU.
  """
  # Where chips seem to be, the backend comes first and finds its own way.
  chips = glob.glob('/dev/accel[0-9]*') + glob.glob('/dev/vfio/[0-9]*')
  if chips and jax.default_backend() == 'tpu':
    yield
    return
  missing = {k: v for k, v in _HOST.items() if k not in os.environ}
  os.environ.update(missing)
  try:
    yield
  finally:
    for name in missing:
      os.environ.pop(name, None)
