"""Checkpoints that are whole or not there, for any number of workers.

Orbax writes and reads the arrays, and a step is committed by renaming its
directory, which only the run that began last can do. Orbax gets the arrays as a
flat dict, named by their paths in the state, so that nothing depends on how a
tree's nodes are stored. Beside them lies a record of all leaves with a digest
of each shard. What does not fit is found by comparing that record with what is
asked for, before anything is read, and the error can name the leaf; what was
damaged since is found by the digests.
"""

from jaxdist.checkpoint.layout import (
  CorruptCheckpointError as CorruptCheckpointError,
)
from jaxdist.checkpoint.layout import checkpoint_metadata as checkpoint_metadata
from jaxdist.checkpoint.layout import latest_step as latest_step
from jaxdist.checkpoint.loading import (
  CorruptCheckpointWarning as CorruptCheckpointWarning,
)
from jaxdist.checkpoint.loading import restore as restore
from jaxdist.checkpoint.saving import Saver as Saver
from jaxdist.checkpoint.saving import save as save
