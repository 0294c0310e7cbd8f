"""What links carry at best: a table to extend."""

import dataclasses

from jaxdist.accounting.links import (
  BETWEEN_HOSTS,
  BETWEEN_SLICES,
  CHIP_LINKS,
  INSIDE_A_HOST,
)


@dataclasses.dataclass(frozen=True)
class Link:
  """One device's share of a link.

  Attributes:
    bytes_per_second: that a device sends while it receives as many.
    latency: seconds that a collective takes before any bytes.
  """

  bytes_per_second: float
  latency: float = 0.0

  def __post_init__(self):
    if not self.bytes_per_second > 0:
      raise ValueError(
        f'bytes_per_second must be positive, got {self.bytes_per_second}.'
      )
    if not self.latency >= 0:
      raise ValueError(f'latency must not be negative, got {self.latency}.')

  def seconds(self, num_bytes: float, rounds: int = 1) -> float:
    """How long so many bytes take, sent in so many collectives."""
    return rounds * self.latency + num_bytes / self.bytes_per_second


def _gbit(gbits: float, latency: float) -> Link:
  return Link(gbits * 1e9 / 8, latency)


def _gpu(nvlink: float, adapter: float) -> dict[str, Link]:
  return {
    INSIDE_A_HOST: _gbit(nvlink, 1e-5),
    BETWEEN_HOSTS: _gbit(adapter, 1e-4),
  }


# By ``device.device_kind`` and the link's name in :class:`jaxdist.Traffic`.
# Chip links: the published rate of a chip's links together. Between slices: the
# published data-centre bandwidth of a pod, or of a chip, for each chip; where
# it is not published it is left out. cloud.google.com/tpu/docs, pages v4, v5e,
# v5p, v6e and tpu7x; a TPU7x chip is two devices. GPUs: one way of NVLink, and
# a GPU's own network adapter, as in the maker's DGX A100, H100, H200 and B200
# (nvidia.com). Latencies are guesses of the right size: a microsecond on a
# board, ten for NVLink, a tenth of a millisecond between racks.
LINKS: dict[str, dict[str, Link]] = {
  'TPU v4': {CHIP_LINKS: _gbit(2400.0, 1e-6)},
  'TPU v5 lite': {
    CHIP_LINKS: _gbit(1600.0, 1e-6),
    BETWEEN_SLICES: _gbit(6400 / 256, 1e-4),
  },
  'TPU v5': {
    CHIP_LINKS: _gbit(4800.0, 1e-6),
    BETWEEN_SLICES: _gbit(50.0, 1e-4),
  },
  'TPU v6 lite': {
    CHIP_LINKS: _gbit(3200.0, 1e-6),
    BETWEEN_SLICES: _gbit(25600 / 256, 1e-4),
  },
  'TPU7x': {CHIP_LINKS: _gbit(9600 / 2 / 2, 1e-6)},
  'NVIDIA A100-SXM4-80GB': _gpu(2400.0, 200.0),
  'NVIDIA H100 80GB HBM3': _gpu(3600.0, 400.0),
  'NVIDIA H200': _gpu(3600.0, 400.0),
  'NVIDIA B200': _gpu(7200.0, 400.0),
}
