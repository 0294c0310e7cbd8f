"""What every transform that owns a communicator checks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdist.communicators import base as communicators
from jaxdist.communicators import checks
from jaxdist.communicators.base import Communicator, cast, check_not_reduced
from jaxdist.communicators.base import all_finite as all_finite
from jaxdist.communicators.base import where as where
from jaxdist.state import Axis


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Layout:
  """Structure, shapes and dtypes that a transform was made for.

  A node without leaves: it travels in the state and costs nothing.

  Attributes:
    leaves: path, shape and dtype of each leaf.
  """

  leaves: tuple[tuple[str, tuple[int, ...], str], ...]

  @classmethod
  def of(cls, tree: Any) -> 'Layout':
    """The layout of a tree of arrays, or of shapes and dtypes."""
    return cls(
      tuple(
        (jax.tree_util.keystr(path), tuple(leaf.shape), str(leaf.dtype))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
      )
    )

  def check(self, updates: optax.Updates) -> None:
    """Raises if updates are not shaped as the params were at ``init``.

    Raises:
      ValueError: naming the first leaf that differs.
    """
    now = Layout.of(updates)
    if now == self:
      return
    before = {path: rest for path, *rest in self.leaves}
    after = {path: rest for path, *rest in now.leaves}
    for path in [*before, *after]:
      old, new = before.get(path), after.get(path)
      if old != new:
        describe = lambda x: f'{x[1]}{list(x[0])}' if x else 'missing'
        raise ValueError(
          f'updates must have the structure, shapes and dtypes of the params '
          f'given to init: updates{path} was {describe(old)} at init and is '
          f'{describe(new)} now.'
        )


def check_updates(updates: optax.Updates, layout: Layout, axis: Axis) -> None:
  """Raises if updates changed since init, or were reduced before."""
  layout.check(updates)
  check_not_reduced(updates, axis)


def zeros(params: optax.Params) -> optax.Updates:
  """Float32 zeros shaped like the params.

  They are fresh, so that they count as the same on all workers where the params
  that they are shaped like may not.
  """
  return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)


def settle(
  updates: optax.Updates,
  new: Any,
  old: Any,
  like: optax.Updates,
  watched: Any = (),
) -> tuple[optax.Updates, Any]:
  """A step if it is finite; else zeros and the state before, one more skipped.

  Args:
    updates: what the step puts out, the same on all workers, so that all of
      them decide alike.
    new: the state after the step.
    old: the state before it; a NamedTuple with a field ``skipped``.
    like: updates whose dtypes to put out.
    watched: what must be finite too, the same on all workers.

  Returns:
    The updates and the state to go on with.
  """
  finite = all_finite((updates, watched))
  updates = jax.tree.map(
    lambda u, g: cast(jnp.where(finite, u, 0), g.dtype), updates, like
  )
  skipped = old.skipped + jnp.where(finite, 0, 1)
  return updates, where(finite, new, old)._replace(skipped=skipped)


def check_communicator(communicator: Communicator, *, agrees: bool) -> None:
  """Raises if an argument is no communicator, or of the wrong kind."""
  communicators.check_communicator(communicator)
  if agrees and not communicator.agrees:
    raise ValueError(
      f'communicator must give all workers the same result, and '
      f'{communicator!r} does not. Where parameters may drift, use '
      f'jd.local_sgd.'
    )


def check_prompt(communicator: Communicator) -> None:
  """Raises if a communicator's result is of the exchange before."""
  if communicator.late:
    raise ValueError(
      f'communicator must give the mean of what is handed to it, without '
      f'delay=1: what others know would lag behind; got {communicator!r}.'
    )


def check_adam(b1: float, b2: float, eps: float) -> None:
  """Raises if Adam's constants are out of range."""
  for name, value in (('b1', b1), ('b2', b2)):
    if not 0 <= value < 1:
      raise ValueError(f'{name} must be in [0, 1), got {value}.')
  if not eps >= 0:
    raise ValueError(f'eps must be at least 0, got {eps}.')


def check_steps(name: str, value: int, least: int) -> None:
  """Raises if a number of steps is no integer of at least ``least``."""
  if not isinstance(value, int) or value < least:
    raise ValueError(
      f'{name} must be an integer of at least {least}, got {value!r}.'
    )


def check_feedback(communicator: Communicator, decay: Any = 1.0) -> None:
  """Raises if feedback through a communicator cannot stay bounded."""
  checks.check_fraction('decay', decay)
  checks.check_contracts(
    'feedback',
    communicator,
    'It is unbiased: use it without feedback (jd.communicate, or '
    'feedback=False).',
  )
