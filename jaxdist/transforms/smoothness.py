"""How curved a loss is: what safe step sizes are made from."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float


def estimate_smoothness(
  loss_fn: Callable[[optax.Params, Any], jax.Array],
  params: optax.Params,
  batch: Any,
  *,
  iterations: int = 100,
  seed: int = 0,
) -> Float[Array, '']:
  r"""The largest curvature of a loss at some parameters.

  A power iteration with the Hessian :math:`H`, which never forms it:

  .. math:: v \gets H v / \|H v\|, \qquad L \approx \|H v\|

  It approaches the eigenvalue of largest magnitude from below. Of a quadratic
  loss that is its smoothness; of another it is the curvature at these
  parameters only, and a bound has to be taken over those that training passes.
  Sends nothing: each worker's own smoothness comes from its own batch, as with
  ``jax.vmap`` over the workers' batches.

  Args:
    loss_fn: from parameters and a batch to a scalar loss.
    params: where.
    batch: of which loss.
    iterations: Hessian-vector products, at least 1.
    seed: of the first direction.

  Returns:
    The smoothness.

  Raises:
    ValueError: if ``iterations`` is below 1.

  Examples:
    >>> import jaxdist as jd
    >>> loss = lambda w, scales: jnp.sum(scales * w**2) / 2
    >>> jd.estimate_smoothness(loss, jnp.ones(3), jnp.array([1.0, 5.0, 2.0]))
    Array(5., dtype=float32)
  """
  if iterations < 1:
    raise ValueError(f'iterations must be at least 1, got {iterations}.')
  gradient = jax.grad(lambda p: loss_fn(p, batch))

  def product(v):
    return jax.jvp(gradient, (params,), (v,))[1]

  def normalized(v):
    # The floor keeps a loss without curvature at zero.
    length = jnp.maximum(optax.tree.norm(v), jnp.finfo(jnp.float32).tiny)
    return jax.tree.map(lambda x: (x / length).astype(x.dtype), v)

  start = optax.tree.random_like(jax.random.key(seed), params)
  v = jax.lax.fori_loop(
    0, iterations - 1, lambda _, v: normalized(product(v)), normalized(start)
  )
  return optax.tree.norm(product(v))
