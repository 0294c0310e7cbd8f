"""Where the workers live: a device each, or all simulated on one."""

import glob
import os
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = 'data'
# Where the devices do not say.
WORKERS = 8


def launch() -> str:
  """Who started this process, the same when it begins anew after a failure."""
  return os.environ.get('SLURM_JOB_ID') or f'process {os.getppid()}'


def hush_tpu_compiler() -> None:
  """Tells the TPU compiler where it is; without a TPU it complains otherwise.

  To be called before JAX is first used.
  """
  if not glob.glob('/dev/accel[0-9]*') + glob.glob('/dev/vfio/[0-9]*'):
    os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-4')
    os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')


def prepare_devices(workers: int | None, processes: int = 1) -> None:
  """Divides the CPU into devices; to be called before JAX is first used.

  Beside accelerators they cost nothing, and there is a mesh to compile for.

  Args:
    workers: how many; None for the usual number.
    processes: how many divide them among each other.

  Raises:
    ValueError: they cannot be divided.
  """
  workers = workers or max(WORKERS // processes, 1) * processes
  if workers % processes:
    raise ValueError(
      f'--workers must be divisible by the number of processes, {processes}, '
      f'got {workers}.'
    )
  hush_tpu_compiler()
  platforms = jax.config.jax_platforms
  if platforms and 'cpu' not in platforms.split(','):
    jax.config.update('jax_platforms', f'{platforms},cpu')
  jax.config.update('jax_num_cpu_devices', workers // processes)
  # With several steps in flight on few cores, a collective can wait for a
  # device that has no thread until the process is aborted.
  jax.config.update('jax_cpu_enable_async_dispatch', False)


class Place(NamedTuple):
  """Where the workers live.

  Attributes:
    workers: how many there are.
    mesh: one device each; None where they are simulated on one device.
    counted_on: a mesh to read what is sent from, where they are simulated.
    words: the same for the reader.
  """

  workers: int
  mesh: Mesh | None
  counted_on: Mesh | None
  words: str

  def arguments(self) -> dict[str, Any]:
    """How :mod:`jaxdist` is told."""
    if self.mesh is None:
      return {'workers': self.workers, 'axis': AXIS}
    return {'mesh': self.mesh, 'axis': AXIS}

  def simulated(self) -> 'Place':
    """The same workers on one device, without collectives between threads."""
    return self._replace(mesh=None, counted_on=self.mesh or self.counted_on)

  def put(self, batch: np.ndarray) -> jax.Array:
    """Gives each worker its rows."""
    if self.mesh is None:
      return jax.device_put(batch)
    # Each process has the whole batch and puts what its own devices need.
    return jax.make_array_from_callback(
      batch.shape,
      NamedSharding(self.mesh, PartitionSpec(AXIS)),
      batch.__getitem__,
    )


def find_place(workers: int | None) -> Place:
  """Takes the devices that are there; simulates where they are too few.

  Args:
    workers: how many; None for one a device, or eight on a single device.

  Returns:
    The place.

  Raises:
    ValueError: of several processes, some would have nothing to do.
  """
  devices = jax.devices()
  workers = workers or (len(devices) if len(devices) > 1 else WORKERS)
  if jax.process_count() > 1 and workers != len(devices):
    raise ValueError(
      f'--workers must be the number of devices of all {jax.process_count()} '
      f'processes, {len(devices)}, got {workers}.'
    )

  def make_mesh(devices):
    return jax.make_mesh(
      (workers,),
      (AXIS,),
      axis_types=(AxisType.Auto,),
      devices=devices[:workers],
    )

  kind = devices[0].device_kind
  if len(devices) >= workers:
    words = f'{workers} workers on {workers} {kind} devices'
    return Place(workers, make_mesh(devices), None, words)
  words = (
    f'{workers} workers simulated on one {kind}; bytes are those of the '
    f'same step compiled for {workers} CPU devices'
  )
  return Place(workers, None, make_mesh(jax.devices('cpu')), words)
