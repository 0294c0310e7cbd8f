"""The methods that the recipes compare.

To add one, write a function here under ``@method``: it then is in ``--help``,
can be trained, and stands in the report beside dense data parallel.
"""

import dataclasses
import difflib
from collections.abc import Callable

import optax

import jaxdist as jd

METHODS: dict[str, 'Method'] = {}
DENSE = 'dense'


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to train.

  Attributes:
    name: what ``--method`` takes.
    help: what it does, in one line.
    learning_rate: the peak that suits it; ``--lr`` goes before it.
    build: from the workers' axis and a learning-rate schedule to a transform.
  """

  name: str
  help: str
  learning_rate: float
  build: Callable[[str, optax.Schedule], optax.GradientTransformation]


def method(name: str, help: str, learning_rate: float):
  """Registers the function below it as ``Method.build``."""

  def register(build):
    METHODS[name] = Method(name, help, learning_rate, build)
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
  if name in METHODS:
    return METHODS[name]
  near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.5)
  hint = f' Did you mean {near[0]}?' if near else ''
  names = ', '.join(METHODS)
  raise ValueError(f'--method must be one of {names}, got {name}.{hint}')


def described() -> str:
  """One line for each method, for ``--help``."""
  return '\n\n'.join(f'{m.name}: {m.help}' for m in METHODS.values())


def adamw(learning_rate: optax.Schedule) -> optax.GradientTransformation:
  """What every method trains with, or each of its workers."""
  return optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(learning_rate, b2=0.95, weight_decay=0.1),
  )


@method(DENSE, 'data parallel, gradients averaged in float32', 4e-3)
def dense(axis, learning_rate):
  return optax.chain(jd.communicate(jd.mean(axis)), adamw(learning_rate))


@method(
  'local-top-k',
  'each worker trains alone for 5 steps, then the largest 5% of their changes '
  'are averaged; the rest is remembered',
  4e-3,
)
def local_top_k(axis, learning_rate):
  return jd.local_sgd(
    adamw(learning_rate),
    jd.mean(axis, jd.top_k(0.05)),
    every=5,
    decay=0.95,
  )


@method(
  'quantized',
  'gradients averaged as 4-bit numbers; rounding errors are remembered',
  4e-3,
)
def quantized(axis, learning_rate):
  return optax.chain(
    jd.error_feedback(jd.mean(axis, jd.quantize(bits=4))),
    adamw(learning_rate),
  )
