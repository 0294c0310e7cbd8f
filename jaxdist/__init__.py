"""Communication-efficient distributed training, as Optax transformations."""

from jaxdist.checkpoint import checkpoint_metadata as checkpoint_metadata
from jaxdist.checkpoint import latest_step as latest_step
from jaxdist.checkpoint import restore as restore
from jaxdist.checkpoint import save as save
from jaxdist.resize import resize as resize
from jaxdist.state import PerWorker as PerWorker
from jaxdist.state import local as local
from jaxdist.state import specs as specs
from jaxdist.state import stacked as stacked
from jaxdist.sync import OutOfSyncError as OutOfSyncError
from jaxdist.sync import assert_in_sync as assert_in_sync
