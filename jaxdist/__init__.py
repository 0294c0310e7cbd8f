"""Communication-efficient distributed training, as Optax transformations."""

from jaxdist.accounting import Collective as Collective
from jaxdist.accounting import Traffic as Traffic
from jaxdist.accounting import traffic as traffic
from jaxdist.state import PerWorker as PerWorker
from jaxdist.state import local as local
from jaxdist.state import specs as specs
from jaxdist.state import stacked as stacked
