"""Hosts of GPUs that nobody has, to compile programs for."""

import dataclasses
import importlib.metadata
import os
import re
import sys
from typing import Any

from jaxdist import compat
from jaxdist.accounting.chips import CHIPS

# Where XLA's compiler for GPUs lies, if it is not installed beside JAX, which
# would then look for GPUs whenever it starts, and say that there are none.
FOLDER = 'JAXDIST_CUDA_COMPILER'
_PACKAGES = {'jax-cuda13-pjrt': 'xla_cuda13', 'jax-cuda12-pjrt': 'xla_cuda12'}


@dataclasses.dataclass(frozen=True)
class Gpu:
  """What XLA's compiler wants to know of a GPU, beside :data:`CHIPS`.

  Attributes:
    kind: its name, as ``device.device_kind`` has it.
    capability: compute capability.
    multiprocessors: how many.
    clock_ghz: of them, at most.
    fp32_units: a multiprocessor.
    memory_gb: of the device; 1 GB is a thousand million bytes.
    l2_mib: of the second cache.
    shared_kib: memory of a multiprocessor that its threads share.
  """

  kind: str
  capability: tuple[int, int]
  multiprocessors: int
  clock_ghz: float
  fp32_units: int
  memory_gb: float
  l2_mib: int
  shared_kib: int

  def target_config(self) -> str:
    """The same as text of XLA's ``GpuTargetConfigProto``."""
    major, minor = self.capability
    return f"""
      platform_name: "CUDA"
      device_description_str: "{self.kind}"
      dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
      gpu_device_info {{
        cuda_compute_capability {{ major: {major} minor: {minor} }}
        core_count: {self.multiprocessors}
        fpus_per_core: {self.fp32_units}
        clock_rate_ghz: {self.clock_ghz}
        device_memory_size: {int(self.memory_gb * 1e9)}
        memory_bandwidth: {int(CHIPS[self.kind].memory_bytes)}
        l2_cache_size: {self.l2_mib * 2**20}
        shared_memory_per_core: {self.shared_kib * 2**10}
        shared_memory_per_block: {48 * 2**10}
        shared_memory_per_block_optin: {(self.shared_kib - 1) * 2**10}
        threads_per_block_limit: 1024
        threads_per_core_limit: 2048
        threads_per_warp: 32
        registers_per_core_limit: 65536
        registers_per_block_limit: 65536
        block_dim_limit_x: 2147483647
        block_dim_limit_y: 65535
        block_dim_limit_z: 65535
      }}
    """


# From the maker's data sheets, architecture white papers and CUDA guide:
# resources.nvidia.com, docs.nvidia.com/cuda. Numbers in the attributes' order.
GPUS: dict[str, Gpu] = {
  'a100': Gpu('NVIDIA A100-SXM4-80GB', (8, 0), 108, 1.41, 64, 80, 40, 164),
  'h100': Gpu('NVIDIA H100 80GB HBM3', (9, 0), 132, 1.98, 128, 80, 50, 228),
  'h200': Gpu('NVIDIA H200', (9, 0), 132, 1.98, 128, 141, 50, 228),
  'b200': Gpu('NVIDIA B200', (10, 0), 148, 1.965, 128, 180, 126, 228),
}


def is_gpu(topology: str) -> bool:
  """Whether a topology names GPUs."""
  return topology.partition(':')[0] in GPUS


def gpu_devices(topology: str, hosts: int) -> list[Any]:
  """The GPUs of some hosts, host by host.

  Args:
    topology: which GPU, and how many a host has: ``'h100:8'``.
    hosts: how many.

  Returns:
    Devices that only compile; ``process_index`` says which host.

  Raises:
    ValueError: if it does not say how many.
    ImportError: if the compiler is not there, or is of another JAX.
  """
  name, _, count = topology.partition(':')
  if not re.fullmatch(r'[1-9]\d{0,3}', count):
    raise ValueError(
      'topology must be a GPU and how many of them a host has, such as'
      f" 'h100:8', got {topology!r}."
    )
  return compat.cuda_devices(
    lambda: compiler(topology),
    target_config=GPUS[name].target_config(),
    topology=f'1x{hosts}x{count}',
  )


def compiler(topology: str) -> str:
  """Where XLA's compiler for GPUs is.

  Args:
    topology: what it is needed for.

  Returns:
    The path of a library.

  Raises:
    ImportError: if it is not there, or is of another JAX.
  """
  wanted = importlib.metadata.version('jaxlib')
  install = (
    f'pip install --no-deps --target DIRECTORY jax-cuda13-pjrt=={wanted} and'
    f' {FOLDER}=DIRECTORY (Linux on x86-64; no GPU is needed).'
  )
  folder = os.environ.get(FOLDER)
  for package, plugin in _PACKAGES.items():
    for found in importlib.metadata.distributions(
      name=package, path=sys.path if folder is None else [folder]
    ):
      if found.version.split('.')[:2] != wanted.split('.')[:2]:
        raise ImportError(
          f'topology={topology!r} needs {package} of the same version as'
          f' jaxlib, {wanted}, got {found.version}: {install}'
        )
      library = found.locate_file(f'jax_plugins/{plugin}/xla_cuda_plugin.so')
      return os.path.abspath(library)
  raise ImportError(
    f"topology={topology!r} needs XLA's compiler for GPUs: {install}"
  )
