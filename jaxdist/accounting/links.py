"""Which devices of a mesh a collective joins, and by which link."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxdist.accounting import hlo
from jaxdist.accounting.topology import slice_of

BETWEEN_SLICES = 'between slices'
CHIP_LINKS = 'chip links'
BETWEEN_HOSTS = 'between hosts'
INSIDE_A_HOST = 'inside a host'
UNKNOWN = '?'

# {1,2}x{0:3}: chips 0 to 3 of slices 1 and 2, each with its like.
_ALIKE = re.compile(r'^"\{([\d,:]+)\}x\{([\d,:]+)\}"$')
_SLICE = 100_000  # the compiler's number of a chip: slice * _SLICE + chip


@dataclasses.dataclass(frozen=True)
class Places:
  """Where the devices that run a program stand.

  Attributes:
    devices: in the order of the mesh that the program was compiled for; empty
      where no mesh was found.
    meshes: axis names and sizes, and devices, of all meshes that were found.
    num_devices: devices that the program's text numbers, from 0 up. A
      program for several slices is that of one of them, and numbers its own
      in the order of the mesh.
  """

  devices: tuple[Any, ...]
  meshes: tuple[tuple[dict[str, int], tuple[Any, ...]], ...]
  num_devices: int

  @classmethod
  def of(cls, meshes: Sequence[Any], num_devices: int) -> 'Places':
    """Finds the devices of a program among the meshes of its arguments."""
    whole = [
      (dict(mesh.shape), tuple(mesh.devices.flat))
      for mesh in meshes
      if mesh.size == num_devices * _num_slices(mesh.devices.flat)
    ]
    return cls(whole[0][1] if whole else (), tuple(whole), num_devices)

  def groups(self, numbers: hlo.Groups) -> hlo.Groups:
    """From the program's numbers to positions in :attr:`devices`."""
    if not self.devices:
      return numbers
    return tuple(
      tuple(positions[number] for number in group)
      for positions in self._by_slice
      for group in numbers
    )

  def groups_between_slices(self, target: str) -> hlo.Groups:
    """The same from the target of a transfer between slices.

    Args:
      target: ``"{1,2}x{0:3}"``, ``{{100000,200000},...}`` or, for transfers
        from one to one, ``{{100000->200000},...}``.

    Returns:
      Groups of positions, or pairs of sender and receiver.
    """
    if alike := _ALIKE.match(target):
      slices, chips = map(_numbers, alike.groups())
      groups = [[s * _SLICE + chip for s in slices] for chip in chips]
    else:
      groups = [
        _numbers(group) for group in re.findall(r'\{([\d,>-]+)\}', target)
      ]
    position = {device.id: i for i, device in enumerate(self.devices)}
    missing = {i for group in groups for i in group} - position.keys()
    if missing or not groups:
      raise NotImplementedError(
        f'The devices of a transfer between slices cannot be read: {target}.'
      )
    return tuple(tuple(position[i] for i in group) for group in groups)

  def link(self, group: Sequence[int]) -> str:
    """The slowest link between devices of a group of positions."""
    if not self.devices:
      return UNKNOWN
    members = [self.devices[position] for position in group]
    if members[0].platform == 'tpu':
      apart = len({slice_of(device) for device in members}) > 1
      return BETWEEN_SLICES if apart else CHIP_LINKS
    if members[0].platform == 'gpu':
      hosts = {slice_of(device) for device in members}
    else:
      hosts = {device.process_index for device in members}
    return BETWEEN_HOSTS if len(hosts) > 1 else INSIDE_A_HOST

  def pairs_apart(self, group: Sequence[int]) -> int:
    """Ordered pairs of a group that its :meth:`link` joins."""
    if self.link(group) != BETWEEN_SLICES:
      return len(group) * (len(group) - 1)
    sizes = collections.Counter(slice_of(self.devices[i]) for i in group)
    return len(group) ** 2 - sum(size**2 for size in sizes.values())

  def axis_of_groups(self, groups: hlo.Groups) -> str:
    """The axes of the first mesh whose lines, or planes, the groups are."""
    for shape, places in self._numbered:
      axes = _differing([places[i] for i in groups[0]], shape)
      numbers = np.arange(math.prod(shape.values())).reshape(
        tuple(shape.values())
      )
      last = range(-len(axes), 0)
      lines = np.moveaxis(numbers, axes, tuple(last)).reshape(
        -1, math.prod(numbers.shape[axis] for axis in axes)
      )
      found = {frozenset(places[i] for i in group) for group in groups}
      if found == set(map(frozenset, lines.tolist())):
        return _names(axes, shape)
    return UNKNOWN

  def axis_of_pairs(self, pairs: hlo.Groups) -> str:
    """The axes of the first mesh along which senders and receivers differ."""
    for shape, places in self._numbered:
      axes = {
        axis
        for pair in pairs
        for axis in _differing([places[i] for i in pair], shape)
      }
      return _names(sorted(axes), shape)
    return UNKNOWN

  @functools.cached_property
  def _by_slice(self) -> list[list[int]]:
    """Positions of the devices of each slice."""
    found: dict[int, list[int]] = {}
    for position, device in enumerate(self.devices):
      found.setdefault(_slice_if_tpu(device), []).append(position)
    return list(found.values())

  @functools.cached_property
  def _numbered(self) -> list[tuple[dict[str, int], list[int]]]:
    """Each mesh's shape, and where in it each of ``devices`` is."""
    found = []
    for shape, devices in self.meshes:
      place = {device: i for i, device in enumerate(devices)}
      if place.keys() == set(self.devices):
        found.append((shape, [place[device] for device in self.devices]))
    return found


def _num_slices(devices) -> int:
  return len({_slice_if_tpu(device) for device in devices})


def _slice_if_tpu(device: Any) -> int:
  # Only the TPU compiler makes one program a slice.
  return slice_of(device) if device.platform == 'tpu' else 0


def _numbers(text: str) -> list[int]:
  """Reads ``1,2``, ``0:3`` and ``1->2``."""
  numbers = []
  for part in re.split(r',|->', text):
    first, _, last = part.partition(':')
    numbers += range(int(first), int(last or first) + 1)
  return numbers


def _differing(places: Sequence[int], shape: dict[str, int]) -> tuple[int, ...]:
  """The dimensions of a mesh in which devices have different places."""
  found = np.unravel_index(np.array(places), tuple(shape.values()))
  return tuple(
    axis for axis, place in enumerate(found) if len(np.unique(place)) > 1
  )


def _names(axes: Sequence[int], shape: dict[str, int]) -> str:
  names = list(shape)
  return ','.join(names[axis] for axis in axes)
