"""Communication-efficient distributed training, as Optax transformations."""

from jaxdist.resize import resize as resize
from jaxdist.state import PerWorker as PerWorker
from jaxdist.state import local as local
from jaxdist.state import specs as specs
from jaxdist.state import stacked as stacked
from jaxdist.sync import OutOfSyncError as OutOfSyncError
from jaxdist.sync import assert_in_sync as assert_in_sync
