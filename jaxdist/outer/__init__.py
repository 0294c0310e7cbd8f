"""Loops that let workers drift and bring them back."""

from jaxdist.outer.diloco import diloco as diloco
from jaxdist.outer.local_sgd import local_sgd as local_sgd
from jaxdist.outer.noloco import noloco as noloco
