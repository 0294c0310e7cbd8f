"""What chips do at best: a table to extend."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peak rates of one device, as JAX counts devices.

  Attributes:
    flops: bfloat16 operations of matrix products a second.
    memory_bytes: bytes a second from and to its memory.
  """

  flops: float
  memory_bytes: float


# By ``device.device_kind``, from the makers' data sheets: cloud.google.com/tpu
# and nvidia.com. A TPU7x chip is two devices. Of a CPU, only a usual ratio.
CHIPS: dict[str, Chip] = {
  'TPU v4': Chip(275e12, 1228e9),
  'TPU v5 lite': Chip(197e12, 819e9),
  'TPU v5': Chip(459e12, 2765e9),
  'TPU v6 lite': Chip(918e12, 1640e9),
  'TPU7x': Chip(2307e12 / 2, 7380e9 / 2),
  'NVIDIA A100-SXM4-80GB': Chip(312e12, 2039e9),
  'NVIDIA H100 80GB HBM3': Chip(989e12, 3350e9),
  'NVIDIA H200': Chip(989e12, 4800e9),
  'NVIDIA B200': Chip(2250e12, 8000e9),
  'cpu': Chip(200e9, 20e9),
}
_USUAL = CHIPS['TPU v5 lite']


def chip_of(device: Any) -> Chip:
  """The rates of a device; those of a TPU v5e where it is not in the table."""
  return CHIPS.get(device.device_kind, _USUAL)
