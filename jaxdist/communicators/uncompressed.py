"""What methods send before they compress, or now and then."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxdist.communicators.base import Communicator
from jaxdist.communicators.mean import mean


def uncompressed(communicator: Communicator) -> Communicator:
  """The mean in float32 over the same workers, by the same ways.

  Args:
    communicator: what else sends. Under :func:`jaxdist.per_shard` each device
      sends its shard; of two levels, as :func:`jaxdist.hierarchical`, there are
      two here too.

  Returns:
    A communicator that keeps nothing back.
  """
  if communicator.uncompressed is None:
    return mean(communicator.axis)
  return communicator.uncompressed()


def of_parts(
  parts: Mapping[Any, Communicator],
  make: Callable[[Mapping[Any, Communicator]], Communicator],
) -> Callable[[], Communicator] | None:
  """``Communicator.uncompressed`` of one that is made of parts.

  Args:
    parts: what sends in it.
    make: makes such a communicator of others.

  Returns:
    None where ``jd.mean(axis)`` serves all of them.
  """
  if not any(part.uncompressed for part in parts.values()):
    return None
  return lambda: make({k: uncompressed(part) for k, part in parts.items()})
