"""Communication-efficient distributed training, as Optax transformations."""

from jaxdist.accounting import Collective as Collective
from jaxdist.accounting import Traffic as Traffic
from jaxdist.accounting import topology_mesh as topology_mesh
from jaxdist.accounting import traffic as traffic
from jaxdist.checkpoint import (
  CorruptCheckpointError as CorruptCheckpointError,
)
from jaxdist.checkpoint import (
  CorruptCheckpointWarning as CorruptCheckpointWarning,
)
from jaxdist.checkpoint import Saver as Saver
from jaxdist.checkpoint import checkpoint_metadata as checkpoint_metadata
from jaxdist.checkpoint import latest_step as latest_step
from jaxdist.checkpoint import restore as restore
from jaxdist.checkpoint import save as save
from jaxdist.communicators import Communicator as Communicator
from jaxdist.communicators import gossip as gossip
from jaxdist.communicators import low_rank_mean as low_rank_mean
from jaxdist.communicators import mean as mean
from jaxdist.communicators import partition as partition
from jaxdist.communicators import per_shard as per_shard
from jaxdist.communicators import staged as staged
from jaxdist.compressors import Compressor as Compressor
from jaxdist.compressors import chained as chained
from jaxdist.compressors import codebook as codebook
from jaxdist.compressors import float4 as float4
from jaxdist.compressors import float8 as float8
from jaxdist.compressors import global_top_k as global_top_k
from jaxdist.compressors import identity as identity
from jaxdist.compressors import natural as natural
from jaxdist.compressors import quantize as quantize
from jaxdist.compressors import random_k as random_k
from jaxdist.compressors import rotated as rotated
from jaxdist.compressors import sign as sign
from jaxdist.compressors import ternary as ternary
from jaxdist.compressors import top_k as top_k
from jaxdist.outer import co2 as co2
from jaxdist.outer import diloco as diloco
from jaxdist.outer import fedavg as fedavg
from jaxdist.outer import late_meetings as late_meetings
from jaxdist.outer import local_sgd as local_sgd
from jaxdist.outer import noloco as noloco
from jaxdist.pack import UnpackError as UnpackError
from jaxdist.pack import pack as pack
from jaxdist.pack import unpack as unpack
from jaxdist.planning import LINKS as LINKS
from jaxdist.planning import Advice as Advice
from jaxdist.planning import Candidate as Candidate
from jaxdist.planning import Link as Link
from jaxdist.planning import StepTime as StepTime
from jaxdist.planning import advise as advise
from jaxdist.planning import break_even as break_even
from jaxdist.planning import step_time as step_time
from jaxdist.resize import resize as resize
from jaxdist.state import PerWorker as PerWorker
from jaxdist.state import local as local
from jaxdist.state import specs as specs
from jaxdist.state import stacked as stacked
from jaxdist.sync import OutOfSyncError as OutOfSyncError
from jaxdist.sync import assert_in_sync as assert_in_sync
from jaxdist.training import TrainState as TrainState
from jaxdist.training import init as init
from jaxdist.training import mean_params as mean_params
from jaxdist.training import merge as merge
from jaxdist.training import train_step as train_step
from jaxdist.transforms import communicate as communicate
from jaxdist.transforms import dgc as dgc
from jaxdist.transforms import econtrol as econtrol
from jaxdist.transforms import ef21 as ef21
from jaxdist.transforms import ef21_stepsize as ef21_stepsize
from jaxdist.transforms import error_feedback as error_feedback
from jaxdist.transforms import estimate_smoothness as estimate_smoothness
from jaxdist.transforms import one_bit_adam as one_bit_adam
from jaxdist.transforms import one_bit_lamb as one_bit_lamb
from jaxdist.transforms import per_worker as per_worker
from jaxdist.transforms import zero_one_adam as zero_one_adam
