"""Several processes as one world: joining, agreeing, being launched."""

from jaxdist.hosts.desync import assert_same as assert_same
from jaxdist.hosts.desync import assert_same_program as assert_same_program
from jaxdist.hosts.errors import DesyncError as DesyncError
from jaxdist.hosts.errors import MissingProcessError as MissingProcessError
from jaxdist.hosts.world import World as World
from jaxdist.hosts.world import initialize as initialize
