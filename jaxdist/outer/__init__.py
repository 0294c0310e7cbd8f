"""Loops that let workers drift and bring them back."""

from jaxdist.outer.co2 import co2 as co2
from jaxdist.outer.diloco import diloco as diloco
from jaxdist.outer.fedavg import fedavg as fedavg
from jaxdist.outer.late_meetings import late_meetings as late_meetings
from jaxdist.outer.local_sgd import local_sgd as local_sgd
from jaxdist.outer.noloco import noloco as noloco
from jaxdist.outer.scallion import scafcom as scafcom
from jaxdist.outer.scallion import scallion as scallion
