"""What a step really sends, read from its compiled program."""

from jaxdist.accounting.chips import CHIPS as CHIPS
from jaxdist.accounting.chips import Chip as Chip
from jaxdist.accounting.collective import Collective as Collective
from jaxdist.accounting.program import traffic as traffic
from jaxdist.accounting.table import Traffic as Traffic
from jaxdist.accounting.topology import topology_mesh as topology_mesh
