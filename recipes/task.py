"""The language model as a task: what is trained, on what, and its steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import grain
import jax
import optax
import text
from flax import nnx
from model import Transformer, next_byte_loss
from place import Place, find_place

import jaxdist as jd

VALIDATION_ROWS = 256


class Task(NamedTuple):
  """What all runs of a seed share.

  Attributes:
    place: where the workers live.
    params: at the start.
    loss_fn: ``(params, rows) -> nats a byte``.
    batches: ``batches[step]``, the rows of all workers.
    held_out: rows to validate on, in their place.
  """

  place: Place
  params: Any
  loss_fn: Callable[[Any, Any], jax.Array]
  batches: grain.MapDataset
  held_out: jax.Array

  @classmethod
  def of(
    cls, config: Any, data: text.Text, place: Place | None = None
  ) -> 'Task':
    """From lm.py's command line, a text, and a place if not the usual one."""
    place = place or find_place(config.workers)
    rows = config.batch * place.workers
    held_out = text.validation_rows(
      data, config.length, place.workers, VALIDATION_ROWS
    )
    model = Transformer(
      config.layers, config.width, config.heads, nnx.Rngs(config.seed)
    )
    graphdef, params = nnx.split(model, nnx.Param)

    def loss_fn(params, batch):
      return next_byte_loss(nnx.merge(graphdef, params), batch)

    return cls(
      place,
      params,
      loss_fn,
      text.training_batches(data, config.length, rows, config.seed),
      place.put(held_out),
    )

  def batch(self, index: int) -> jax.Array:
    """The rows of a step, in their place."""
    return self.place.put(self.batches[index])

  def start(self, tx: optax.GradientTransformation) -> jd.TrainState:
    """The state before the first step."""
    return jd.init(tx, self.params, **self.place.arguments())

  def compile(self, tx: optax.GradientTransformation, state: jd.TrainState):
    """A step, as ``(state, batch) -> (state, metrics)``, and its traffic."""
    batch = self.batch(0)
    step = jd.train_step(self.loss_fn, tx, **self.place.arguments())
    lowered = step.lower(state, batch)
    jd.assert_same_program(lowered, state, batch)
    step = lowered.compile()
    if self.place.mesh is not None:
      return step, jd.traffic(step)
    counted = self.place._replace(mesh=self.place.counted_on)
    lowered = jd.train_step(self.loss_fn, tx, **counted.arguments()).lower(
      jd.init(tx, jax.eval_shape(lambda: self.params), **counted.arguments()),
      counted.put(self.batches[0]),
    )
    # How well the rest is compiled makes no difference to what is sent.
    options = {'xla_backend_optimization_level': 0}
    return step, jd.traffic(lowered.compile(compiler_options=options))

  def evaluation(self) -> Callable[[jd.TrainState], float]:
    """The validation loss of a state."""
    loss = jax.jit(lambda state, x: self.loss_fn(jd.mean_params(state), x))
    return lambda state: float(loss(state, self.held_out))
