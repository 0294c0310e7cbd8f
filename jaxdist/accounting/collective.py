"""One collective of a program, and what memory the program takes."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Collective:
  r"""One array that a collective of the compiled program carries.

  ``bytes_sent`` is what a ring algorithm makes a device send for each run of
  the collective, the mean over the devices. With :math:`B` the device's
  operand in bytes and :math:`W` the group's size:

  ========================  =============================================
  collective                bytes sent
  ========================  =============================================
  ``all-reduce``            :math:`2B(W-1)/W`
  ``all-gather``            :math:`B(W-1)`
  ``reduce-scatter``        :math:`B(W-1)/W`
  ``all-to-all``            :math:`B(W-1)/W`
  ``collective-broadcast``  :math:`B(W-1)/W`
  ``collective-permute``    :math:`B`, times the share of devices that send
                            to another one
  ========================  =============================================

  :math:`B` is what the operand takes in memory, on TPUs with padding.
  An ``all-gather`` is often stated by its output :math:`N = BW`, of which a
  device sends :math:`N(W-1)/W`.

  Attributes:
    kind: the collective, as the compiler spells it.
    dtype: the elements' type on the wire, by its JAX name. The compiler may
      have widened it: CPUs add up bfloat16 as float32.
    shape: shape of a device's operand. Where an ``all-to-all`` takes one chunk
      for each device, the chunks are stacked.
    operand_bytes: bytes of the numbers of a device's operand.
    bytes_sent: bytes that a device sends for each run.
    axis: mesh axes that the groups span, separated by commas; ``'?'`` if the
      groups are not those of axes of a mesh that was found.
    link: the slowest link between devices of a group: ``'between slices'``
      (the data-centre network) or ``'chip links'`` on TPUs; ``'between
      hosts'`` or ``'inside a host'`` on others.
    group_size: devices in a group; the largest, where they differ.
    times: runs in a step. A collective in a branch that is taken every fifth
      step counts 1/5, in a loop of seven 7.
    source: what opened it, the tail of its name in the traced function.
    in_unknown_branch: it is in a branch of which nothing is known; ``times``
      counts it as always taken.
    in_unknown_loop: it is in a loop of unknown length; ``times`` counts it as
      run once.
    padding_sent: the part of ``bytes_sent`` that is no number: TPUs send whole
      tiles, mostly of 8 x 128, of the two most minor dimensions.
    within: what it is scheduled in: the ``'program'``, the body of a
      ``'loop'``, a ``'branch'``, or a ``'call'``. Like all that follows, it is
      no part of what makes rows equal.
    schedule: name of that computation.
    start: where it opens, as a share of that computation's compute: 0 before
      all of it, 1 after. Compute is an estimate from shapes, of which only the
      proportions matter here: for each instruction the time of its matrix
      products at the chip's peak or of its bytes at that of memory, whichever
      is longer.
    end: where its result is awaited. The same as ``start`` for a collective
      that blocks.
    matmuls: instructions with matrix products in that schedule; a loop is one.
    matmuls_inside: those that run while it is open.
  """

  kind: str
  dtype: str
  shape: tuple[int, ...]
  operand_bytes: int
  bytes_sent: float
  axis: str
  link: str
  group_size: int
  times: float
  source: str
  in_unknown_branch: bool = False
  in_unknown_loop: bool = False
  padding_sent: float = 0.0
  within: str = dataclasses.field(default='program', compare=False)
  schedule: str = dataclasses.field(default='', compare=False)
  start: float = dataclasses.field(default=0.0, compare=False)
  end: float = dataclasses.field(default=0.0, compare=False)
  matmuls: int = dataclasses.field(default=0, compare=False)
  matmuls_inside: int = dataclasses.field(default=0, compare=False)

  @property
  def bytes_received(self) -> float:
    """Bytes that a device receives for each run.

    Whatever is sent is received, so that the means over devices are equal.
    """
    return self.bytes_sent

  @property
  def overlap(self) -> float:
    """Share of its schedule's compute that runs while it is open."""
    return self.end - self.start

  @property
  def spans_all_matmuls(self) -> bool:
    """Whether it is open from before the first matrix product to the last."""
    return 0 < self.matmuls == self.matmuls_inside

  @property
  def bytes_a_step(self) -> float:
    """Bytes that a device sends for it in a step, on average."""
    return self.bytes_sent * self.times


@dataclasses.dataclass(frozen=True)
class Memory:
  """What a device's memory holds for the program, in bytes.

  Attributes:
    arguments: what it reads.
    outputs: what it returns.
    temporaries: what it needs meanwhile.
    aliased: outputs that take the place of donated arguments.
    code: the program itself.
  """

  arguments: int
  outputs: int
  temporaries: int
  aliased: int
  code: int

  @property
  def total(self) -> int:
    """All at once, donated arguments counted once."""
    return (
      self.arguments
      + self.outputs
      + self.temporaries
      + self.code
      - self.aliased
    )

  def __str__(self) -> str:
    return (
      f'Memory of a device: {_megabytes(self.total)} (arguments'
      f' {_megabytes(self.arguments)}, outputs {_megabytes(self.outputs)} of'
      f' which in place {_megabytes(self.aliased)}, temporaries'
      f' {_megabytes(self.temporaries)}, code {_megabytes(self.code)}).'
    )


def _megabytes(value: int) -> str:
  return f'{value / 1e6:,.1f} MB'
