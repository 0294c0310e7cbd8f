"""Two levels of workers: whole numbers inside a slice, codes between slices."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxdist.communicators import base, buckets, collectives
from jaxdist.communicators.mean import mean
from jaxdist.state import Axis, PerWorker, is_per_worker

_ROW = 128  # Shares are of whole rows, which fill a TPU's lanes.
_BUCKET = 2**26  # numbers


def hierarchical(
  fast: base.Communicator, slow: base.Communicator
) -> base.Communicator:
  r"""The mean over slices and their chips, coded between slices only.

  With S slices of C chips, each of which is a worker with updates
  :math:`x_{sc}`, the updates are cut into C shares, one for each chip c:

  .. math::

    m_{sc} = \frac1C \sum_i x_{si}[c], \qquad
    r_c = \frac1S \sum_s D(E(m_{sc})), \qquad \bar x = (r_1, \dots, r_C)

  **On the wire:** inside a slice a reduce-scatter and an all-gather of the
  updates in float32, 2 B (C-1)/C bytes of B; between slices what ``slow`` sends
  for a share, so that all the chips of a slice together send what one worker
  would. What a code drops of a share is in the chip's ``sent`` C times, and so
  in its residual: it enters the next mean by 1/C.

  For ``jax.shard_map`` over both axes, or :func:`jaxdist.train_step` with
  ``axis=(slow.axis, fast.axis)``. Where the partitioner manages the chips of a
  slice (FSDP), workers are slices: use :func:`jaxdist.per_shard`.

  Args:
    fast: ``jd.mean(axis)`` over the chips of a slice.
    slow: a :func:`jaxdist.mean` between slices, with any code, method and
      delay. It sees one vector a bucket. For other codes for some of the
      leaves give a communicator for each label to :func:`jaxdist.partition`.

  Returns:
    A :class:`Communicator` with two axes: ``axis`` is ``(slow.axis,
    fast.axis)``, and ``bytes_sent`` takes ``(slices, chips)``.

  Raises:
    ValueError: if ``fast`` is another communicator, ``slow`` is not a mean, or
      both lie along one axis.

  Examples:
    >>> import jaxdist as jd
    >>> code = jd.quantize(bits=8)
    >>> both = jd.hierarchical(jd.mean('ici'), jd.mean('dcn', code))
    >>> both.axis
    ('dcn', 'ici')
    >>> params = {'w': jnp.zeros((1024, 1024))}
    >>> whole = jd.mean('ici').bytes_sent(params, 4)
    >>> between = both.bytes_sent(params, (2, 4)) - whole
    >>> between / jd.mean('dcn', code).bytes_sent(params, 2)
    0.25

  References:
    Thakur, Rabenseifner, Gropp, Optimization of Collective Communication
    Operations in MPICH, 2005 (the two halves of an all-reduce)
  """
  for communicator in (fast, slow):
    base.check_communicator(communicator)
  if repr(fast) != repr(mean(str(fast.axis))):
    raise ValueError(
      f'fast must be the mean in full precision, jd.mean(axis), got {fast!r}.'
    )
  if not repr(slow).startswith('mean('):
    raise ValueError(f'slow must be a jd.mean(axis, ...), got {slow!r}.')
  if fast.axis == slow.axis:
    raise ValueError(
      f'fast and slow must lie along different axes, got {fast.axis!r} twice.'
    )

  def cut(shapes, chips):
    """The buckets, and how many numbers a chip has of each."""
    sizes = [math.prod(s.shape) for s in shapes]
    plan = buckets.plan(sizes, _BUCKET)
    lengths = [
      _ROW * math.ceil(buckets.bucket_length(b) / (_ROW * chips)) for b in plan
    ]
    return plan, lengths

  def share_shapes(shapes, chips):
    _, lengths = cut(shapes, chips)
    return [jax.ShapeDtypeStruct((n,), jnp.float32) for n in lengths]

  def init(shapes, feedback):
    chips = collectives.axis_size(fast.axis)
    state = slow.init(share_shapes(shapes, chips), feedback)
    return _in_parts(state, chips, axis)

  def exchange(leaves, state):
    chips = collectives.axis_size(fast.axis)
    chip = jax.lax.axis_index(fast.axis)
    plan, lengths = cut(leaves, chips)
    whole = [
      buckets.to_blocks(leaves, bucket, chips, length)
      for bucket, length in zip(plan, lengths, strict=True)
    ]
    shares = [
      collectives.reduce_scatter(x, fast.axis) / chips  # the wire
      for x in whole
    ]
    with collectives.cut_along(fast.axis):
      results, sents, new = slow.exchange(shares, _in_parts(state, 1, axis))
    results = [
      collectives.all_gather(r, fast.axis)  # the wire
      for r in results
    ]
    if slow.late:  # All chips count what one has to give up.
      lost = collectives.psum(new.lost - state.lost, fast.axis)  # the wire
      new = new._replace(lost=state.lost + lost)
    owned = [
      x.at[chip].add(chips * (sent - share))
      for x, sent, share in zip(whole, sents, shares, strict=True)
    ]
    shapes = [leaf.shape for leaf in leaves]
    return (
      buckets.from_blocks(results, plan, shapes),
      buckets.from_blocks(owned, plan, shapes),
      _in_parts(new, chips, axis),
    )

  def alone(leaves, state):
    leaves = [leaf.astype(jnp.float32) for leaf in leaves]
    results, _, state = exchange(leaves, state)
    return results, state

  def bytes_sent(shapes, workers):
    slices, chips = workers
    shares = share_shapes(shapes, chips)
    inside = 2 * 4 * sum(s.size for s in shares) * (chips - 1)
    if slow.late:
      inside += 2 * 4 * (chips - 1) / chips
    return inside + slow.bytes_sent(shares, slices)

  axis = (slow.axis, fast.axis)
  return base.over_leaves(
    f'hierarchical({fast!r}, {slow!r})',
    axis,
    init,
    exchange,
    bytes_sent,
    alone,
    contraction=slow.contraction,
    unbiased=slow.unbiased,
    late=slow.late,
    encodes_twice=slow.encodes_twice,
    uncompressed=lambda: hierarchical(mean(fast.axis), mean(slow.axis)),
  )


def _in_parts(state: Any, parts: int, axis: Axis) -> Any:
  """A slice's state as that of its chips, or of one of them by itself."""

  def visit(node):
    if not is_per_worker(node):
      return node
    return PerWorker(collectives.vary(node.value, axis), node.resize, parts)

  return jax.tree.map(visit, state, is_leaf=is_per_worker)
