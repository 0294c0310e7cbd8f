"""DiLoCo between independent replicas that may fail; needs ``jaxdist[ray]``.

Each replica is a Ray actor with a JAX world of its own, of one device or many.
Nothing is collective between them, so that the death of one is no other's.
"""

try:
  import ray as _  # noqa: F401
except ModuleNotFoundError as error:
  raise ImportError(
    "jaxdist.elastic needs Ray: pip install 'jaxdist[ray]'."
  ) from error

from jaxdist.elastic.coordinator import Coordinator as Coordinator
from jaxdist.elastic.events import Event as Event
from jaxdist.elastic.events import ReplicaError as ReplicaError
from jaxdist.elastic.events import Round as Round
from jaxdist.elastic.events import Seat as Seat
from jaxdist.elastic.ledger import Ledger as Ledger
from jaxdist.elastic.ledger import Tag as Tag
from jaxdist.elastic.ledger import Verdict as Verdict
from jaxdist.elastic.replica import Program as Program
from jaxdist.elastic.replica import program as program
