"""What methods send before they compress, or now and then."""

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
