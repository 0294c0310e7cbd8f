"""Which method pays on given links, and whether any does."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from jaxdist.planning.candidates import CANDIDATES, Candidate
from jaxdist.planning.links import Link

_AXIS = 'workers'
# Sequential rounds of a collective: an all-reduce is two.
_ROUNDS = {
  'psum': 2,
  'psum_invariant': 2,
  'all_gather': 1,
  'all_gather_invariant': 1,
  'all_to_all': 1,
  'reduce_scatter': 1,
  'ppermute': 1,
}
# Reads of updates and residual, writes of both, and decoding what arrives.
_CODEC_PASSES = 5
_NEARLY = 1.05


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What a method costs on a link, for each step on average.

  Attributes:
    name: of the candidate.
    code: how to write it.
    bytes_a_step: that a device sends.
    transfer_seconds: that the link is busy.
    codec_seconds: that coding and decoding take.
    step_seconds: compute, codec, and what of the transfer nothing hides.
    speedup: over dense.
    break_even: bytes a second of the link, as slow as this or slower the
      method is faster than dense; 0 if it never is, infinite if always.
  """

  name: str
  code: str
  bytes_a_step: float
  transfer_seconds: float
  codec_seconds: float
  step_seconds: float
  speedup: float
  break_even: float


@dataclasses.dataclass(frozen=True)
class Advice:
  """What :func:`advise` found. As text it is a table and a sentence.

  Attributes:
    predictions: fastest first.
    choice: name of the one to take: of those within 5% of the fastest, the one
      that changes training least.
    baseline: name of the one that the others are compared with.
  """

  predictions: tuple[Prediction, ...]
  choice: str
  baseline: str

  @property
  def compress(self) -> bool:
    """Whether anything else than the baseline pays here at all."""
    return self.choice != self.baseline

  def to_json(self) -> str:
    """All of it as JSON."""
    return json.dumps(
      {'choice': self.choice, 'compress': self.compress}
      | {'predictions': [dataclasses.asdict(p) for p in self.predictions]},
      indent=2,
    )

  def __str__(self) -> str:
    cells = [('method', 'bytes a step', 'step', 'speedup', 'pays below')]
    cells += [
      (
        p.name,
        f'{p.bytes_a_step:,.0f}',
        f'{p.step_seconds:.4g} s',
        f'{p.speedup:.2f}',
        _rate(p.break_even) if p.name != self.baseline else '',
      )
      for p in self.predictions
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
      row[0].ljust(widths[0])
      + ''.join(f'  {c:>{w}}' for c, w in zip(row[1:], widths[1:], strict=True))
      for row in cells
    ]
    return '\n'.join([*map(str.rstrip, lines), self._sentence()])

  def _sentence(self):
    chosen = next(p for p in self.predictions if p.name == self.choice)
    if not self.compress:
      return (
        "Don't compress here: no method is more than 5% faster than dense "
        'float32.'
      )
    return (
      f'Take {chosen.name}: {chosen.speedup:.3g} times as fast as dense.\n'
      f'  {chosen.code}\n'
      f'Steps are compared, not what they learn: train a little with both.'
    )


def advise(
  params: Any,
  workers: int,
  link: Link,
  compute_seconds: float,
  *,
  memory_bytes_per_second: float = 819e9,
  candidates: Sequence[Candidate] = CANDIDATES,
) -> Advice:
  r"""Predicts the step time of each method on a link, and says which to take.

  .. math::

    t = c + \frac1H\Big(\frac{5 \cdot 4 n}{M}
      + P \max\big(0, r l + \frac{b}{P B} - h\big)\Big)

  with compute :math:`c`, exchanges every :math:`H` steps in :math:`P`
  fragments, :math:`n` numbers to code at :math:`M` bytes of memory a second (0
  where nothing is coded), :math:`b` bytes sent in :math:`r` rounds of latency
  :math:`l` over a link of :math:`B` bytes a second, and :math:`h = c` for what
  a step hides, else 0. Bytes are those that the communicators claim, and the
  compiled programs send; rounds are counted in what the communicators trace to.
  Nothing is compiled. Outer loops are there with several H: taken is the
  shortest that is fast enough.

  Args:
    params: arrays or shapes of what one device exchanges: its shards, where
      FSDP cuts the parameters.
    workers: that exchange over the link, at least 2.
    link: what it carries for one device, such as ``jd.Link(25e9 / 8)``.
    compute_seconds: of a step without any exchange.
    memory_bytes_per_second: of the device, for coding; the default is a
      TPU v5e's.
    candidates: the methods, from the least change to training to the greatest;
      the first is what the others are compared with. To add to the default:
      ``(*jaxdist.planning.CANDIDATES, jd.Candidate(...))``.

  Returns:
    An :class:`Advice`.

  Raises:
    ValueError: if a number is out of range.

  Examples:
    >>> import jax.numpy as jnp
    >>> import jaxdist as jd
    >>> params = {'w': jnp.zeros((1024, 1024))}
    >>> advice = jd.advise(params, 8, jd.Link(12.5e6, 1e-3), 0.1)
    >>> advice.choice
    'DiLoCo every 30, 4 bits'
    >>> print(advice)
    method                              bytes a step      step  speedup  ...
    streaming DiLoCo every 100, 4 bits         9,247       0.1 s ...
    >>> jd.advise(params, 8, jd.Link(200e9), compute_seconds=0.1).compress
    False
  """
  if workers < 2:
    raise ValueError(f'workers must be at least 2, got {workers}.')
  for name, value in {
    'compute_seconds': compute_seconds,
    'memory_bytes_per_second': memory_bytes_per_second,
  }.items():
    if not value > 0:
      raise ValueError(f'{name} must be positive, got {value}.')
  leaves, treedef = jax.tree.flatten(params)
  shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
  numbers = sum(math.prod(x.shape) for x in shapes)
  codec = _CODEC_PASSES * 4 * numbers / memory_bytes_per_second

  def cost(candidate):
    """Bytes, codec seconds, and step seconds as a function of bandwidth."""
    exchange = _exchange(candidate.communicator, treedef, shapes, workers)
    num_bytes, rounds, is_coded = exchange
    rounds *= candidate.fragments
    own_codec = codec if is_coded else 0.0
    hidden = candidate.fragments * compute_seconds if candidate.delay else 0.0

    def seconds(bytes_per_second):
      busy = Link(bytes_per_second, link.latency).seconds(num_bytes, rounds)
      exposed = own_codec + max(0.0, busy - hidden)
      return compute_seconds + exposed / candidate.every

    return num_bytes, rounds, own_codec, seconds

  costs = [cost(candidate) for candidate in candidates]
  dense_seconds = costs[0][-1]
  predictions = []
  for candidate, (num_bytes, rounds, own_codec, seconds) in zip(
    candidates, costs, strict=True
  ):
    step = seconds(link.bytes_per_second)
    predictions.append(
      Prediction(
        name=candidate.name,
        code=candidate.code,
        bytes_a_step=num_bytes / candidate.every,
        transfer_seconds=link.seconds(num_bytes, rounds) / candidate.every,
        codec_seconds=own_codec / candidate.every,
        step_seconds=step,
        speedup=dense_seconds(link.bytes_per_second) / step,
        break_even=break_even(seconds, dense_seconds),
      )
    )
  fastest = min(p.step_seconds for p in predictions)
  choice = next(p for p in predictions if p.step_seconds <= _NEARLY * fastest)
  predictions.sort(key=lambda p: p.step_seconds)
  return Advice(tuple(predictions), choice.name, candidates[0].name)


def break_even(
  method: Callable[[float], float], dense: Callable[[float], float]
) -> float:
  """The fastest link on which a method is faster than dense.

  Args:
    method: from bytes a second of the link to seconds a step.
    dense: likewise.

  Returns:
    Bytes a second: 0 if the method is faster on no link of at least 10 kB/s,
    infinite if on all.
  """
  slow, fast = 1e4, 1e15
  if method(slow) >= dense(slow):
    return 0.0
  if method(fast) < dense(fast):
    return math.inf
  for _ in range(100):
    middle = math.sqrt(slow * fast)
    if method(middle) < dense(middle):
      slow = middle
    else:
      fast = middle
  return slow


@functools.lru_cache(maxsize=256)  # Links and speeds change nothing here.
def _exchange(make, treedef, shapes, workers):
  """Bytes and rounds of an exchange, and whether it codes."""
  communicator = make(_AXIS)
  tree = treedef.unflatten(shapes)
  num_bytes = float(communicator.bytes_sent(tree, workers))
  is_coded = not (communicator.unbiased and communicator.contraction == 1)
  return num_bytes, _rounds(communicator, tree, workers), is_coded


def _rounds(communicator, tree, workers):
  """Sequential rounds of an exchange, of which buckets share none."""
  mesh = AbstractMesh((workers,), (_AXIS,), axis_types=(AxisType.Auto,))

  def exchange(tree):
    tree = jax.tree.map(lambda x: jax.lax.pcast(x, _AXIS, to='varying'), tree)
    state = communicator.init(tree, feedback=False)
    result, _, _ = communicator.exchange(tree, state)
    return jax.tree.map(lambda x: x[None], result)

  mapped = jax.shard_map(
    exchange,
    mesh=mesh,
    in_specs=PartitionSpec(),
    out_specs=PartitionSpec(_AXIS),
  )
  return _count(jax.make_jaxpr(mapped)(tree).jaxpr)


def _count(jaxpr):
  total = 0
  for equation in jaxpr.eqns:
    total += _ROUNDS.get(equation.primitive.name, 0)
    leaves = jax.tree.leaves(equation.params, is_leaf=_is_jaxpr)
    inner = [_count(getattr(x, 'jaxpr', x)) for x in leaves if _is_jaxpr(x)]
    # One of the branches is taken.
    is_branch = equation.primitive.name == 'cond'
    total += max(inner, default=0) if is_branch else sum(inner)
  return total


def _is_jaxpr(x):
  """Whether it has equations, closed over constants or not."""
  return hasattr(x, 'eqns')


def _rate(bytes_per_second):
  if bytes_per_second == 0:
    return 'never'
  if math.isinf(bytes_per_second):
    return 'any link'
  gbits = bytes_per_second * 8 / 1e9
  return f'{gbits:,.0f} Gbit/s' if gbits >= 100 else f'{gbits:.3g} Gbit/s'
