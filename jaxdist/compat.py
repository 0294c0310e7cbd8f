"""All that differs between the supported versions of JAX, 0.10 to 0.12.

Also all that JAX and Python have and do not show.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend
from jax._src import clusters, dispatch, distributed
from jax._src.lib import _jax, xla_client
from jax.experimental import topologies
from jax.interpreters import batching, mlir


def varying_axes(x: Any) -> frozenset[str]:
  """Names of the manual axes that an array's type says it varies over.

  Empty outside ``shard_map``, under ``check_vma=False``, and under ``vmap`` and
  ``pmap``, where JAX does not track it.
  """
  aval = jax.typeof(x)
  if hasattr(aval, 'mat'):
    return aval.mat.varying
  return aval.vma


def agreed(x: jax.Array, axis: str) -> jax.Array:
  """Marks an array as the same along an axis, which nobody checks.

  ``jax.lax.pcast`` goes the other way only.
  """
  return _agreed.bind(x, axis=axis)


_agreed = jax.extend.core.Primitive('jaxdist_agreed')


@_agreed.def_abstract_eval
def _agreed_type(x, *, axis):
  if hasattr(x, 'mat'):
    kind = x.mat.update(varying=x.mat.varying - {axis})
    return x.update(manual_axis_type=kind)
  return x.update(vma=x.vma - {axis})


mlir.register_lowering(_agreed, lambda ctx, x, *, axis: [x])
batching.primitive_batchers[_agreed] = lambda args, dims, *, axis: (
  agreed(*args, axis),
  *dims,
)


def detect_cluster(
  coordinator_address: str | None,
  num_processes: int | None,
  process_id: int | None,
  local_device_ids: Sequence[int] | None,
  timeout_seconds: int,
) -> tuple[Any, ...]:
  """Fills in what TPU pods, Slurm, Open MPI and Kubernetes tell.

  ``jax.distributed.initialize`` does so too, but keeps it to itself.
  """
  return clusters.ClusterEnv.auto_detect_unset_distributed_params(
    coordinator_address,
    num_processes,
    process_id,
    local_device_ids,
    None,
    timeout_seconds,
  )


def coordination_client() -> Any:
  """The client of the coordination service, which has a key-value store."""
  return distributed.global_state.client


def before_threads_end(function: Callable[[], Any]) -> Callable[[], Any]:
  """Calls a function when Python begins to exit.

  ``atexit`` is later: when no thread can begin anything more.
  """
  threading._register_atexit(function)
  return function


def set_gloo_host(host: str) -> None:
  """Makes gloo listen at an address; to be called before JAX is first used.

  JAX passes none on, and gloo takes what the machine's name resolves to.
  """
  _jax.make_gloo_tcp_collectives = functools.partial(
    _jax.make_gloo_tcp_collectives, hostname=host
  )


def cuda_devices(library: Callable[[], str], **options: str) -> list[Any]:
  """GPUs that only compile, from XLA's compiler for them.

  It is JAX's own where JAX has one, and else that of a library, which is asked
  for once: no other one can be loaded after it.
  """
  jax.devices()  # JAX loads its own now, or not at all.
  if not xla_client.pjrt_plugin_loaded('cuda'):
    _loaded.append(xla_client.load_pjrt_plugin_dynamically('cuda', library()))
  if not xla_client.pjrt_plugin_initialized('cuda'):
    xla_client.initialize_pjrt_plugin('cuda')
  if not _loaded:
    return topologies.get_topology_desc('', 'cuda', **options).devices
  described = xla_client.make_c_api_device_topology(_loaded[0], '', **options)
  return described._make_compile_only_devices()


_loaded: list[Any] = []


def only_compiles(device: Any) -> bool:
  """Whether a device is one of a topology, on which nothing can run."""
  return isinstance(device.client, _jax.CompileOnlyPyClient)


# Compiles and runs a primitive by itself, as under jax.disable_jit().
apply_primitive = dispatch.apply_primitive


def load_registers(ref: Any, at: tuple[Any, ...], layout: Any) -> jax.Array:
  """Reads a part of a GPU's memory into registers, in a kernel by Mosaic."""
  from jax.experimental.pallas import mosaic_gpu

  if hasattr(mosaic_gpu, 'store'):
    return mosaic_gpu.load(ref.at[at], layout=layout, optimized=False)
  return mosaic_gpu.load(ref, at, layout=layout, optimized=False)


def store_registers(ref: Any, at: tuple[Any, ...], value: jax.Array) -> None:
  """The inverse of :func:`load_registers`."""
  from jax.experimental.pallas import mosaic_gpu

  if hasattr(mosaic_gpu, 'store'):
    mosaic_gpu.store(ref.at[at], value, optimized=False)
  else:
    ref[at] = value
