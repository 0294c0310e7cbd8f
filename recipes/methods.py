"""The methods that the recipes compare.

To add one, write a function here under ``@method``: it then is in ``--help``,
can be trained, and stands in the report beside dense data parallel.
"""

import collections
import dataclasses
import difflib
import itertools
import re
from collections.abc import Callable, Iterator

import jax
import optax

import jaxdist as jd

METHODS: dict[str, 'Method'] = {}
DENSE = 'dense'
# Steps before Adam's variance stays, and those at its start that refresh it.
WARMUP, REFRESHES = 100, 16
BETAS = {'b1': 0.9, 'b2': 0.99}  # The variance is to come to rest by then.


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to train.

  Attributes:
    name: what ``--method`` takes.
    help: what it does, in one line.
    learning_rate: the peak that suits it; ``--lr`` goes before it.
    build: from the workers' axis and a learning-rate schedule to a transform.
    stage: which ``jaxdist.warmup.I`` of its traffic a step is in, from 0; None
      when it is over.
  """

  name: str
  help: str
  learning_rate: float
  build: Callable[[str, optax.Schedule], optax.GradientTransformation]
  stage: Callable[[int], int | None] = lambda step: None

  def stages(self, steps: int) -> collections.Counter:
    """How many of the first steps of a run are in each stage.

    Of a run that skips none: a skipped step lengthens the warm-up.
    """
    return collections.Counter(map(self.stage, range(steps)))


def total(
  of: Callable[[jd.Traffic], float],
  traffic: jd.Traffic,
  stages: collections.Counter,
) -> float:
  """The sum over steps of what ``of`` says of their traffic.

  Args:
    of: takes the traffic of one step.
    traffic: of the compiled step, whose warm-up counts zero times.
    stages: how many steps are in each, as of :meth:`Method.stages`.
  """
  return sum(
    times * of(in_stage(traffic, stage)) for stage, times in stages.items()
  )


def in_stage(traffic: jd.Traffic, stage: int | None) -> jd.Traffic:
  """What a step sends in a stage of the warm-up, or after it."""
  if stage is None:
    return traffic
  # Its branch is taken once, and so is what stands in none.
  scope = re.compile(rf'jaxdist\.warmup\.{stage}\b')
  program = traffic.schedules[0].name
  rows = (
    dataclasses.replace(row, times=1.0)
    for row in traffic.rows
    if scope.search(row.source) or row.schedule == program
  )
  return dataclasses.replace(traffic, rows=tuple(rows))


def bytes_a_step(traffic: jd.Traffic) -> float:
  """What a worker sends."""
  return traffic.bytes_a_step


def method(name: str, help: str, learning_rate: float, **options):
  """Registers the function below it as ``Method.build``."""

  def register(build):
    METHODS[name] = Method(name, help, learning_rate, build, **options)
    return build

  return register


def find(name: str) -> Method:
  """The method of that name.

  Args:
    name: as a user typed it.

  Returns:
    The method.

  Raises:
    ValueError: there is none; the message proposes the nearest.
  """
  name = name.replace('_', '-')
  if name in METHODS:
    return METHODS[name]
  near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.5)
  hint = f' Did you mean {near[0]}?' if near else ''
  names = ', '.join(METHODS)
  raise ValueError(f'--method must be one of {names}, got {name}.{hint}')


def described() -> str:
  """One line for each method, for ``--help``."""
  return '\n\n'.join(f'{m.name}: {m.help}' for m in METHODS.values())


def muon(learning_rate: optax.Schedule) -> optax.GradientTransformation:
  """What every method trains with, or each of its workers.

  Muon steps from momentum, which has averaged the noise of one worker's
  gradients away; AdamW divides by it, so that workers alone fall behind.
  """
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.contrib.muon(
      lambda step: 2 * learning_rate(step),
      weight_decay=0.1,
      adam_learning_rate=learning_rate,
    ),
  )


@method(DENSE, 'data parallel, gradients averaged in float32', 1.6e-2)
def dense(axis, learning_rate):
  return optax.chain(jd.communicate(jd.mean(axis)), muon(learning_rate))


@method(
  'diloco',
  'each worker trains alone for 4 steps; the changes are averaged in 2 bits a '
  'number, and a gentle outer momentum follows them',
  1.6e-2,
)
def diloco(axis, learning_rate):
  return jd.diloco(
    muon(learning_rate),
    optax.sgd(0.8, momentum=0.5, nesterov=True),
    jd.mean(axis, jd.quantize(bits=2)),
    every=4,
  )


@method(
  'streaming-diloco',
  'each worker trains alone for 8 steps; the changes are averaged a quarter of '
  'the model at a time, in 4 bits a number, each hidden behind a step',
  1.6e-2,
)
def streaming_diloco(axis, learning_rate):
  return jd.diloco(
    muon(learning_rate),
    optax.sgd(1.0),
    jd.mean(axis, jd.float4(block_size=256)),
    every=8,
    fragments=4,
    delay=1,
    mix=0.5,
  )


@method(
  'sparse-loco',
  'each worker trains alone for 4 steps; the largest 5% of the changes are '
  'averaged in 2 bits a number and the rest is remembered',
  1.6e-2,
)
def sparse_loco(axis, learning_rate):
  code = jd.chained(jd.top_k(0.05), jd.quantize(bits=2))
  return jd.diloco(
    muon(learning_rate),
    optax.sgd(1.0),
    jd.mean(axis, code),
    every=4,
    decay=0.95,
  )


@method(
  'noloco',
  'each worker trains alone for 4 steps and then follows the mean with one '
  'other, drawn anew each time; nothing is reduced over all',
  1.6e-2,
)
def noloco(axis, learning_rate):
  pairs = jd.gossip(axis, 'random_pairs')
  return jd.noloco(
    muon(learning_rate),
    every=4,
    pairing=pairs,
    learning_rate=1.0,
    momentum=0.2,
  )


@method(
  'co2',
  'each worker trains alone for 4 steps; all follow the mean change of the '
  'round before, so that nobody waits for it',
  1.6e-2,
)
def co2(axis, learning_rate):
  return jd.co2(muon(learning_rate), jd.mean(axis), every=4, momentum=0.0)


@method(
  'fedavg',
  'in each round of 4 steps half of the workers take part; their changes are '
  'averaged',
  1.6e-2,
)
def fedavg(axis, learning_rate):
  return jd.fedavg(
    muon(learning_rate),
    optax.sgd(1.0),
    jd.mean(axis),
    every=4,
    participation=0.5,
  )


@method(
  'local-sgd',
  'each worker trains alone for 4 steps; the changes are averaged in 2 bits a '
  'number',
  1.6e-2,
)
def local_sgd(axis, learning_rate):
  return jd.local_sgd(
    muon(learning_rate), jd.mean(axis, jd.quantize(bits=2)), every=4
  )


@method(
  'local-top-k',
  'each worker trains alone for 5 steps; the largest 5% of the changes are '
  'averaged and the rest is remembered',
  1.6e-2,
)
def local_top_k(axis, learning_rate):
  return jd.local_sgd(
    muon(learning_rate), jd.mean(axis, jd.top_k(0.05)), every=5, decay=0.95
  )


@method(
  'fedzip',
  'each worker trains alone for 4 steps; the largest fifth of the changes is '
  'averaged as one of three levels a number, and the rest is remembered',
  1.6e-2,
)
def fedzip(axis, learning_rate):
  return jd.local_sgd(
    muon(learning_rate), jd.mean(axis, jd.codebook(3, density=0.2)), every=4
  )


@method(
  'quantized',
  'gradients are averaged in 4 bits a number; what that drops is remembered',
  1.6e-2,
)
def quantized(axis, learning_rate):
  return optax.chain(
    jd.error_feedback(jd.mean(axis, jd.quantize(bits=4))),
    muon(learning_rate),
  )


@method(
  'ef21-sgdm',
  "the largest 5% of how each worker's averaged gradient differs from what all "
  'know of it',
  1.6e-2,
)
def ef21_sgdm(axis, learning_rate):
  return optax.chain(
    jd.per_worker(optax.ema(0.9, debias=False)),
    jd.ef21(jd.mean(axis, jd.top_k(0.05))),
    muon(learning_rate),
  )


@method(
  'econtrol',
  'the largest 5% of how each gradient differs from what all know of it, and '
  'of a part of what was missed before',
  1.6e-2,
)
def econtrol(axis, learning_rate):
  return optax.chain(
    jd.econtrol(jd.mean(axis, jd.top_k(0.05))), muon(learning_rate)
  )


@method(
  'scafcom',
  'SGD alone for 4 steps, held together by controls; the largest 5% of how '
  'momenta differ from them are averaged',
  3.0,
)
def scafcom(axis, learning_rate):
  return optax.chain(
    jd.per_worker(optax.clip_by_global_norm(1.0)),
    jd.scafcom(learning_rate, jd.mean(axis, jd.top_k(0.05)), every=4),
  )


@method(
  'dgc',
  'SGD whose momentum waits on each worker; the largest thousandth of it is '
  'sent, vectors whole',
  0.3,
)
def dgc(axis, learning_rate):
  return optax.chain(
    jd.dgc(jd.mean(axis, jd.top_k(0.001), 'gather'), max_norm=1.0),
    optax.scale_by_learning_rate(learning_rate),
  )


@method(
  'power-sgd',
  'gradients are averaged as matrices of rank 2; the rest is remembered',
  1.6e-2,
)
def power_sgd(axis, learning_rate):
  return optax.chain(
    jd.error_feedback(jd.low_rank_mean(axis, rank=2)), muon(learning_rate)
  )


@method(
  'gossip',
  'each worker averages its parameters with one other, at distance 1, 2, 4, '
  '... in turn; nobody waits for all',
  1.6e-2,
)
def gossip(axis, learning_rate):
  return jd.local_sgd(
    muon(learning_rate), jd.gossip(axis, 'one_peer_exponential'), every=1
  )


def signs(axis: str) -> jd.Communicator:
  """Matrices in one bit a number, both ways; vectors whole."""
  return jd.partition(
    {'matrix': jd.mean(axis, jd.sign(), 'two_shot'), 'vector': jd.mean(axis)},
    lambda tree: jax.tree.map(
      lambda x: 'matrix' if x.ndim > 1 else 'vector', tree
    ),
  )


def warmup(step: int) -> int | None:
  """The stage of what is whole in the warm-up."""
  return 0 if step < WARMUP else None


def refreshes() -> Iterator[int]:
  """The steps at which 0/1 Adam's variance is refreshed."""
  step = 0
  for done in itertools.count(1):
    yield step
    step += 2 ** (done // REFRESHES)


def rare_refreshes(step: int) -> int | None:
  """The stage of 0/1 Adam: at a refresh whole, else compressed."""
  if step >= WARMUP:
    return None
  return (
    0 if step in itertools.takewhile(lambda r: r <= step, refreshes()) else 1
  )


@method(
  'one-bit-adam',
  f'Adam for {WARMUP} steps; then its variance stays, and the momenta of '
  'matrices are averaged as signs',
  4e-3,
  stage=warmup,
)
def one_bit_adam(axis, learning_rate):
  return jd.one_bit_adam(learning_rate, signs(axis), WARMUP, **BETAS)


@method(
  'one-bit-lamb',
  f'LAMB for {WARMUP} steps, whose steps are a share of each matrix; then as '
  'one-bit-adam',
  3e-2,
  stage=warmup,
)
def one_bit_lamb(axis, learning_rate):
  return jd.one_bit_lamb(learning_rate, signs(axis), WARMUP, **BETAS)


@method(
  'zero-one-adam',
  f'Adam from the signs of gradients, with a variance that is refreshed ever '
  f'more rarely for {WARMUP} steps; then workers step alone and meet at every '
  'fourth step in the end',
  4e-3,
  stage=rare_refreshes,
)
def zero_one_adam(axis, learning_rate):
  return jd.zero_one_adam(
    learning_rate,
    signs(axis),
    WARMUP,
    **BETAS,
    refreshes=REFRESHES,
    double_every=1,
    max_local=4,
  )
