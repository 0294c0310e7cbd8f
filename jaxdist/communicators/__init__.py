"""How one tree a worker becomes the tree that each worker goes on with."""

from jaxdist.communicators.base import Communicator as Communicator
from jaxdist.communicators.gossip import gossip as gossip
from jaxdist.communicators.hierarchical import hierarchical as hierarchical
from jaxdist.communicators.low_rank import low_rank_mean as low_rank_mean
from jaxdist.communicators.mean import mean as mean
from jaxdist.communicators.partition import partition as partition
from jaxdist.communicators.per_leaf import per_leaf as per_leaf
from jaxdist.communicators.per_shard import per_shard as per_shard
from jaxdist.communicators.staged import staged as staged
