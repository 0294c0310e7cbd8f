"""Optax transforms that own a communicator."""

from jaxdist.transforms.communicate import communicate as communicate
from jaxdist.transforms.dgc import dgc as dgc
from jaxdist.transforms.econtrol import econtrol as econtrol
from jaxdist.transforms.ef21 import ef21 as ef21
from jaxdist.transforms.ef21 import ef21_stepsize as ef21_stepsize
from jaxdist.transforms.error_feedback import error_feedback as error_feedback
from jaxdist.transforms.masha import masha1 as masha1
from jaxdist.transforms.masha import masha2 as masha2
from jaxdist.transforms.one_bit_adam import one_bit_adam as one_bit_adam
from jaxdist.transforms.one_bit_lamb import one_bit_lamb as one_bit_lamb
from jaxdist.transforms.per_worker import per_worker as per_worker
from jaxdist.transforms.smoothness import (
  estimate_smoothness as estimate_smoothness,
)
from jaxdist.transforms.worker_noise import worker_noise as worker_noise
from jaxdist.transforms.zero_one_adam import zero_one_adam as zero_one_adam
