"""What all workers must have alike: updates, and state outside PerWorker."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType

from jaxdist.communicators import collectives
from jaxdist.state import Axis, PerWorker, is_per_worker, local, specs


class NotSharedError(ValueError):
  """What all workers must have alike differs between them."""


def check_shared(tree: Any, axis: Axis, what: str) -> None:
  """Raises if a leaf that is not per worker differs between workers.

  Args:
    tree: updates or a state, in the worker view.
    axis: the workers' axis; where arrays' types don't say, nothing is checked.
    what: how to call the tree: ``'updates'`` or ``'opt_state'``.

  Raises:
    NotSharedError: naming the leaf.
  """
  paths = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_per_worker)
  for path, leaf in paths:
    if is_per_worker(leaf) or not collectives.differs_along(leaf, axis):
      continue
    advice = (
      f'tx has no communicator along this axis. Put one first, as in '
      f'optax.chain(jd.communicate(jd.mean({axis!r})), ...).'
    )
    if what == 'opt_state':
      advice = (
        "a transform remembers there what it saw of this worker's gradients "
        'alone. Put it behind the communicator, or wrap it, as in optax.chain('
        'jd.per_worker(optax.trace(0.9)), jd.error_feedback(...), ...).'
      )
    raise NotSharedError(
      f'{what} must be the same on all workers of axis {axis!r}, but '
      f'{what}{jax.tree_util.keystr(path)} differs: {advice}'
    )


def check_simulated(
  worker_update: Callable[[Any, Any, Any], Any],
  params: optax.Params | PerWorker,
  opt_state: optax.OptState,
  axis: str,
  count: int,
) -> None:
  """Checks simulated workers as those on a mesh, whose arrays' types tell.

  Runs nothing: it follows the types over a mesh that need not exist.

  Args:
    worker_update: ``(grads, opt_state, params)``, in the worker view; calls
      :func:`check_shared`.
    params: as seen from outside the workers.
    opt_state: likewise.
    axis: the workers' axis.
    count: how many there are.

  Raises:
    NotSharedError: if :func:`check_shared` does.
  """
  if count == 1:
    return

  def probe(args):
    params, opt_state = local(args)
    params = params.value if is_per_worker(params) else params
    return worker_update(collectives.vary(params, axis), opt_state, params)

  args = params, opt_state
  mesh = AbstractMesh((count,), (axis,), (AxisType.Auto,))
  try:
    collectives.shapes_inside(
      probe, specs(args, axis), args, mesh=mesh, axis_names={axis}
    )
  except NotSharedError:
    raise
  except (TypeError, ValueError):
    # What JAX cannot type over a mesh can be simulated all the same.
    pass
