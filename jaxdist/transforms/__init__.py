"""Optax transforms that own a communicator."""

from jaxdist.transforms.communicate import communicate as communicate
from jaxdist.transforms.error_feedback import error_feedback as error_feedback
from jaxdist.transforms.per_worker import per_worker as per_worker
