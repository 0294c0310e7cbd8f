"""The methods that are weighed against dense averaging: a list to extend."""

import dataclasses
from collections.abc import Callable

from jaxdist.communicators import gossip, low_rank_mean, mean
from jaxdist.communicators.base import Communicator
from jaxdist.compressors import float4, quantize, sign, top_k


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A method that :func:`jaxdist.advise` weighs.

  Attributes:
    name: what it is called in the table.
    code: how to write it.
    communicator: from the workers' axis to what exchanges.
    every: steps in which all is exchanged once.
    fragments: in how many parts, each at a turn of its own.
    delay: whether a step's compute hides the transfer of a turn.
  """

  name: str
  code: str
  communicator: Callable[[str], Communicator]
  every: int = 1
  fragments: int = 1
  delay: bool = False


def _diloco(every):
  return Candidate(
    f'DiLoCo every {every}, 4 bits',
    f"jd.diloco(inner, outer, jd.mean('data', jd.float4()), every={every})",
    _float4_mean,
    every=every,
  )


def _float4_mean(axis):
  return mean(axis, float4())


# From the least change to training to the greatest.
CANDIDATES = (
  Candidate('dense', "jd.communicate(jd.mean('data'))", mean),
  Candidate(
    '8 bits',
    "jd.error_feedback(jd.mean('data', jd.quantize(bits=8)))",
    lambda axis: mean(axis, quantize(bits=8)),
  ),
  Candidate(
    '4 bits',
    "jd.error_feedback(jd.mean('data', jd.quantize(bits=4)))",
    lambda axis: mean(axis, quantize(bits=4)),
  ),
  Candidate(
    'dense, a step late',
    "jd.communicate(jd.mean('data', delay=1))",
    lambda axis: mean(axis, delay=1),
    delay=True,
  ),
  Candidate(
    '8 bits, a step late',
    "jd.error_feedback(jd.mean('data', jd.quantize(bits=8), delay=1))",
    lambda axis: mean(axis, quantize(bits=8), delay=1),
    delay=True,
  ),
  Candidate(
    'low rank',
    "jd.error_feedback(jd.low_rank_mean('data', rank=4))",
    lambda axis: low_rank_mean(axis, rank=4),
  ),
  Candidate(
    '1 bit',
    "jd.error_feedback(jd.mean('data', jd.sign()))",
    lambda axis: mean(axis, sign()),
  ),
  Candidate(
    'top 1%',
    "jd.error_feedback(jd.mean('data', jd.top_k(0.01)))",
    lambda axis: mean(axis, top_k(0.01)),
  ),
  Candidate(
    'local steps, 2 bits',
    "jd.local_sgd(inner, jd.mean('data', jd.quantize(bits=2)), every=4)",
    lambda axis: mean(axis, quantize(bits=2)),
    every=4,
  ),
  *map(_diloco, (10, 30, 100)),
  Candidate(
    'streaming DiLoCo every 100, 4 bits',
    "jd.diloco(inner, outer, jd.mean('data', jd.float4()), every=100,\n"
    '    fragments=4, delay=1, mix=0.5)',
    _float4_mean,
    every=100,
    fragments=4,
    delay=True,
  ),
  Candidate(
    'CO2 every 100',
    "jd.co2(inner, jd.mean('data'), every=100)",
    mean,
    every=100,
    delay=True,
  ),
  Candidate(
    'NoLoCo every 100',
    "jd.noloco(inner, every=100, pairing=jd.gossip('data', 'random_pairs'))",
    lambda axis: gossip(axis, 'random_pairs'),
    every=100,
  ),
  _diloco(500),
)
